"""`shift`, and `hybrid` as what a shift leaves over: closed forms in float64, under a variance-preserving schedule and rectified flow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from uneven_mixture import points, reward, uneven

from benchmarks.exactness import World
from didr_core import drs
from didr_core.config import DRP, registry
from didr_core.diffusion.mixtures import Mixture, Quadratic, diffused_reward_score
from didr_core.diffusion.schedule import Cosine, RectifiedFlow, VariancePreserving, coeffs_like, time_at
from didr_core.drs.shift import FOOLED, shifted
from didr_core.types import Schedule

SCHEDULES = [Cosine(), RectifiedFlow(), RectifiedFlow(shift=3.0)]
HYBRID = DRP(estimator="hybrid", steps=3, particles=4)


def problem(law: Mixture, value: Quadratic, beta: float, t: Tensor, x: Tensor, schedule: Schedule) -> drs.Problem:
    generator = torch.Generator().manual_seed(3)
    return drs.Problem(
        x=x,
        t=t,
        schedule=schedule,
        denoise=lambda x, t: law.denoise(x, *coeffs_like(schedule, t, x)),
        reward=value,
        noise=lambda tag, m: torch.randn(m * len(x), x.shape[1], generator=generator, dtype=x.dtype),
        beta=beta,
    )


def exact(law: Mixture, value: Quadratic, p: drs.Problem) -> Tensor:
    alpha, sigma = coeffs_like(p.schedule, p.t, p.x)
    return diffused_reward_score(law, law.tilted(value, p.beta), p.x, alpha, sigma)


def times(t: float, count: int = 6) -> Tensor:
    return torch.full((count,), t, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("config", [DRP(estimator="shift", reach=1e9), HYBRID.model_copy(update={"reach": 1e9})])
def test_a_linear_reward_is_exact_under_any_mixture(config: DRP, t: float, schedule: Schedule) -> None:
    """No derivative of the denoiser, and no draw moves the answer."""
    law, value = uneven(), reward(curvature=0.0)
    p = problem(law, value, 0.5, times(t), points(), schedule)
    assert torch.allclose(drs.estimate(config, p).score, exact(law, value, p), rtol=1e-9, atol=1e-12)
    tweedie = drs.estimate(DRP(estimator="tweedie"), p).score
    assert t < 0.5 or (tweedie - exact(law, value, p)).norm() > 1e-3 * tweedie.norm()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_secant_makes_a_quadratic_exact_on_a_gaussian(t: float, schedule: Schedule) -> None:
    law, value = Mixture.equal(torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64), 0.7), reward(curvature=0.6)
    p = problem(law, value, 0.2, times(t), points(), schedule)
    got = drs.estimate(DRP(estimator="shift", reach=1e9), p).score
    assert torch.allclose(got, exact(law, value, p), rtol=1e-9)
    tilt, (alpha, sigma) = shifted(p, 1e9), coeffs_like(schedule, p.t, p.x)
    whole = (p.denoise(p.x + sigma**2 / alpha * tilt.gradient, p.t) - tilt.estimate.x0) * alpha / sigma**2
    assert (tilt.share < 1).all() and (whole - exact(law, value, p)).norm() > 0.03 * whole.norm(), "it had work to do"


@pytest.mark.parametrize("estimator", ["shift", "hybrid"])
def test_a_constant_reward_has_no_tilt(estimator: str) -> None:
    law = Mixture.equal(torch.randn(8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0.5)
    p = problem(law, Quadratic(torch.zeros(64), torch.zeros(64)), 1.0, times(0.9), points(64), Cosine())
    p = replace(p, reward=lambda x: 0 * x.sum(1) + 3.0)
    assert drs.estimate(DRP(estimator=estimator), p).score.abs().max() == 0


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_the_error_of_hybrid_falls_with_the_tilt(t: float) -> None:
    """Root mean square over draws; its noise did not fall once, and was 2 to 5 times the score at beta 10."""
    world = World(2, 1.0)
    law, value, generator = world.reference.to(times(t)), world.reward, torch.Generator().manual_seed(5)
    alpha, sigma = Cosine().coeffs(times(t, 1))
    x = alpha * law.sample(600, generator) + sigma * torch.randn(600, 2, generator=generator)

    def error(beta: float) -> tuple[float, float]:
        p = problem(law, value, beta, times(t, 600), x, Cosine())
        want = exact(law, value, p)
        missed = (drs.estimate(DRP(estimator="hybrid"), p).score - want).square().mean().sqrt()
        return missed.item(), (missed / want.square().mean().sqrt()).item()

    strong, weak = error(10.0), error(100.0)
    assert strong[1] < 0.3 and weak[0] < 0.15 * strong[0]


def test_a_tangent_that_leads_to_another_mode_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 dimensions at high noise: the gradient at one mode promises 20 nats at the next, where the reward is no better."""
    world, t = World(1024, 10.0), times(0.9, 64)
    law, generator = world.reference.to(t), torch.Generator().manual_seed(2)
    alpha, sigma = Cosine().coeffs(times(0.9, 1))
    x = alpha * law.sample(64, generator) + sigma * torch.randn(64, 1024, generator=generator)
    p = problem(law, world.reward, 10.0, t, x, Cosine())
    want, errors = exact(law, world.reward, p), []
    for wary in (FOOLED, 0.0):
        monkeypatch.setattr("didr_core.drs.shift.FOOLED", wary)
        errors.append((drs.estimate(DRP(estimator="hybrid"), p).score - want).norm() / want.norm())
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("t", [0.15, 0.8])
def test_reach_bounds_every_shift(t: float) -> None:
    """Of x_t, and of the particles at the chains' end, however cold the tilt."""
    law, value = uneven(), reward()
    p, seen = problem(law, value, 0.01, times(t), points(), Cosine()), []
    tilt, longest = shifted(p, 2.0, wary=True), 2.0 * (1 + 1e-9)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return p.denoise(x, t)

    drs.estimate(DRP(estimator="hybrid", steps=2, particles=3, reach=2.0), replace(p, denoise=denoise))
    _, sigma = coeffs_like(p.schedule, p.t, p.x)
    shifts = [(x.view(-1, *p.x.shape) - p.x).norm(dim=-1) for x in seen[:3]]
    assert all((s <= longest * sigma[:, 0]).all() for s in shifts) and (shifts[1] > 1.9 * sigma[:, 0]).all()
    if t == 0.8:
        alpha, sigma = coeffs_like(p.schedule, torch.full_like(p.t, time_at(p.schedule, 0.45)), p.x)
        unmoved = seen[-2].view(3, *p.x.shape) - sigma**2 / alpha * tilt.share * tilt.gradient
        assert ((seen[-1].view(3, *p.x.shape) - unmoved).norm(dim=-1) <= longest * sigma[:, 0]).all()


