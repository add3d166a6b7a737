"""``s_r = (1/beta) J_D^T grad r(x0^K)``: K deterministic steps without grad, pulled back through the first Jacobian alone."""

from __future__ import annotations

from didr_core.drs.problem import Estimate, Estimator, Problem, first_call, pull_back, reward_gradient, rollout


class Truncated(Estimator):
    """Constant memory in K."""

    steps = 4

    def estimate(self, problem: Problem) -> Estimate:
        x, first = first_call(problem)
        reward, gradient = reward_gradient(problem, rollout(problem, first, self.config.steps, 1, eta=0.0))
        return Estimate(pull_back(x, first, gradient) / problem.beta, first.detach(), reward)
