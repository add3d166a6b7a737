"""Does a recipe fit on a GPU, by the plan of :mod:`didr_core.plan.memory`, and what to change where it does not."""

from __future__ import annotations

import yaml

from didr_core.config import Config, dump, validate
from didr_core.plan import memory
from didr_core.types import DIDRError

CHANGES = (
    "roles.gradient_checkpointing=true",
    "train.micro_batch=1",
    "roles.fsdp=true",  # of several workers
    "roles.dtype=bfloat16",
    "roles.assistant=lora",
    "drp.gradient_checkpointing=true",
    "roles.update=stochastic",
    "train.ema_decay=0",
    "drp.steps=1",
    "roles.generator=lora",
)
"""What is tried, in this order, where a recipe does not fit: what changes the result least comes first."""


def advice(config: Config, gigabytes: float) -> list[str]:
    """Fewest of :data:`CHANGES`, tried in order, after which the plan fits; empty where none of them is enough."""
    made: list[str] = []
    best = memory.plan(config)
    assert best is not None
    for change in CHANGES:
        if best.fits(gigabytes):
            break
        try:
            tried = changed(config, change)
        except DIDRError:  # not with this estimator, this optimizer, ...
            continue
        other = memory.plan(tried)
        assert other is not None
        if other.gpu_bytes()[1] < best.gpu_bytes()[1]:
            config, best = tried, other
            made.append(change)
    return made if best.fits(gigabytes) else []


def changed(config: Config, change: str) -> Config:
    """``config`` with one ``section.key=value``."""
    key, _, value = change.partition("=")
    section, _, name = key.partition(".")
    tree = dump(config)
    tree[section] = {**tree[section], name: yaml.safe_load(value)}
    return validate(tree)


def check(config: Config, gigabytes: float) -> None:
    """For preflight.

    Raises:
        DIDRError: the recipe does not fit on a GPU of ``gigabytes``; names what to change.
    """
    made = memory.plan(config)
    if made is None or made.fits(gigabytes):
        return
    where, used = made.gpu_bytes()
    changes = advice(config, gigabytes)
    fix = " ".join(f"--set {c}" for c in changes) or "a smaller backbone.resolution, or a larger GPU"
    raise DIDRError(
        f"memory: {where} needs about {used / 1e9:.0f} GB, the GPU has {gigabytes:.0f} GB. Change: {fix}. `didr doctor` shows why."
    )
