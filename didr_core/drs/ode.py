"""``s_r = (1/beta) grad_{x_t} r(ODE_K(x_t))``, the paper's proxy: K deterministic steps, differentiated through all of them."""

from __future__ import annotations

import torch

from didr_core.diffusion.schedule import chain_times, step
from didr_core.drs.problem import Estimate, Estimator, Problem, first_call, pull_back, reward_gradient


class ODE(Estimator):
    """K calls of the reference, all differentiated: memory grows with K unless `drp.gradient_checkpointing`."""

    steps = 4

    def estimate(self, problem: Problem) -> Estimate:
        x, first = first_call(problem)
        times = chain_times(problem.t, self.config.steps)
        with torch.enable_grad():
            x_k, x0 = x, first
            for k in range(1, self.config.steps):
                x_k = step(problem.schedule, x_k, x0, times[k - 1], times[k])
                x0 = problem.denoise(x_k, times[k])
        reward, gradient = reward_gradient(problem, x0)
        return Estimate(pull_back(x, x0, gradient) / problem.beta, first.detach(), reward)
