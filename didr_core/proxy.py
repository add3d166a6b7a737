"""What an estimator of the Diffused Reward Score is told, is given and gives back, and the steps that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from didr_core.components import Strict
from didr_core.contracts import Schedule

# K and M where a config names none: at most 64 denoiser calls a sample
STEPS_AND_PARTICLES = {
    "tweedie": (1, 1),
    "ode": (4, 1),
    "truncated": (4, 1),
    "stochastic": (8, 8),
    "importance": (8, 8),
    "hybrid": (6, 7),
}


class DRP(Strict):
    """The diffused reward proxy: how s_r is estimated (docs/method.md)."""

    estimator: Literal["tweedie", "ode", "truncated", "stochastic", "importance", "hybrid"] = "hybrid"
    beta: float = Field(
        1.0, gt=0, description="reward-tilt temperature, in standard deviations of the starting generator's reward"
    )
    steps: int = Field(ge=1, description="K, denoising steps from x_t to x0; default by estimator")
    particles: int = Field(ge=1, description="M, for stochastic, importance and hybrid; default by estimator")
    split: float = Field(
        0.2, gt=0, lt=1, description="hybrid: time at and below which the posterior is taken to have one mode"
    )
    reach: float = Field(5.0, gt=0, description="hybrid: longest shift of x_t, in standard deviations of its noise")
    guidance: float | None = Field(None, ge=0, description="guidance scale inside the proxy; none = the reference's")
    snr_gate: bool = Field(False, description="multiply s_r by alpha_t^2: silent where the posterior has many modes")
    clip: float | None = Field(
        None,
        gt=0,
        description="cap of the rms of s_r per sample, as a multiple of the rms of the reference's own score",
    )
    checkpointing: bool = Field(False, description="ode: recompute each step in backward; memory of one step for any K")

    @model_validator(mode="before")
    @classmethod
    def _by_estimator(cls, given: dict[str, Any]) -> dict[str, Any]:
        steps, particles = STEPS_AND_PARTICLES.get(given.get("estimator", "hybrid"), (1, 1))
        return {"steps": steps, "particles": particles} | given

    @model_validator(mode="after")
    def _consistent(self) -> DRP:
        if self.estimator == "tweedie" and self.steps != 1:
            raise ValueError(
                f"drp.steps={self.steps}: tweedie is one step; use ode or truncated for K > 1, or drp.steps=1"
            )
        if self.estimator == "importance" and self.particles < 2:
            raise ValueError(f"drp.particles={self.particles}: importance compares particles, so it needs at least 2")
        if self.estimator == "importance" and self.steps < 2:
            raise ValueError(
                f"drp.steps={self.steps}: with one step all particles of importance are equal; use drp.steps >= 2"
            )
        return self


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
