"""The GPU benchmark at tiny size on a CPU: its JSON, its FLOPs, and that its plain loop makes the learner's own update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_step

CPU = torch.device("cpu")


def test_the_plain_loop_makes_the_learners_update(tmp_path: Path) -> None:
    """Float32 copies, same noise: what is timed beside us is the same method."""
    config = gpu_step.recipe("tiny", tmp_path, 64, 2, 2, 1, 2, "tiny", exact=True)
    ours = gpu_step.ours(config, tmp_path, CPU)
    plain = gpu_step.Plain(config, tmp_path, CPU, torch.float32, checkpointing=False)
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
        assert {"TA update", "generator update", "proxy"} <= set(row["phases"])
        seconds = {name: phase["s_per_update"] for name, phase in row["phases"].items()}
        assert 0 < seconds["proxy"] < seconds["generator update"]
        assert seconds["TA update"] + seconds["generator update"] <= row["s_per_update"] * 1.01
    planned = rows["ours", 2]["planned"]["tflop_per_update"]
    assert rows["ours", 2]["tflop_per_update"] == pytest.approx(planned, rel=0.1)  # attention on a CPU is not counted
    assert rows["ours", 2]["tflop_per_update"] > 1.1 * rows["ours", 1]["tflop_per_update"]
