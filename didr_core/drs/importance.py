"""``s_r = (alpha/sigma^2)(E_tilted[x0|x_t] - E_ref[x0|x_t])`` over M ancestral particles: no gradient of the reward (a Stein identity).

Estimated as ``(alpha/sigma^2) (sum_m w_m x0^m - mean_m x0^m) M/(M-1)``, ``w = softmax(r / beta)``.
"""

from __future__ import annotations

import torch

from didr_core.diffusion.schedule import coeffs_like
from didr_core.drs.problem import Estimate, Estimator, Problem, particle_weights, rollout, weights_like


class Importance(Estimator):
    """Serves black boxes: only values of the reward are asked for."""

    steps, particles = 8, 8
    needs_reward_gradient = False
    gate = False

    @classmethod
    def check(cls, steps: int, particles: int) -> None:
        """Raises ValueError: particles that cannot differ, or nothing to compare."""
        if particles < 2:
            raise ValueError(f"drp.particles={particles}: importance compares particles, so it needs at least 2")
        if steps < 2:
            raise ValueError(
                f"drp.steps={steps}: with one step all particles of importance are equal; use drp.steps >= 2"
            )

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Estimate:
        m = self.config.particles
        first = problem.denoise(problem.x, problem.t)
        particles = rollout(problem, first, self.config.steps, m, eta=1.0)
        reward, weights = particle_weights(problem.reward(particles), m, problem.beta)
        x0 = particles.view(m, *problem.x.shape)
        alpha, sigma = coeffs_like(problem.schedule, problem.t, problem.x)
        tilt = (weights_like(weights, problem.x) * x0).sum(0) - x0.mean(0)
        return Estimate(alpha / sigma**2 * tilt * (m / (m - 1)), first, reward.mean(0))
