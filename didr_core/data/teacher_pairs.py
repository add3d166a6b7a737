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

    def draw(self, seed: int, step: int, parallel: Parallel) -> tuple[Tensor, Tensor, Condition]:
        """This rank's rows of the step's global batch, float32."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(self.z), (self.config.batch,), generator=generator)[
            parallel.rank :: parallel.world_size
        ]
        condition = self.condition.map(lambda v: v[rows].float())
        return self.z[rows].float().to(self.device), self.x0[rows].float().to(self.device), condition.to(self.device)

    def loss(self, predicted: Tensor, x0: Tensor) -> Tensor:
        """``mean_i sqrt(MSE_i + 0.01)``: robust to the pairs whose layout the generator resolves otherwise."""
        return (losses.per_sample((predicted - x0).square()) + 0.01).sqrt().mean()
