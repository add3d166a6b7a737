"""``s_r = (1/beta) J_D^T grad r(D(x_t))``: the reward of the posterior mean, K = 1."""

from __future__ import annotations

from didr_core.drs.problem import Estimate, Estimator, Problem, first_call, pull_back, reward_gradient


class Tweedie(Estimator):
    """One call of the reference, differentiated."""

    @classmethod
    def check(cls, steps: int, particles: int) -> None:
        """Raises ValueError: more than one step."""
        if steps != 1:
            raise ValueError(f"drp.steps={steps}: tweedie is one step; use ode or truncated for K > 1, or drp.steps=1")

    def estimate(self, problem: Problem) -> Estimate:
        x, x0 = first_call(problem)
        reward, gradient = reward_gradient(problem, x0)
        return Estimate(pull_back(x, x0, gradient) / problem.beta, x0.detach(), reward)
