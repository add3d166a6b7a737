"""The `hybrid` estimator of the Diffused Reward Score: gradients where the posterior has one mode, importance weights where it has many.

Nothing is differentiated but the reward. Derived for this project (docs/method.md) from four facts about the reference's posterior
``p(x0 | x_t) ∝ p(x0) q(x_t | x0)``, each exact:

1. *Tilting is shifting.* For a linear reward, ``p(x0 | x_t) exp(g.x0) = Z p(x0 | x_t + (sigma_t^2 / alpha_t) g)``, because q is Gaussian in
   x_t. So the reference, started from a shifted x_t, samples the tilted posterior itself, however many modes it has, and
   ``(alpha/sigma^2) (D(x_t + (sigma^2/alpha) g) - D(x_t))`` is the exact score; Tweedie's ``J_D^T g`` is its first-order term.
   Particles start from M shifts ``l_m g`` with ``0 < l_m < 1``, ``g = grad r(D(x_t)) / beta``, and the rest of the reward is weighted
   (multiple importance sampling with the balance heuristic). The normalisers follow from ``d log Z / dl = g.D(x_t + l (sigma^2/alpha) g)``,
   whose values are the chains' first evaluations.
2. *Any level serves.* With ``a = alpha_t/alpha_s``, ``b^2 = sigma_t^2 - a^2 sigma_s^2``, ``S_s`` the reference's score, for every ``u``:
   ``s_r(x_t) = k {E*[x_s + u S_s(x_s)] - E[x_s + u S_s(x_s)] + u E*[s_r(x_s)]}``, ``k = a / (b^2 + a^2 u)``, E* over the tilted and
   E over the plain ``p(x_s | x_t)`` (denoising and target score identities mixed; the latter is arXiv 2402.08667). So chains stop at a
   level s where one mode is left and fact 1 gives ``s_r(x_s)`` per particle: a gradient below s, importance weights above.
3. *Within one mode, x_s + u S_s is constant* when u is that mode's variance: weights then add no noise but that of choosing among modes.
   u is regressed from the particles.
4. The plain expectation is known: ``E[x_s | x_t]`` is linear in ``x_t`` and ``D(x_t)``, and ``E[S_s | x_t] = a S_t(x_t)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.diffusion.schedule import coeffs_like, expand, step
from didr_core.drs.problem import Calls, Estimate, Estimator, Problem, repeat, reward_gradient, weights_like


class Hybrid(Estimator):
    """``steps`` K from t to ``split``, ``particles`` M; ``reach`` bounds the shift in units of sigma_t."""

    steps, particles = 6, 7

    @classmethod
    def calls(cls, steps: int, particles: int) -> Calls:
        """The cost of one sample: chains, and two more calls at their ends."""
        return Calls(differentiated=0, plain=1 + particles * (steps + 2), rewarded=1 + particles)

    @torch.no_grad()
    def estimate(self, problem: Problem) -> Estimate:
        """See the module's docstring."""
        config = self.config
        x_t, m, schedule = problem.x, config.particles, problem.schedule
        level = problem.t.clamp(max=config.split)
        alpha_t, sigma_t = coeffs_like(schedule, problem.t, x_t)
        alpha_s, sigma_s = coeffs_like(schedule, level, x_t)
        first = problem.denoise(x_t, problem.t)
        _, gradient = reward_gradient(problem, first)
        gradient = gradient / problem.beta
        norm = expand(gradient.flatten(1).norm(dim=1), x_t) * sigma_t / alpha_t  # of the shift, in noise deviations
        gradient = gradient * (config.reach / norm.clamp_min(1e-12)).clamp_max(1)
        shares = (torch.arange(m, device=x_t.device, dtype=x_t.dtype) + 0.5) / m  # l_m
        shifts = weights_like(shares.view(m, 1), x_t) * (sigma_t**2 / alpha_t * gradient)  # [M, B, ...]

        start = repeat(x_t, m) + shifts.flatten(0, 1)
        tilted_first = problem.denoise(start, repeat(problem.t, m))
        log_z = _log_normalisers(gradient, first, tilted_first.view(m, *x_t.shape), shares)
        end = _chain(problem, start, tilted_first, level, config.steps, m)
        back = (alpha_t * sigma_s**2) / (
            alpha_s * sigma_t**2
        )  # of the bridge q(x_s | x0, x_t): the part that hangs on x_t
        x_s = end - (back * shifts).flatten(0, 1)

        s_m = repeat(level, m)
        alpha, sigma = coeffs_like(schedule, s_m, x_s)
        x0 = problem.denoise(x_s, s_m)
        reward, local = reward_gradient(problem, x0)
        local = local / problem.beta
        moved = problem.denoise(x_s + sigma**2 / alpha * local, s_m) - x0  # E*[x0 | x_s] - E[x0 | x_s] by fact 1
        log_h = reward / problem.beta + 0.5 * _dot(local, moved)  # log E[exp(r / beta) | x_s], to second order
        width = _dot(local, moved) / _dot(local, local).clamp_min(1e-12)  # posterior variance along the gradient at x_s
        linear = _dot(repeat(gradient, m), x0).view(m, -1)
        square = (_dot(repeat(gradient, m), repeat(gradient, m)) * width).view(m, -1)
        share = shares.view(m, 1, 1)
        log_q = (share * linear + 0.5 * share**2 * square - log_z[:, None]).logsumexp(
            0
        )  # mixture of proposals over the plain posterior
        weights = weights_like(torch.softmax(log_h.view(m, -1) - log_q, 0), x_t)

        particles = x_s.view(m, *x_t.shape)
        scores = ((alpha * x0 - x_s) / sigma**2).view(m, *x_t.shape)
        pulls = (alpha / sigma**2 * moved).view(m, *x_t.shape)  # s_r(x_s)
        u = torch.maximum(_mode_variance(particles, scores), sigma_s**2)
        a = alpha_t / alpha_s
        b2 = (sigma_t**2 - a**2 * sigma_s**2).clamp_min(0)
        plain = back * x_t + alpha_s * b2 / sigma_t**2 * first + u * a * (alpha_t * first - x_t) / sigma_t**2
        choice = (weights * (particles + u * scores)).sum(0) - plain
        below = expand(
            (problem.t > level).to(x_t.dtype), x_t
        )  # at or under the split level all particles are x_t: fact 1 alone
        drs = a / (b2 + a**2 * u) * (below * choice + u * (weights * pulls).sum(0))
        return Estimate(drs, first, reward.view(m, -1).mean(0))


