"""Estimators of the Diffused Reward Score ``s_r(x_t) = grad_{x_t} log E_{x0 ~ p_ref(x0|x_t)} exp(r(x0) / beta)``.

One function each, one interface: a :class:`Problem` in, an :class:`Estimate` out. The first denoiser evaluation at ``x_t`` is the
reference's own ``D~_ref(x_t)`` and is handed back, so that the matching gradient costs no further one.

| estimator | formula | denoiser calls with / without backward | reward calls |
|---|---|---|---|
| tweedie | ``(1/beta) J_D^T grad r(D(x_t))`` | 1 / 0 | 1 |
| ode | ``(1/beta) grad_{x_t} r(ODE_K(x_t))``, the paper's proxy | K / 0 | 1 |
| truncated | ``(1/beta) J_D^T grad r(x0^K)`` | 1 / K - 1 | 1 |
| stochastic | ``(1/beta) J_D^T sum_m w_m grad r(x0^m)``, eta = 1 chains, ``w = softmax(r / beta)`` | 1 / M (K - 1) | M |
| importance | ``(alpha/sigma^2) (sum_m w_m x0^m - mean_m x0^m) M/(M-1)``, no gradient of the reward | 0 / 1 + M (K - 1) | M |
| hybrid | M weighted eta = 1 chains from shifted x_t, gradient at their end (:mod:`didr_core.drs.hybrid`) | 0 / 1 + M (K + 2) | 1 + M |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from didr_core.config import DRP
from didr_core.diffusion.schedule import chain_times, coeffs_like, step
from didr_core.drs.hybrid import hybrid
from didr_core.drs.problem import Estimate as Estimate
from didr_core.drs.problem import Problem as Problem
from didr_core.drs.problem import repeat, reward_gradient, weights_like


def estimate(config: DRP, problem: Problem) -> Estimate:
    """The DRS by the configured estimator, before gate and clip."""
    return ESTIMATORS[config.estimator](config, problem)


def _first(problem: Problem) -> tuple[Tensor, Tensor]:
    """``x_t`` as a leaf and ``D(x_t)`` with its graph."""
    with torch.enable_grad():
        x = problem.x.detach().requires_grad_()
        return x, problem.denoise(x, problem.t)


def _pull_back(x: Tensor, x0: Tensor, vector: Tensor) -> Tensor:
    """``J_D^T vector``."""
    (gradient,) = torch.autograd.grad(x0, x, vector)
    return gradient


@torch.no_grad()
def _rollout(problem: Problem, x0: Tensor, steps: int, particles: int, eta: float) -> Tensor:
    """From ``x_t`` and its Tweedie estimate, K - 1 further evaluations to clean latents ``[M * B, ...]``."""
    times = chain_times(problem.t, steps)
    x, x0_hat = repeat(problem.x, particles), repeat(x0.detach(), particles)
    for k in range(1, steps):
        now, before = repeat(times[k], particles), repeat(times[k - 1], particles)
        noise = problem.noise(f"drp/{k}", particles) if eta > 0 else None
        x = step(problem.schedule, x, x0_hat, before, now, eta, noise)
        x0_hat = problem.denoise(x, now)
    return x0_hat


def tweedie(config: DRP, problem: Problem) -> Estimate:
    """K = 1: the reward of the posterior mean."""
    x, x0 = _first(problem)
    reward, gradient = reward_gradient(problem, x0)
    return Estimate(_pull_back(x, x0, gradient) / problem.beta, x0.detach(), reward)


def ode(config: DRP, problem: Problem) -> Estimate:
    """The paper's proxy: K deterministic steps, differentiated through all of them."""
    x, first = _first(problem)
    times = chain_times(problem.t, config.steps)
    with torch.enable_grad():
        x_k, x0 = x, first
        for k in range(1, config.steps):
            x_k = step(problem.schedule, x_k, x0, times[k - 1], times[k])
            x0 = problem.denoise(x_k, times[k])
    reward, gradient = reward_gradient(problem, x0)
    return Estimate(_pull_back(x, x0, gradient) / problem.beta, first.detach(), reward)


def truncated(config: DRP, problem: Problem) -> Estimate:
    """K deterministic steps without grad, pulled back through the first Jacobian alone: constant memory in K."""
    x, first = _first(problem)
    reward, gradient = reward_gradient(problem, _rollout(problem, first, config.steps, 1, eta=0.0))
    return Estimate(_pull_back(x, first, gradient) / problem.beta, first.detach(), reward)


def stochastic(config: DRP, problem: Problem) -> Estimate:
    """M ancestral particles, softmax weights, pulled back through the first Jacobian."""
    x, first = _first(problem)
    particles = _rollout(problem, first, config.steps, config.particles, eta=1.0)
    reward, gradient = reward_gradient(problem, particles)
    reward, weights = _weights(reward, config.particles, problem.beta)
    mean = (weights_like(weights, problem.x) * gradient.view(config.particles, *problem.x.shape)).sum(0)
    return Estimate(_pull_back(x, first, mean) / problem.beta, first.detach(), reward.mean(0))


@torch.no_grad()
def importance(config: DRP, problem: Problem) -> Estimate:
    """Stein/covariance identity ``s_r = (alpha/sigma^2)(E_tilted[x0|x_t] - E_ref[x0|x_t])`` over M ancestral particles."""
    first = problem.denoise(problem.x, problem.t)
    m = config.particles
    particles = _rollout(problem, first, config.steps, m, eta=1.0)
    reward, weights = _weights(problem.reward(particles), m, problem.beta)
    x0 = particles.view(m, *problem.x.shape)
    alpha, sigma = coeffs_like(problem.schedule, problem.t, problem.x)
    tilt = (weights_like(weights, problem.x) * x0).sum(0) - x0.mean(0)
    return Estimate(alpha / sigma**2 * tilt * (m / (m - 1)), first, reward.mean(0))


def _weights(reward: Tensor, particles: int, beta: float) -> tuple[Tensor, Tensor]:
    """``[M * B] -> rewards [M, B], softmax weights over particles [M, B]``."""
    reward = reward.view(particles, -1)
    return reward, torch.softmax(reward / beta, 0)


ESTIMATORS: dict[str, Callable[[DRP, Problem], Estimate]] = {
    "tweedie": tweedie,
    "ode": ode,
    "truncated": truncated,
    "stochastic": stochastic,
    "importance": importance,
    "hybrid": hybrid,
}
