"""What an estimator of the Diffused Reward Score is: what it is told, gives back, and says of itself; and the steps that several share.

``s_r(x_t) = grad_{x_t} log E_{x0 ~ p_ref(x0|x_t)} exp(r(x0) / beta)``. The first denoiser evaluation at ``x_t`` is the reference's own
``D~_ref(x_t)`` and is handed back, so that the matching gradient costs no further one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from didr_core.config import DRP, registry
from didr_core.diffusion.noise import ahead
from didr_core.diffusion.schedule import LATEST, chain_times, expand, step
from didr_core.types import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Everything an estimator may use. Functions take particle-major batches ``[M * B, ...]``."""

    x: Tensor  # [B, ...] noised latents x_t
    t: Tensor  # [B]
    schedule: Schedule
    denoise: Denoise  # guided reference, x0 prediction
    reward: Reward  # clean latents -> standardised reward, differentiable where the reward is
    noise: Callable[[str, int], Tensor]  # (tag, M) -> [M * B, ...] standard normal
    beta: float
    host_t: Tensor | None = None  # t where the host reads it without waiting for a device; none: t
    functions: Callable[[Tensor], tuple[Denoise, Reward]] | None = None  # both, for some rows; none: all have the same

    def take(self, rows: Tensor) -> Problem:
        """The problem of the samples ``rows [b]``, on the host, alone: with the random numbers that they have among all."""
        denoise, reward = self.functions(rows) if self.functions else (self.denoise, self.reward)
        there = ahead(rows, self.x.device)

        def noise(tag: str, particles: int) -> Tensor:
            return self.noise(tag, particles).view(particles, *self.x.shape)[:, there].flatten(0, 1)

        host_t = None if self.host_t is None else self.host_t[rows]
        return Problem(self.x[there], self.t[there], self.schedule, denoise, reward, noise, self.beta, host_t)


@dataclass(frozen=True)
class Estimate:
    """``score`` is s_r, ``x0`` the reference's Tweedie estimate at x_t, ``reward`` the mean reward at the end of the proxy; no grad."""

    score: Tensor  # [B, ...]
    x0: Tensor  # [B, ...]
    reward: Tensor  # [B]


class Estimator:
    """Base of the estimators, one a file. ``steps`` and ``particles`` are K and M where a config names none."""

    steps: ClassVar[int] = 1
    particles: ClassVar[int] = 1
    needs_reward_gradient: ClassVar[bool] = True
    gate: ClassVar[bool] = True
    """Whether ``drp.snr_gate`` has a use: it silences what is wrong where the posterior has many modes, and weakens what is not."""

    def __init__(self, config: DRP) -> None:
        self.config = config

    @classmethod
    def check(cls, steps: int, particles: int) -> None:
        """Raises ValueError, which names the key, for a K or M that makes no sense here."""

    def estimate(self, problem: Problem) -> Estimate:
        """The DRS at ``problem.x``, before gate and clip."""
        raise NotImplementedError


def estimate(config: DRP, problem: Problem) -> Estimate:
    """The DRS by the configured estimator, before gate and clip."""
    estimator: Estimator = registry.find("drs", config.estimator)(config)
    return estimator.estimate(replace(problem, t=problem.t.clamp(max=LATEST)))


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
    x = chain(problem, repeat(problem.x, particles), repeat(x0.detach(), particles), times, particles, eta)
    return problem.denoise(x, repeat(times[-1], particles)) if steps > 1 else repeat(x0.detach(), particles)


def chain(problem: Problem, x: Tensor, x0: Tensor, times: Sequence[Tensor], particles: int, eta: float) -> Tensor:
    """Particles ``[M * B, ...]`` at the last of ``times``, from those at the first and their ``x0``; evaluates at the times between."""
    for k, pair in enumerate(pairwise(times), start=1):
        before, now = (repeat(t, particles) for t in pair)
        x0 = problem.denoise(x, before) if k > 1 else x0
        x = step(problem.schedule, x, x0, before, now, eta, problem.noise(f"drp/{k}", particles) if eta > 0 else None)
    return x


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


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample ``[B]``."""
    return (a * b).flatten(1).sum(1)


def bounded_tilt(problem: Problem, x0: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """``r [N]`` and ``grad r / beta`` at ``x0 [N, ...]``, the latter scaled down to a norm of at most ``limit [N, 1, ...]``."""
    reward, gradient = reward_gradient(problem, x0)
    tilt = gradient / problem.beta
    return reward, tilt * (limit / expand(tilt.flatten(1).norm(dim=1), tilt).clamp_min(1e-30)).clamp_max(1)
