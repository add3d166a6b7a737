"""A learner over random models at toy size, a batch for it, and the bytes it holds: what tests of networks, plans and training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from didr_core import config
from didr_core.networks.fsdp import is_sharded
from didr_core.networks.lora import LoRA
from didr_core.plan import memory
from didr_core.plan.memory import Plan
from didr_core.train import checkpoint
from didr_core.train.learner import Learner
from didr_core.types import Batch

PROMPTS = ["red", "a green circle", "blue above", "two squares"]


def small_config(folder: Path, **changes: Any) -> config.Config:
    tree: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "backbone": {"name": "sdxl", "pipeline": str(folder)},
        "algorithm": {"name": "diff_instruct"},
        "generator": {"lr": 1e-3},
        "assistant": {"lr": 1e-3},
        "train": {"steps": 6, "batch": 4},
        "roles": {"generator": "lora", "assistant": "lora", "rank": 4, "alpha": 8},
        "data": {"prompts": "unused"},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return config.validate(tree)


def learner(folder: Path, parallel: Any = None, **changes: Any) -> Learner:
    return Learner(small_config(folder, **changes), parallel=parallel)


def batch(of: Learner) -> Batch:
    if of.backbone._text is None:  # type: ignore[attr-defined]
        of.backbone.load_text()
    inputs = of.reward.prepare(PROMPTS) if of.reward else {}
    return Batch(torch.arange(4), PROMPTS, PROMPTS, of.backbone.encode(PROMPTS), inputs)


def held(subject: Learner) -> int:
    """Bytes of weights, masters, gradients, moments and average that lie here, each storage once."""
    networks = [subject.generator_net, subject.assistant_net, subject.reference_net, subject.ema_net]
    bases = [n.base for n in networks if isinstance(n, LoRA)]
    tensors = [p for n in (*networks, *bases) for p in n.parameters()]
    for weights, optimizer in (
        (subject.generator_weights, subject.generator_opt),
        (subject.assistant_weights, subject.assistant_opt),
    ):
        tensors += list(weights.values.values())
        trained = (*weights.values.values(), *weights.network.parameters())
        tensors += [p.grad for p in trained if p.grad is not None]
        tensors += [v for s in optimizer.state.values() for v in s.values() if v.numel() > 1 or v.dim()]
    storages = [(t.to_local() if is_sharded(t) else t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def lines(plan: Plan, owner: str) -> dict[str, float]:
    return {line.what: line.bytes for line in plan.processes[0].held if line.owner == owner}


def planned(of: config.Config) -> float:
    plan = memory.plan(of)
    assert plan is not None
    return sum(sum(lines(plan, owner).values()) for owner in ("generator", "assistant", "reference"))


def saved(of: Learner, folder: Path, extra: dict[str, Any], **more: Any) -> None:
    """A checkpoint, whole when this returns."""
    with checkpoint.Saver(of) as saver:
        saver.save(folder, extra, **more)
