"""What a recipe leaves open, decided by what fits on the GPU: `train.micro_batch: auto` and `roles.gradient_checkpointing: auto`.

Why in this order: README.md. SDXL's passes take 0.25 s for one sample as for four (benchmarks/results/gpu_step.md).
"""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile

import torch

from didr_core.config import Config, Recompute
from didr_core.plan import advice, memory
from didr_core.types import DIDRError

ENOUGH = 4
"""Samples of a pass from which on the GPU, not the host, is the bound."""
WAYS: tuple[Recompute, ...] = (False, "generator", True)
"""In which updates activations are recomputed: in none, in the generator's, whose networks hold most, in the TA's too."""


def undecided(config: Config) -> bool:
    """Whether anything is "auto"."""
    return "auto" in (config.train.micro_batch, config.roles.gradient_checkpointing)


def here(config: Config, at_once: int = 1) -> tuple[Config, str]:
    """:func:`decided` by what is free on this machine's GPUs, each shared by ``at_once`` runs.

    Raises:
        DIDRError: no choice fits; names what else to change.
    """
    if not undecided(config):
        return config, ""
    free = _free() if config.device != "cpu" else None
    config, told = decided(config, free and free / at_once)
    if free:
        advice.check(config, free / at_once / 1e9)
    return config, told


def decided(config: Config, free: float | None) -> tuple[Config, str]:
    """``config`` with every "auto" replaced, and what was decided, in words.

    Args:
        free: bytes that all processes on a GPU may take together. None, no process that asks for a GPU, or a family that is not planned,
            because it does not say how: the whole share of a worker at once, nothing recomputed.
    """
    if not undecided(config):
        return config, ""
    train, roles, share = config.train, config.roles, config.sizes.share
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    if train.micro_batch != "auto":
        sizes = [config.sizes.micro_batch]
    ways = list(WAYS) if roles.gradient_checkpointing == "auto" else [roles.gradient_checkpointing]
    enough = min((n for n in sizes if n >= ENOUGH), default=sizes[-1])
    if free is None or not config.workers.train_gpus or memory.plan(_with(config, enough, ways[0])) is None:
        whole = None if train.micro_batch == "auto" else train.micro_batch
        return _with(config, whole, ways[0]), f"micro-batch {whole or share}: nothing has to fit on a GPU"

    def fits(size: int, way: Recompute) -> bool:
        return _used(_with(config, size, way)) <= free

    way = next((w for w in ways if fits(enough, w)), ways[-1])
    larger = takewhile(lambda n: fits(n, way), (n for n in sizes if n >= enough))
    smaller = (n for n in reversed(sizes) if n < enough and fits(n, way))
    size = max(larger, default=0) or next(smaller, sizes[0])
    chosen = _with(config, size, way)
    recomputed = "the generator's" if way == "generator" else "all" if way else "no"
    used = f"micro-batch {size}: {_used(chosen) / 1e9:.0f} of {free / 1e9:.0f} GB"
    return chosen, f"{used}, activations recomputed in {recomputed} updates"


def _with(config: Config, size: int | None, way: Recompute) -> Config:
    train = config.train.model_copy(update={"micro_batch": size})
    roles = config.roles.model_copy(update={"gradient_checkpointing": way})
    return config.model_copy(update={"train": train, "roles": roles})


def _used(config: Config) -> float:
    made = memory.plan(config)
    assert made is not None
    return made.gpu_bytes()[1]


def _free() -> float | None:
    """Bytes free on the GPU with the least; None where this process sees none. Asked elsewhere: this process would keep a CUDA context."""
    if not torch.cuda.is_available():
        return None
    code = "import torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DIDRError(
            f"train.micro_batch=auto: the GPUs did not say how much memory is free ({last}). Name a number, and see "
            "`nvidia-smi`."
        )
    return float(done.stdout)
