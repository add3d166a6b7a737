"""Gaussian mixtures with everything about them in closed form: the ground truth that estimators and trainings are measured against.

Components are isotropic, ``p(x) = sum_k w_k N(x; mu_k, v_k I)``. Two operations stay inside the family, so DIDR's optimum is known exactly:

- diffusion, ``x_t = alpha x0 + sigma eps``: components ``N(alpha mu_k, (alpha^2 v_k + sigma^2) I)``;
- the tilt ``p exp(r / beta)`` by ``r(x) = a.x - c |x - m|^2``: each component times a Gaussian.

Hence ``s_r(x_t) = (alpha / sigma^2) (E_tilted[x0 | x_t] - E[x0 | x_t])``, exactly, at every noise level and in any dimension. Work is done
in the precision of the arguments. Legend: ``B`` batch, ``N`` components, ``D`` dimensions, ``M`` draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quadratic:
    """The reward ``r(x) = a.x - c |x - m|^2``; linear where ``curvature`` is 0."""

    slope: Tensor  # a [D]
    centre: Tensor  # m [D]
    curvature: float = 0.0  # c

    def __call__(self, x: Tensor) -> Tensor:
        """``x [B, D] -> r [B]``."""
        slope, centre = self.slope.to(x), self.centre.to(x)
        return x @ slope - self.curvature * (x - centre).square().sum(-1)


@dataclass(frozen=True)
class Mixture:
    """``sum_k w_k N(mu_k, v_k I)``."""

    log_weights: Tensor  # [N], normalised
    means: Tensor  # [N, D]
    variances: Tensor  # [N]

    @classmethod
    def equal(cls, means: Tensor, std: float) -> Mixture:
        """Equal weights and one standard deviation."""
        n = len(means)
        return cls(means.new_full((n,), -math.log(n)), means, means.new_full((n,), std**2))

    def to(self, like: Tensor) -> Mixture:
        """Device and precision of ``like``."""
        return Mixture(self.log_weights.to(like), self.means.to(like), self.variances.to(like))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``[count, D]`` independent draws."""
        pick = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[pick] + self.variances[pick].sqrt()[:, None] * noise

    def log_prob(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """``log p_t(x) [B]`` of the law diffused with ``alpha, sigma`` (numbers or ``[B, 1]``)."""
        return self._joint(x, alpha, sigma).logsumexp(-1)

    def denoise(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """``E[x0 | x_t = x] [B, D]``: the exact denoiser."""
        share = self._joint(x, alpha, sigma).softmax(-1)
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)  # [B, N] or [N]
        return (share * (1 - gain * alpha)) @ self.means + (share * gain).sum(-1, keepdim=True) * x

    def score(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """``grad log p_t(x) [B, D]``."""
        share = self._joint(x, alpha, sigma).softmax(-1)
        precision = 1 / (alpha**2 * self.variances + sigma**2)
        return (share * precision) @ self.means * alpha - (share * precision).sum(-1, keepdim=True) * x

    def tilted(self, reward: Quadratic, beta: float) -> Mixture:
        """The optimum of RLHF, ``p exp(r / beta)`` normalised: a mixture again.

        Raises:
            ValueError: a curvature so negative that the tilted density has no integral.
        """
        slope, centre = reward.slope.to(self.means), reward.centre.to(self.means)
        c = reward.curvature
        precision = 1 / self.variances + 2 * c / beta
        if bool((precision <= 0).any()):
            raise ValueError(f"curvature={c:g}, beta={beta:g}: the reward grows faster than the density falls")
        means = (self.means / self.variances[:, None] + (slope + 2 * c * centre) / beta) / precision[:, None]
        # log E_k exp(r / beta), by completing the square around each component's mean
        at_mean = reward(self.means) / beta
        gradient = (slope - 2 * c * (self.means - centre)) / beta
        dim = self.means.shape[1]
        gain = at_mean + 0.5 * gradient.square().sum(-1) / precision - 0.5 * dim * (precision * self.variances).log()
        return Mixture((self.log_weights + gain).log_softmax(0), means, 1 / precision)

    def expected(self, reward: Quadratic) -> float:
        """``E[r]`` under the mixture."""
        spread = reward.curvature * self.means.shape[1] * self.variances
        return float((self.log_weights.exp() * (reward(self.means) - spread)).sum())

    def _joint(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """``log w_k N(x; alpha mu_k, alpha^2 v_k + sigma^2) [B, N]``."""
        total = alpha**2 * self.variances + sigma**2
        square = (
            x.square().sum(-1, keepdim=True) + alpha**2 * self.means.square().sum(-1) - 2 * alpha * x @ self.means.T
        )
        dim = self.means.shape[1]
        return self.log_weights - 0.5 * square / total - 0.5 * dim * (2 * math.pi * total).log()


def diffused_reward_score(
    reference: Mixture, tilted: Mixture, x: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """The exact DRS ``s_r(x_t) [B, D]`` from the two exact denoisers."""
    return alpha / sigma**2 * (tilted.denoise(x, alpha, sigma) - reference.denoise(x, alpha, sigma))
