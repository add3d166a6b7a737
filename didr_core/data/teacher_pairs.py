"""Regression to stored teacher pairs (noise, clean latent), kept on during matching so that modes are not lost.

File: one safetensors with ``z`` and ``x0`` ``[N, C, H, W]``, and the condition's tensors as ``condition.<name> [N, ...]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.config import Anchor, locate
from didr_core.types import Condition, DIDRError, Parallel


class TeacherPairs:
    """Draws the same global batch of pairs for a step, whatever the number of workers."""

    def __init__(self, config: Anchor, device: torch.device | str) -> None:
        from safetensors.torch import load_file

        path = locate(config.pairs)
        if not path.is_file():
            raise DIDRError(
                f"train.anchor.pairs={config.pairs!r}: no such file. Make it with `python -m examples.tiny_world.build pairs`."
            )
        tensors = load_file(path)
        if missing := {"z", "x0"} - tensors.keys():
            raise DIDRError(
                f"train.anchor.pairs={config.pairs!r}: tensors {sorted(missing)} are missing; found {sorted(tensors)[:6]}"
            )
        self.config = config
        self.device = torch.device(device)
        self.z, self.x0 = tensors["z"], tensors["x0"]
        self.condition = Condition(
            {k.removeprefix("condition."): v for k, v in tensors.items() if k.startswith("condition.")}
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
        z, x0 = (v[own].float().to(self.device) for v in (self.z, self.x0))
        return z, x0, self.condition.map(lambda v: v[own].float()).to(self.device), share

    def loss(self, predicted: Tensor, x0: Tensor) -> Tensor:
        """``mean_i sqrt(MSE_i + 0.01)``: robust to the pairs whose layout the generator resolves otherwise."""
        return (losses.per_sample((predicted - x0).square()) + 0.01).sqrt().mean()
