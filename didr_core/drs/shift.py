"""The `shift` estimator: the tilted posterior is the posterior at a shifted ``x_t``. Three denoiser calls, no gradient through any of them.

``p(x0 | x_t) exp(g.x0)`` is ``p(x0 | x_t + kappa g)`` normalised, ``kappa = sigma^2 / alpha``, because ``q(x_t | x0)`` is Gaussian in x_t.
So with ``g = grad r(D(x_t)) / beta``, ``s_r = (D(x_t + kappa g) - D(x_t)) / kappa``, exactly where the reward is linear. Elsewhere the
gradient turns on the way, and one secant step finds the share tau of the shift at whose end it is just as long. Derived for this project
(docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from didr_core.diffusion.schedule import coeffs_like, expand
from didr_core.drs.problem import Estimate, Estimator, Problem, bounded_tilt, dot

FOOLED = 0.3  # bend over gain at which a shift is trusted by half is 1 / this


@dataclass(frozen=True)
class Shifted:
    """The posterior moved along the reward's gradient: what `shift` answers with and `hybrid` starts from."""

    estimate: Estimate
    gradient: Tensor  # g [B, ...], its shift at most `drp.reach`
    share: Tensor  # tau [B, 1, ...] in [0, 1]
    x0: Tensor  # D(x_t + kappa tau g) [B, ...]
    bend: Tensor  # [B] nats by which the reward differs from its tangent over the whole shift
    trust: Tensor  # [B] in [0, 1] that the shift goes where the reward does; `share` has it as a factor where that is asked for


class Shift(Estimator):
    """Exact for linear rewards under any reference, and for an isotropic quadratic under a Gaussian with equal variances."""

    gate = False

    @classmethod
    def check(cls, steps: int, particles: int) -> None:
        """Raises ValueError: more than one step."""
        if steps != 1:
            raise ValueError(f"drp.steps={steps}: shift is one step; use hybrid for K > 1, or drp.steps=1")

    def estimate(self, problem: Problem) -> Estimate:
        return shifted(problem, self.config.reach).estimate


@torch.no_grad()
def shifted(problem: Problem, reach: float, wary: bool = False) -> Shifted:
    """One shift along ``grad r(D(x_t)) / beta``, of at most ``reach`` standard deviations of the noise, and its secant step.

    With ``wary`` it is shortened where the tangent promises more than the reward holds: in many dimensions it may lead to another mode,
    which the reward does not prefer.
    """
    x = problem.x
    alpha, sigma = coeffs_like(problem.schedule, problem.t, x)
    kappa = sigma**2 / alpha
    first = problem.denoise(x, problem.t)
    reward, gradient = bounded_tilt(problem, first, reach * alpha / sigma)
    whole = problem.denoise(x + kappa * gradient, problem.t)
    turned = bounded_tilt(problem, whole, reach * alpha / sigma)[1] - gradient
    size, change = dot(gradient, gradient), dot(gradient, turned)
    # at the end of a share l of the shift the gradient is g + l * turned: along g it is l * g at l = size / (size - change)
    share = torch.where(size > change, size / (size - change).clamp_min(1e-30), 1.0).clamp(0, 1)
    bend = 0.5 * dot(turned, whole - first).abs()
    gain = dot(gradient + 0.5 * turned, whole - first).clamp_min(1e-6)  # nats, by the trapezium rule
    trust = 1 / (1 + (FOOLED * bend / gain) ** 4)
    share = expand(share * trust if wary else share, x)
    last = problem.denoise(x + kappa * share * gradient, problem.t)
    return Shifted(Estimate((last - first) / kappa, first, reward), gradient, share, last, bend, trust)
