"""``s_r = (1/beta) J_D^T sum_m w_m grad r(x0^m)``: M ancestral (eta = 1) chains, ``w = softmax(r / beta)``, one Jacobian."""

from __future__ import annotations

from didr_core.drs.problem import (
    Estimate,
    Estimator,
    Problem,
    first_call,
    particle_weights,
    pull_back,
    reward_gradient,
    rollout,
    weights_like,
)


class Stochastic(Estimator):
    """Averages the reward's gradient over the tilted particles."""

    steps, particles = 8, 8

    def estimate(self, problem: Problem) -> Estimate:
        m = self.config.particles
        x, first = first_call(problem)
        reward, gradient = reward_gradient(problem, rollout(problem, first, self.config.steps, m, eta=1.0))
        reward, weights = particle_weights(reward, m, problem.beta)
        mean = (weights_like(weights, problem.x) * gradient.view(m, *problem.x.shape)).sum(0)
        return Estimate(pull_back(x, first, mean) / problem.beta, first.detach(), reward.mean(0))
