"""The `hybrid` estimator of the Diffused Reward Score: `shift`, and what a shift leaves over, by weighted chains.

Nothing is differentiated but the reward. Derived for this project (docs/method.md) from facts about the reference's posterior
``p(x0 | x_t) ∝ p(x0) q(x_t | x0)``, each exact:

1. *Tilting is shifting* (shift.py). So ``s_r`` is the shift's own score, ``(D(x_t + kappa b) - D(x_t)) / kappa``, ``b = tau g``, and the
   DRS of the rest ``rho = r / beta - b.x0`` at the shifted point. A constant reward has neither, a linear one no rest.
2. *Any level serves.* With ``a = alpha_t/alpha_s``, ``v = sigma_t^2 - a^2 sigma_s^2``, ``y = x_s + u S_s(x_s)``, ``S_s`` the reference's
   score: the DRS of rho is ``a / (v + a^2 u) {E*[y] - E[y] + u E*[s_rho(x_s)]}`` for every ``u``, E* over the tilted and E over the plain
   ``p(x_s | x_t)``, both at the shifted point (denoising and target score identities mixed; the latter is arXiv 2402.08667). So chains
   stop at a level s where one mode is left and fact 1 gives ``s_rho(x_s)`` per particle: a gradient below s, weights above.
3. *Within one mode, y is constant* when u is its variance: weights then add no noise but that of choosing among modes. u is regressed.
4. *Chains from M shifts* ``l_m g``, ``0 <= l_m < 1``, reach the modes that the tilt may choose; each is weighted over the mixture of all
   (balance heuristic). Normalisers follow from ``d log Z / dl = g.D(x_t + l kappa g)``, whose values are the chains' first evaluations.
5. *E[y] is known*, being linear in the shifted point and its ``D``; and the same particles estimate it, too. Beside the known one, strong
   tilts have little noise and weak ones that of y. Beside the estimate, noise falls with rho, but the particles must have met every
   mode. The two are blended by how far the reward bends over the shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.diffusion.noise import ahead
from didr_core.diffusion.schedule import coeffs_like, expand, time_at
from didr_core.drs.problem import Estimate, Estimator, Problem, bounded_tilt, chain, dot, repeat, weights_like
from didr_core.drs.shift import shifted

STRONG = 0.5  # nats of bend at which both values of E[y] count alike


class Hybrid(Estimator):
    """``steps`` K from t to the time where sigma / alpha is ``split_noise``, ``particles`` M. At and below it: `shift` alone."""

    steps, particles = 2, 2
    gate = False

    def estimate(self, problem: Problem) -> Estimate:
        times = (problem.t if problem.host_t is None else problem.host_t).cpu()
        above = times > time_at(problem.schedule, self.config.split_noise)
        if above.all():
            return self._with_rest(problem)
        if not above.any():
            return self._shift(problem)
        late, early = (mask.nonzero().flatten() for mask in (above, ~above))
        parts = vars(self._with_rest(problem.take(late))), vars(self._shift(problem.take(early)))
        order = ahead(torch.cat([late, early]).argsort(), problem.x.device)
        return Estimate(**{key: torch.cat([part[key] for part in parts])[order] for key in parts[0]})

    def _shift(self, problem: Problem) -> Estimate:
        """For samples at or below the split level."""
        return shifted(problem, self.config.reach).estimate

    @torch.no_grad()
    def _with_rest(self, problem: Problem) -> Estimate:
        """For samples above the split level."""
        m, k, x_t = self.config.particles, self.config.steps, problem.x
        level = torch.full_like(problem.t, time_at(problem.schedule, self.config.split_noise))
        alpha_t, sigma_t = coeffs_like(problem.schedule, problem.t, x_t)
        alpha_s, sigma_s = coeffs_like(problem.schedule, level, x_t)
        kappa_t, kappa_s = sigma_t**2 / alpha_t, sigma_s**2 / alpha_s
        shift = shifted(problem, self.config.reach, wary=True)
        gradient, base = shift.gradient, shift.share * shift.gradient

        places = (torch.arange(m, device=x_t.device, dtype=x_t.dtype) + 0.5) / m
        shares = places[:, None] * shift.trust  # l_m [M, B]
        proposed = weights_like(shares, x_t) * gradient  # [M, B, ...]
        start = (x_t + kappa_t * proposed).flatten(0, 1)
        first = problem.denoise(start, repeat(problem.t, m))
        times = [problem.t + (level - problem.t) * (i / k) for i in range(k)]
        end = chain(problem, start, first, [*times, level], m, eta=1.0)
        # the bridge q(x_s | x0, x_t) hangs on x_t: a shift by kappa_t b there is one by kappa_s b here
        x_s = end + (kappa_s * (base - proposed)).flatten(0, 1)

        s, base_m = repeat(level, m), repeat(base, m)
        x0 = problem.denoise(x_s, s)
        reward, local = bounded_tilt(problem, x0, repeat(self.config.reach * alpha_s / sigma_s, m))
        local = local - base_m  # grad rho
        moved = problem.denoise(x_s + repeat(kappa_s, m) * local, s) - x0  # kappa_s s_rho(x_s), by fact 1
        within = dot(local, moved)
        log_h = reward / problem.beta - dot(base_m, x0) + 0.5 * within  # log E[exp(rho) | x_s], to second order

        further = shares - shift.share.flatten()  # [M, B] of proposal m's shift than the base
        linear = dot(repeat(gradient, m), x0).view(m, -1)
        width = within / dot(local, local).clamp_min(1e-30)  # posterior variance along grad rho at x_s
        square = dot(gradient, gradient) * width.view(m, -1)
        log_z = _log_normalisers(gradient, shift.estimate.x0, first.view(proposed.shape), shares)
        log_q = (further[:, None] * linear + 0.5 * further[:, None] ** 2 * square - log_z[:, None]).logsumexp(0)
        tilted = weights_like(torch.softmax(log_h.view(m, -1) - log_q, 0), x_t)
        plain = weights_like(torch.softmax(-log_q, 0), x_t)

        points, x0 = x_s.view(proposed.shape), x0.view(proposed.shape)
        scores = (alpha_s * x0 - points) / sigma_s**2
        u = torch.maximum(_mode_variance(points, scores), sigma_s**2)
        y = points + u * scores
        a = alpha_t / alpha_s
        v = sigma_t**2 - a**2 * sigma_s**2
        origin = x_t + kappa_t * base
        known = (a * sigma_s**2 * origin + alpha_s * v * shift.x0 + u * a * (alpha_t * shift.x0 - origin)) / sigma_t**2
        against_known = (tilted * y).sum(0) - known
        against_plain = ((tilted - plain) * y).sum(0) * (m / max(m - 1, 1))
        choice = torch.lerp(against_known, against_plain, expand(1 / (1 + (shift.bend / STRONG) ** 2), x_t))
        pull = (tilted * moved.view(proposed.shape)).sum(0) / kappa_s
        rest = a / (v + a**2 * u) * (choice + u * pull)
        return Estimate(shift.estimate.score + rest, shift.estimate.x0, reward.view(m, -1).mean(0))


def _log_normalisers(gradient: Tensor, first: Tensor, tilted: Tensor, shares: Tensor) -> Tensor:
    """``log Z [M, B]`` of the M proposals: the trapezium rule over ``d log Z / dl``, from l = 0."""
    slopes = torch.stack([dot(gradient, d) for d in (first, *tilted)])  # [M + 1, B]
    nodes = torch.cat([torch.zeros_like(shares[:1]), shares])
    return torch.cumsum(0.5 * (slopes[1:] + slopes[:-1]) * nodes.diff(dim=0), 0)


def _mode_variance(x: Tensor, scores: Tensor) -> Tensor:
    """``u [B, 1, ...]`` least squares of ``x = const - u S`` over particles ``[M, B, ...]``: the variance, were there one Gaussian mode."""
    x, scores = x - x.mean(0), scores - scores.mean(0)
    product = (x * scores).sum(0).flatten(1).sum(1)
    return expand(-product / scores.square().sum(0).flatten(1).sum(1).clamp_min(1e-12), x[0])
