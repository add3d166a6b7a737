"""The GPU benchmark at tiny size on a CPU: its JSON, its FLOPs, and that its plain loop makes the learner's own update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_step
from didr_core.train.learner import Learner

CPU = torch.device("cpu")


def test_the_plain_loop_makes_the_learners_update() -> None:
    """Float32 copies, same noise: what is timed beside us is the same method."""
    config = gpu_step.recipe("tiny", 64, 2, 2, 1, 2, "tiny", exact=True)
    ours, plain = Learner(config), gpu_step.Plain(config, CPU, torch.float32, checkpointing=False)
    start = [p.detach().clone() for p in plain.generator.parameters()]
    batch = gpu_step.prompts(plain.backbone, 2, CPU)
    ours.step(batch)
    plain.step(batch)
    pairs = zip(ours.generator_net.parameters(), plain.generator.parameters(), start, strict=True)
    directions = [((a - s).flatten(), (b - s).flatten()) for a, b, s in pairs]
    ours_moved, plain_moved = (torch.cat(side) for side in zip(*directions, strict=True))
    assert plain_moved.abs().max() > 1e-8
    # Adam's first update is the gradient's sign: rounding may turn that of a gradient which is almost zero
    assert torch.nn.functional.cosine_similarity(ours_moved, plain_moved, dim=0) > 0.99


def test_it_writes_every_row(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    sizes = ["--size", "tiny", "--resolutions", "64", "--steps", "1", "2"]
    sizes += ["--batch", "2", "--assistant-updates", "1", "--iterations", "1"]
    assert gpu_step.main([*sizes, "--output", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["hardware"]["versions"]["torch"] and report["hardware"]["date"].startswith("20")
    rows = {(r["loop"], r["K"]): r for r in report["rows"]}
    assert rows.keys() == {(loop, k) for loop in ("ours", "plain") for k in (1, 2)}
    for row in rows.values():
        assert row["fits"] and row["achieved_tflops"] == pytest.approx(row["tflop_per_update"] / row["s_per_update"])
        assert set(row["phases"]) == {"teaching assistant", "generator", "proxy and reward"}
        parts = row["phases"]["teaching assistant"]["s_per_update"] + row["phases"]["generator"]["s_per_update"]
        assert 0 < row["phases"]["proxy and reward"]["s_per_update"] < row["phases"]["generator"]["s_per_update"]
        assert parts <= row["s_per_update"] * 1.01
    assert rows["ours", 2]["tflop_per_update"] > 1.1 * rows["ours", 1]["tflop_per_update"]
