"""An analytic reward, ``r(x) = a.x - c |x - m|^2`` of the point that a picture shows: DIDR's optimum is then known in closed form.

For `backbones/gaussian_mixture.py`, whose pictures are coordinates as grey pixels. Vectors are repeated until they are as long as x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from didr_core.config import Component
from didr_core.diffusion.mixtures import Quadratic
from didr_core.types import Tensors


class QuadraticReward:
    """Differentiable; prompts carry no meaning."""

    differentiable = True

    class Config(Component):
        """`slope` a, `centre` m, `curvature` c (0: linear). `extent`: the backbone's."""

        name: str = "quadratic"
        slope: tuple[float, ...] = (1.0,)
        centre: tuple[float, ...] = (0.0,)
        curvature: float = 0.0
        extent: float = 8.0

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self) -> None:
        """Nothing lies on disk."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing to load."""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """No text features; a column of zeros keeps the batch's length known."""
        return {"unused": torch.zeros(len(prompts), 1)}

    def formula(self, dim: int) -> Quadratic:
        """The reward as a function of points ``[B, D]``."""
        slope, centre = (_as_long_as(v, dim) for v in (self.config.slope, self.config.centre))
        return Quadratic(slope, centre, self.config.curvature)

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``[B, 3, H, W]`` to ``r [B]``."""
        x = (2 * images.mean(1).flatten(1) - 1) * self.config.extent
        return self.formula(x.shape[1])(x)


def _as_long_as(values: Sequence[float], dim: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat(-(-dim // len(values)))[:dim]
