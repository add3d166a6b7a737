"""What the host pays for an update: SDXL at full depth and 1/20 of its width on one CPU thread, where arithmetic is almost nothing.

    python -m benchmarks.host_cost                       # every layout of roles; about two minutes
    python -m benchmarks.host_cost --layouts recipe full --rounds 9
    python -m benchmarks.host_cost --layouts recipe "recipe, compiled"

Each layout's TA micro-step (fresh sample, forward, backward) and generator micro-step (forward, proxy, TA's answer, backward) stand beside
the calls of a bare network that they must make in the same precision (under activation checkpointing one forward more for each backward),
taken in turns: CPU seconds of the process (which other programs do not change much) and dispatched operators, medians over rounds.
A GPU waits for exactly this time where its own work is shorter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import hollow_sdxl
from didr_core import config as configs
from didr_core.config import Config
from didr_core.plan import hollow, published
from didr_core.train.learner import Learner
from didr_core.types import Batch

NARROW_UNET = {
    **published.PARTS["sdxl"]["unet"],
    "sample_size": 8,
    "block_out_channels": (16, 32, 64),
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 104,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 64 + 6 * 16,
}
RECIPE = {"assistant": "lora", "rank": 4, "dtype": "bfloat16", "update": "stochastic"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "recipe": RECIPE,
    "recipe, checkpointing": {**RECIPE, "gradient_checkpointing": True},
    "lora": {"generator": "lora", "assistant": "lora", "rank": 4},
}
"""Roles of sdxl_1gpu are "recipe": a full generator, the TA an adapter on the reference, in bfloat16 with stochastic rounding."""
COMPILED = {f"{name}, compiled": roles for name, roles in LAYOUTS.items()}
"""The same with `train.compile=blocks`: about a minute each before the first round. Operators are counted without."""


class Operators(TorchDispatchMode):
    """How many are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def config_of(layout: str, folder: Path) -> Config:
    """SDXL's full depth at 1/20 of its width, float32, with the estimator `tweedie` and a toy reward."""
    roles, compiled = (LAYOUTS | COMPILED)[layout], layout in COMPILED
    pipeline = published.write("sdxl", folder, unet=NARROW_UNET, vae=hollow_sdxl.TINY_VAE)
    tree = {
        "name": "host_cost",
        "backbone": {"name": "sdxl", "pipeline": str(pipeline), "generator": "none"},
        "algorithm": "didr",
        "reward": hollow_sdxl.reward("tiny", folder),
        "drp": {"estimator": "tweedie"},
        "guidance": {"reference": 8.0},
        "generator": {"lr": 5e-7},
        "assistant": {"lr": 5e-5},
        "train": {"steps": 1000, "batch": 1, "assistant_updates": 1, "compile": "blocks" if compiled else "none"},
        "roles": roles,
        "data": {"prompts": "none"},
    }
    return configs.validate(tree)


def learner(layout: str, folder: Path) -> Learner:
    """The learner of :func:`config_of`, random weights."""
    config = config_of(layout, folder)
    backbone = hollow.backbone(config.backbone, folder, "cpu")
    return Learner(config, backbone=backbone, reward=hollow.Reward(config.reward, "cpu"))  # type: ignore[arg-type]


def batch_of(subject: Learner) -> Batch:
    """One prompt's."""
    condition = subject.backbone.blank(1).map(torch.randn_like)  # type: ignore[attr-defined]
    return Batch(torch.arange(1), ["0"], ["0"], condition, {}, torch.zeros(1), torch.ones(1))


def bare(layout: str, folder: Path) -> dict[str, Callable[[], None]]:
    """The calls that a TA micro-step and a generator micro-step of ``layout`` must make, of a network without roles."""
    roles = (LAYOUTS | COMPILED)[layout]
    config = config_of("full", folder)
    backbone = hollow.backbone(config.backbone, folder, "cpu")
    judge = hollow.Reward(config.reward, "cpu")
    dtype = getattr(torch, roles.get("dtype", "float32"))
    fixed, trained = (backbone.load_network("reference").to(dtype).requires_grad_(learns) for learns in (False, True))
    backbone.load_decoder()
    condition = backbone.blank(1).map(torch.randn_like)
    x, t = torch.randn(1, *backbone.latent_shape), torch.full((1,), 0.5)

    def forward(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = backbone.x0(net, x, t.repeat(len(x)), condition.tile(len(x)))
        return out

    @torch.no_grad()
    def again(x: torch.Tensor) -> None:
        if roles.get("gradient_checkpointing"):
            forward(fixed, x)

    def assistant() -> None:
        forward(fixed, x)
        out = forward(trained, x)
        again(x)
        out.sum().backward()

    def generator() -> None:
        made = forward(trained, x)
        leaf = x.clone().requires_grad_()
        pair = leaf.repeat(2, 1, 1, 1)
        guided = forward(fixed, pair)
        again(pair)
        torch.autograd.grad(judge.score(backbone.decode(guided[:1]), {}).sum(), leaf)
        forward(fixed, x)
        again(x)
        made.sum().backward()

    return {"TA": assistant, "generator": generator}


def ours(layout: str, folder: Path) -> dict[str, Callable[[], None]]:
    """The learner's own micro-steps, gradients kept as in training; the optimizer's update apart."""
    subject = learner(layout, folder)
    batch = batch_of(subject)

    def update() -> None:
        subject.assistant_opt.step()
        subject.generator_opt.step()

    return {
        "TA": lambda: _nothing(subject.backward(batch, "assistant", lambda part: subject.assistant_loss(part, "ta0"))),
        "generator": lambda: _nothing(subject.backward(batch, "generator", subject.generator_loss)),
        "optimizers": update,
    }


def _nothing(_: Any) -> None: ...


def measure(folder: Path, layouts: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of layout and part: CPU seconds (NaN without ``rounds``), operators, and both as multiples of the bare calls'."""
    subjects = {}
    for i, name in enumerate(layouts):
        subjects[f"{name}: bare calls"] = bare(name, folder / f"{i}b")
        subjects[name] = ours(name, folder / str(i))
    cases = [(name, part, run) for name, parts in subjects.items() for part, run in parts.items()]
    seconds: dict[tuple[str, str], list[float]] = {(name, part): [] for name, part, _ in cases}
    operators = {}
    for _, _, run in cases:
        run()  # warm
    for _ in range(rounds):
        for name, part, run in cases:
            began = time.process_time()
            run()
            seconds[name, part].append(time.process_time() - began)
    for name, part, run in cases:  # last: what was called under such a mode is never run compiled again
        with Operators() as count:
            run()
        operators[name, part] = count.count
    middle = {key: statistics.median(values or [math.nan]) for key, values in seconds.items()}
    rows = []
    for name, part, _ in cases:
        least = middle.get((f"{name}: bare calls", part)), operators.get((f"{name}: bare calls", part))
        row: dict[str, Any] = {
            "layout": name,
            "part": part,
            "s": middle[name, part],
            "operators": operators[name, part],
        }
        if least[0] and least[1]:
            row |= {"times_s": row["s"] / least[0], "times_operators": row["operators"] / least[1]}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line each row, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS, *COMPILED], default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.layouts, given.rounds)
    for row in rows:
        more = f" {row['times_s']:.2f}x {row['times_operators']:.2f}x" if "times_s" in row else ""
        print(f"{row['layout']:<33} {row['part']:<11} {row['s']:.3f} s {row['operators']:>7,} operators{more}")
    if given.output:
        hardware = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        report = {"hardware": hardware, "date": datetime.date.today().isoformat(), "rounds": given.rounds, "rows": rows}
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