def _chain(problem: Problem, x: Tensor, x0: Tensor, level: Tensor, steps: int, particles: int) -> Tensor:
    """K ancestral steps from t to ``level``, evenly spaced, ``x0`` being the prediction at the start: K - 1 further evaluations."""
    times = [repeat(problem.t + (level - problem.t) * (k / steps), particles) for k in range(steps)] + [
        repeat(level, particles)
    ]
    for k in range(steps):
        x = step(problem.schedule, x, x0, times[k], times[k + 1], 1.0, problem.noise(f"drp/{k}", particles))
        if k + 1 < steps:
            x0 = problem.denoise(x, times[k + 1])
    return x


def _log_normalisers(gradient: Tensor, first: Tensor, tilted: Tensor, shares: Tensor) -> Tensor:
    """``log Z [M, B]`` of the M proposals: the trapezium rule over ``d log Z / dl``, from l = 0."""
    slopes = torch.stack([_dot(gradient, d) for d in (first, *tilted)])  # [M + 1, B]
    nodes = torch.cat([shares.new_zeros(1), shares])
    return torch.cumsum(0.5 * (slopes[1:] + slopes[:-1]) * nodes.diff()[:, None], 0)


def _mode_variance(x: Tensor, scores: Tensor) -> Tensor:
    """``u [B, 1, ...]`` least squares of ``x = const - u S`` over particles ``[M, B, ...]``: the variance, were there one Gaussian mode."""
    x, scores = x - x.mean(0), scores - scores.mean(0)
    product = (x * scores).sum(0).flatten(1).sum(1)
    return expand(-product / scores.square().sum(0).flatten(1).sum(1).clamp_min(1e-12), x[0])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample ``[B]``."""
    return (a * b).flatten(1).sum(1)