def test_samples_below_the_split_cost_a_shift_alone_and_mix_with_others() -> None:
    law, value, counted = uneven(), reward(), [0]
    t = torch.tensor([0.7, 0.1, 0.5, 0.2, 0.05, 0.9], dtype=torch.float64)
    draws = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    p = replace(problem(law, value, 0.5, t, points(), Cosine()), noise=lambda tag, m: draws[:m].flatten(0, 1))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        counted[0] += len(x)
        return p.denoise(x, t)

    together = drs.estimate(HYBRID, replace(p, denoise=denoise))
    assert counted[0] == 3 * 3 + 3 * (3 + 4 * (3 + 2))
    for i in range(6):
        alone = drs.estimate(HYBRID, p.take(torch.tensor([i])))
        for key, value_of in vars(alone).items():
            assert torch.allclose(value_of[0], getattr(together, key)[i], rtol=1e-9)
    shift = drs.estimate(DRP(estimator="shift"), p).score
    assert torch.allclose(together.score[t <= 0.2], shift[t <= 0.2], rtol=1e-12)


def test_functions_that_know_their_samples_are_asked_for_some_of_them() -> None:
    p = problem(uneven(), reward(), 0.5, times(0.5), points(), Cosine())
    asked = []
    p = replace(p, functions=lambda rows: asked.append(rows.tolist()) or (p.denoise, p.reward))
    assert torch.equal(p.take(torch.tensor([4, 1])).x, p.x[[4, 1]]) and asked == [[4, 1]]


@pytest.mark.parametrize("schedule", [*SCHEDULES, VariancePreserving.scaled_linear()])
@pytest.mark.parametrize("noise", [0.325, 1.4])
def test_the_split_is_a_noise_level_in_every_schedule(schedule: Schedule, noise: float) -> None:
    level = torch.full((2,), time_at(schedule, noise))
    here, later = ((sigma / alpha)[0] for alpha, sigma in (schedule.coeffs(level), schedule.coeffs(level + 0.0015)))
    assert here <= noise < later


def test_guidance_inside_turns_a_tilt_round_and_none_keeps_its_direction() -> None:
    """docs/method.md: variances 1 without the prompt and 0.5 with it, r = x, beta 1, alpha = sigma, w = 8."""

    def posterior_mean(variance: float) -> drs.Denoise:
        law = Mixture.equal(torch.zeros(1, 1, dtype=torch.float64), variance**0.5)
        return lambda x, t: law.denoise(x, *coeffs_like(Cosine(), t, x))

    null, prompted, sharpened = (posterior_mean(v) for v in (1.0, 0.5, 1 / (8 / 0.5 - 7 / 1.0)))
    told: dict[str, drs.Denoise] = {
        "guided": lambda x, t: null(x, t) + 8 * (prompted(x, t) - null(x, t)),
        "prompted": prompted,
        "sharpened": sharpened,
    }
    p = problem(uneven(1), reward(1), 1.0, times(0.5), points(1), Cosine())
    p = replace(p, reward=lambda x: x.sum(1))
    tilts = {
        name: drs.estimate(DRP(estimator="tweedie"), replace(p, denoise=denoise)).score
        for name, denoise in told.items()
    }
    for name, value in {"guided": -1.1785, "prompted": 0.4714, "sharpened": 0.1414}.items():
        assert tilts[name].flatten().tolist() == pytest.approx([value] * 6, abs=1e-4)


@pytest.mark.parametrize("late", [0, 2, 6])
def test_no_value_of_the_device_decides_what_hybrid_does(late: int) -> None:
    """On meta, where reading one fails: as little does the host wait for a GPU."""
    t = torch.tensor([0.9] * late + [0.1] * (6 - late))
    p = problem(uneven(), reward(), 0.5, times(0.5), points(), VariancePreserving.scaled_linear())
    p = replace(
        p, x=points().to("meta"), t=t.to("meta"), host_t=t, denoise=lambda x, t: 1.0 * x, reward=lambda x: x.sum(1)
    )
    p = replace(p, noise=lambda tag, m: torch.empty(m * 6, 3, dtype=torch.float64, device="meta"))
    assert drs.estimate(HYBRID, p).score.shape == (6, 3)


@pytest.mark.parametrize("name", registry.names("drs"))
def test_pure_noise_of_rectified_flow_has_a_finite_score(name: str) -> None:
    """alpha is 0 at t = 1, and sigma^2 / alpha has no value there."""
    law, value = uneven(), reward()
    p = problem(law, value, 0.5, times(1.0), points(), RectifiedFlow())
    sizes = {} if name in ("tweedie", "shift") else {"steps": 3, "particles": 3}
    assert drs.estimate(DRP(estimator=name, **sizes), p).score.isfinite().all()
