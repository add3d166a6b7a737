"""What an estimator of the Diffused Reward Score is: what it is told, gives back, and says of itself; and the steps that several share.

``s_r(x_t) = grad_{x_t} log E_{x0 ~ p_ref(x0|x_t)} exp(r(x0) / beta)``. The first denoiser evaluation at ``x_t`` is the reference's own
``D~_ref(x_t)`` and is handed back, so that the matching gradient costs no further one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from didr_core.config import DRP, registry
from didr_core.diffusion.schedule import chain_times, step
from didr_core.types import Schedule


@dataclass(frozen=True)
class Problem:
    """Everything an estimator may use. Functions take particle-major batches ``[M * B, ...]``."""

    x: Tensor  # [B, ...] noised latents x_t
    t: Tensor  # [B]
    schedule: Schedule
    denoise: Callable[[Tensor, Tensor], Tensor]  # guided reference, x0 prediction
    reward: Callable[[Tensor], Tensor]  # clean latents -> standardised reward, differentiable where the reward is
    noise: Callable[[str, int], Tensor]  # (tag, M) -> [M * B, ...] standard normal
    beta: float


@dataclass(frozen=True)
class Estimate:
    """``score`` is s_r, ``x0`` the reference's Tweedie estimate at x_t, ``reward`` the mean reward at the end of the proxy; no grad."""

    score: Tensor  # [B, ...]
    x0: Tensor  # [B, ...]
    reward: Tensor  # [B]


@dataclass(frozen=True)
class Calls:
    """What one sample costs: denoiser calls that are differentiated, those that are not, and pictures rewarded."""

    differentiated: int
    plain: int
    rewarded: int


class Estimator:
    """Base of the estimators, one a file. ``steps`` and ``particles`` are K and M where a config names none."""

    steps: ClassVar[int] = 1
    particles: ClassVar[int] = 1
    needs_reward_gradient: ClassVar[bool] = True

    def __init__(self, config: DRP) -> None:
        self.config = config

    @classmethod
    def check(cls, steps: int, particles: int) -> None:
        """Raises ValueError, which names the key, for a K or M that makes no sense here."""

    @classmethod
    def calls(cls, steps: int, particles: int) -> Calls:
        """The cost of one sample at K and M."""
        raise NotImplementedError

    def estimate(self, problem: Problem) -> Estimate:
        """The DRS at ``problem.x``, before gate and clip."""
        raise NotImplementedError


def estimate(config: DRP, problem: Problem) -> Estimate:
    """The DRS by the configured estimator, before gate and clip."""
    estimator: Estimator = registry.find("drs", config.estimator)(config)
    return estimator.estimate(problem)


def first_call(problem: Problem) -> tuple[Tensor, Tensor]:
    """``x_t`` as a leaf and ``D(x_t)`` with its graph."""
    with torch.enable_grad():
        x = problem.x.detach().requires_grad_()
        return x, problem.denoise(x, problem.t)


def pull_back(x: Tensor, x0: Tensor, vector: Tensor) -> Tensor:
    """``J_D^T vector``."""
    (gradient,) = torch.autograd.grad(x0, x, vector)
    return gradient


@torch.no_grad()
def rollout(problem: Problem, x0: Tensor, steps: int, particles: int, eta: float) -> Tensor:
    """From ``x_t`` and its Tweedie estimate, K - 1 further evaluations to clean latents ``[M * B, ...]``."""
    times = chain_times(problem.t, steps)
    x, x0_hat = repeat(problem.x, particles), repeat(x0.detach(), particles)
    for k in range(1, steps):
        now, before = repeat(times[k], particles), repeat(times[k - 1], particles)
        noise = problem.noise(f"drp/{k}", particles) if eta > 0 else None
        x = step(problem.schedule, x, x0_hat, before, now, eta, noise)
        x0_hat = problem.denoise(x, now)
    return x0_hat


def reward_gradient(problem: Problem, x0: Tensor) -> tuple[Tensor, Tensor]:
    """``r [N]`` and ``grad r`` at detached ``x0 [N, ...]``."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        reward = problem.reward(leaf)
        (gradient,) = torch.autograd.grad(reward.sum(), leaf)
    return reward.detach(), gradient


def particle_weights(reward: Tensor, particles: int, beta: float) -> tuple[Tensor, Tensor]:
    """``[M * B] -> rewards [M, B], softmax weights over particles [M, B]``."""
    reward = reward.view(particles, -1)
    return reward, torch.softmax(reward / beta, 0)


def repeat(values: Tensor, particles: int) -> Tensor:
    """``[B, ...] -> [M * B, ...]``, particle-major."""
    return values.repeat(particles, *([1] * (values.dim() - 1)))


def weights_like(weights: Tensor, x: Tensor) -> Tensor:
    """``[M, B] -> [M, B, 1, ...]``."""
    return weights.view(*weights.shape, *([1] * (x.dim() - 1)))
