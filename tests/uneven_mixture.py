"""A mixture of unequal weights and widths, a curved reward and points to look at them from; float64."""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.diffusion.mixtures import Mixture, Quadratic


def uneven(dim: int = 3) -> Mixture:
    """Unequal weights and widths, float64."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, dim, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    return Mixture(weights, means, torch.tensor([0.02, 0.1, 0.3, 0.05], dtype=torch.float64))


def reward(dim: int = 3, curvature: float = 0.3) -> Quadratic:
    return Quadratic(torch.linspace(1, -0.5, dim).double(), torch.linspace(-0.2, 0.4, dim).double(), curvature)


def points(dim: int = 3, count: int = 6) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
