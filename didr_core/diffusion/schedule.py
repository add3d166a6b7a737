"""Forward processes ``x_t = alpha_t x0 + sigma_t eps``, and what follows from them for any denoiser spoken of as its ``x0`` prediction.

Times are ``t [B]`` in [0, 1] for every family: 0 is clean, 1 is noise. Everything is float32 or better: alphas_cumprod is never stored
in half precision (1e-3 of error in bf16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from didr_core.types import Schedule

LATEST = 1 - 1e-3
"""Up to here x_t holds something of x0 in every schedule; at 1 rectified flow's alpha is 0, and ``sigma^2 / alpha`` has no value."""


class VariancePreserving:
    """The discrete VP schedule of SD/SDXL: ``alpha = sqrt(abar_i)``, ``i = floor(1000 t)``; networks are told ``i``."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.double()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # alphas, sigmas: a GPU's host waits for a copy

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000
    ) -> VariancePreserving:
        """SDXL's betas: linear in their square roots."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - betas, 0))

    def index(self, t: Tensor) -> Tensor:
        """``t [B]`` to table rows; the small offset lets ``i / 1000`` find row ``i`` whatever its rounding."""
        n = len(self.alphas_cumprod)
        return (t.double() * n + 1e-3).floor().long().clamp(0, n - 1)

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha, sigma [B]``, float32."""
        return self.at(self.index(t))

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha, sigma [B]``, float32, of table rows ``index [B]``."""
        if (tables := self._tables.get(index.device)) is None:
            abar = self.alphas_cumprod.to(index.device)
            tables = self._tables[index.device] = abar.sqrt().float(), (1 - abar).sqrt().float()
        alphas, sigmas = tables
        return alphas[index], sigmas[index]


class RectifiedFlow:
    """``alpha = 1 - s``, ``sigma = s`` with ``s = shift t / (1 + (shift - 1) t)``; networks are told ``1 - s`` (Z-Image).

    Times are kept 1e-3 away from 0, where ``alpha / sigma`` is infinite; at 1, where sampling starts, the noise is pure.
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha, sigma [B]``, float64 for float64 times, else float32."""
        t = (t if t.dtype == torch.float64 else t.float()).clamp_min(1e-3)
        s = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - s, s


class Cosine:
    """``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``: variance preserving, in the precision of ``t``; networks are told ``t``.

    Times are kept 1e-3 away from both ends, where ``alpha / sigma`` or its inverse is infinite.
    """

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha, sigma [B]``, float64 for float64 times, else float32."""
        angle = (t if t.dtype == torch.float64 else t.float()).clamp(1e-3, 1 - 1e-3) * (math.pi / 2)
        return angle.cos(), angle.sin()


def expand(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, ...]`` with as many axes as ``like``."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def coeffs_like(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha, sigma`` shaped to broadcast with ``like``."""
    alpha, sigma = schedule.coeffs(t)
    return expand(alpha, like), expand(sigma, like)


def diffuse(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``x_t``."""
    alpha, sigma = coeffs_like(schedule, t, x0)
    return alpha * x0 + sigma * eps


def step(
    schedule: Schedule, x: Tensor, x0_hat: Tensor, t: Tensor, s: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """One denoising step ``t -> s``: DDIM at ``eta = 0`` (Euler for rectified flow), ancestral sampling at ``eta = 1``.

    With ``a = alpha_t / alpha_s`` and ``b^2 = sigma_t^2 - a^2 sigma_s^2`` the posterior variance is ``sigma_s^2 b^2 / sigma_t^2``
    (DDIM, arXiv 2010.02502, eq. 12 and 16).
    """
    alpha_t, sigma_t = coeffs_like(schedule, t, x)
    alpha_s, sigma_s = coeffs_like(schedule, s, x)
    eps = (x - alpha_t * x0_hat) / sigma_t
    if eta == 0.0:
        return alpha_s * x0_hat + sigma_s * eps
    if noise is None:
        raise ValueError("step: eta > 0 needs noise")
    b2 = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp_min(0)
    c2 = eta**2 * sigma_s**2 * b2 / sigma_t**2
    return alpha_s * x0_hat + (sigma_s**2 - c2).clamp_min(0).sqrt() * eps + c2.sqrt() * noise


def chain_times(t: Tensor, steps: int) -> list[Tensor]:
    """``[t, ...]``: the K times at which a chain from ``t`` to clean evaluates the denoiser, evenly spaced in t."""
    return [t * (1 - k / steps) for k in range(steps)]


def time_at(schedule: Schedule, noise: float) -> float:
    """The latest of the times 0, 0.001, .. 1 at which ``sigma / alpha`` is at most ``noise``."""
    alpha, sigma = schedule.coeffs(torch.linspace(0, 1, 1001, dtype=torch.float64))
    return max(0, int((sigma <= noise * alpha).sum()) - 1) / 1000
