"""Regression to stored teacher pairs (noise, clean latent), kept on during matching so that modes are not lost.

One safetensors file, as `didr pairs` makes it: ``z`` and ``x0`` ``[N, C, H, W]``, and the condition as ``condition.<name> [N, ...]``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.config import Anchor, locate
from didr_core.diffusion.noise import ahead
from didr_core.types import Condition, DIDRError, Parallel

CONDITION = "condition."


def look(config: Anchor, latent_shape: tuple[int, ...]) -> Path:
    """The file, after a look at its header.

    Raises:
        DIDRError: there is none, it is no safetensors file, tensors are missing, or they are of other latents than ``latent_shape``.
    """
    from safetensors import SafetensorError, safe_open

    path, key = Path(locate(config.pairs)), f"train.anchor.pairs={config.pairs!r}"
    fix = "Make it with `didr pairs --recipe RECIPE --out FILE`, or say train.anchor=null."
    if not path.is_file():
        raise DIDRError(f"{key}: no such file. {fix}")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DIDRError(f"{key}: cannot be read as safetensors ({error}). {fix}") from error
    if {"z", "x0"} - shapes.keys() or not any(name.startswith(CONDITION) for name in shapes):
        raise DIDRError(
            f"{key}: expected tensors z, x0, {CONDITION}<name>; found {', '.join(sorted(shapes)[:6])}. {fix}"
        )
    expected = (*shapes["z"][:1], *latent_shape)
    for name, shape in shapes.items():
        if shape != expected if name in ("z", "x0") else shape[:1] != expected[:1]:
            raise DIDRError(
                f"{key}: {name} is {list(shape)}, for latents of this backbone {list(expected)} are expected. {fix}"
            )
    return path


class TeacherPairs:
    """Draws the same global batch of pairs for a step, whatever the number of workers."""

    def __init__(self, config: Anchor, latent_shape: tuple[int, ...], device: torch.device | str) -> None:
        from safetensors.torch import load_file

        tensors = load_file(look(config, latent_shape))
        self.config = config
        self.device = torch.device(device)
        self.z, self.x0 = tensors["z"], tensors["x0"]
        self.condition = Condition(
            {k.removeprefix(CONDITION): v for k, v in tensors.items() if k.startswith(CONDITION)}
        )

    def draw(self, seed: int, step: int, parallel: Parallel) -> tuple[Tensor, Tensor, Condition, float]:
        """This rank's rows of the step's global batch, float32, and what its mean loss weighs, so that ranks average to the global mean.

        A rank that has no row gets one that weighs nothing: its networks must run, too.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(self.z), (self.config.batch,), generator=generator)
        own = rows[parallel.rank :: parallel.world_size]
        share = len(own) * parallel.world_size / len(rows)
        own = own if len(own) else rows[:1]

        def of(values: Tensor) -> Tensor:
            taken = values[own]
            return ahead(taken.float(), self.device) if taken.is_floating_point() else taken  # as Condition.to does

        return of(self.z), of(self.x0), self.condition.map(of), share

    def loss(self, predicted: Tensor, x0: Tensor) -> Tensor:
        """``mean_i sqrt(MSE_i + 0.01)``: robust to the pairs whose layout the generator resolves otherwise."""
        return (losses.per_sample((predicted - x0).square()) + 0.01).sqrt().mean()
