"""What an estimator of the Diffused Reward Score is told, is given and gives back, and the steps that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def reward_gradient(problem: Problem, x0: Tensor) -> tuple[Tensor, Tensor]:
    """``r [N]`` and ``grad r`` at detached ``x0 [N, ...]``."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        reward = problem.reward(leaf)
        (gradient,) = torch.autograd.grad(reward.sum(), leaf)
    return reward.detach(), gradient


def repeat(values: Tensor, particles: int) -> Tensor:
    """``[B, ...] -> [M * B, ...]``, particle-major."""
    return values.repeat(particles, *([1] * (values.dim() - 1)))


def weights_like(weights: Tensor, x: Tensor) -> Tensor:
    """``[M, B] -> [M, B, 1, ...]``."""
    return weights.view(*weights.shape, *([1] * (x.dim() - 1)))
