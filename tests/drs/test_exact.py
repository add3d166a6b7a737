"""Where the answer is known: mixtures and the DRS against derivatives, estimators against both, the recipe end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from uneven_mixture import points, reward, uneven

from benchmarks import exactness
from benchmarks.exact_world import BatchNoise, batches
from benchmarks.exactness import World
from didr_core import config as configs
from didr_core import drs
from didr_core.backbones.gaussian_mixture import GaussianMixture
from didr_core.config import DRP, build
from didr_core.diffusion.mixtures import Mixture, Quadratic, diffused_reward_score
from didr_core.diffusion.schedule import Cosine, coeffs_like
from didr_core.export.sample import OneStep
from didr_core.train.__main__ import main

ALPHA, SIGMA = 0.6, 0.8
SCHEDULE = Cosine()


def test_score_and_denoiser_are_the_gradient_of_the_log_density() -> None:
    law, x = uneven(), points().requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x, ALPHA, SIGMA).sum(), x)
    x = x.detach()
    assert torch.allclose(law.score(x, ALPHA, SIGMA), gradient, atol=1e-12)
    assert torch.allclose((ALPHA * law.denoise(x, ALPHA, SIGMA) - x) / SIGMA**2, gradient, atol=1e-12)


def test_the_optimum_is_the_reference_times_the_tilt() -> None:
    law, x = uneven(), points(count=50)
    log_ratio = law.tilted(reward(), 0.7).log_prob(x) - law.log_prob(x) - reward()(x) / 0.7
    assert (log_ratio - log_ratio[0]).abs().max() < 1e-10
    with pytest.raises(ValueError, match="curvature=-9"):
        law.tilted(reward(curvature=-9.0), 0.7)


def test_exact_drs_is_the_gradient_of_the_log_expectation() -> None:
    """Against central differences of ``log E[exp(r / beta) | x_t]``, a difference of log-densities up to a constant."""
    law, beta, h = uneven(), 0.7, 1e-5
    star, x = law.tilted(reward(), beta), points()
    exact = diffused_reward_score(law, star, x, ALPHA, SIGMA)

    def log_expectation(x: Tensor) -> Tensor:
        return star.log_prob(x, ALPHA, SIGMA) - law.log_prob(x, ALPHA, SIGMA)

    for i in range(x.shape[1]):
        shift = torch.zeros_like(x)
        shift[:, i] = h
        difference = (log_expectation(x + shift) - log_expectation(x - shift)) / (2 * h)
        assert torch.allclose(difference, exact[:, i], atol=1e-7)


def problem(law: Mixture, value: Quadratic, beta: float, t: float, x: Tensor, draws: int = 1) -> drs.Problem:
    generator, x = torch.Generator().manual_seed(3), x.repeat(draws, 1)
    return drs.Problem(
        x=x,
        t=torch.full((len(x),), t, dtype=x.dtype),
        schedule=SCHEDULE,
        denoise=lambda x, t: law.denoise(x, *coeffs_like(SCHEDULE, t, x)),
        reward=value,
        noise=lambda tag, m: torch.randn(m * len(x), x.shape[1], generator=generator, dtype=x.dtype),
        beta=beta,
    )


def exact_at(law: Mixture, value: Quadratic, beta: float, t: float, x: Tensor) -> Tensor:
    alpha, sigma = coeffs_like(SCHEDULE, torch.full((len(x),), t, dtype=x.dtype), x)
    return diffused_reward_score(law, law.tilted(value, beta), x, alpha, sigma)


@pytest.mark.parametrize("estimator", ["tweedie", "hybrid"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_one_gaussian_and_a_linear_reward_are_exact(estimator: str, t: float) -> None:
    """Every weight may be random then: no draw may move the answer."""
    law = Mixture.equal(torch.tensor([[0.3, -0.2]], dtype=torch.float64), 0.7)
    value = Quadratic(torch.tensor([1.0, -2.0]).double(), torch.zeros(2).double())
    x = points(2)
    config = DRP(estimator=estimator, steps=1 if estimator == "tweedie" else 4, particles=5)  # type: ignore[arg-type]
    got = drs.estimate(config, problem(law, value, 0.8, t, x))
    assert torch.allclose(got.score, exact_at(law, value, 0.8, t, x), rtol=1e-6)
    assert torch.allclose(got.x0, law.denoise(x, *coeffs_like(SCHEDULE, torch.full((6,), t).double(), x)))


def test_below_the_split_many_modes_and_a_linear_reward_are_exact() -> None:
    """Tilting is shifting: two denoiser values, no derivative, no matter how many modes."""
    law, x = uneven(), points()
    value = reward(curvature=0.0)
    config = DRP(estimator="hybrid", steps=2, particles=2, split_noise=1.5, reach=1e9)
    got = drs.estimate(config, problem(law, value, 0.5, 0.6, x)).score
    assert torch.allclose(got, exact_at(law, value, 0.5, 0.6, x), rtol=1e-6)
    tweedie = drs.estimate(DRP(estimator="tweedie"), problem(law, value, 0.5, 0.6, x)).score
    assert (tweedie - got).norm() > 0.05 * got.norm()


def bias(config: DRP, t: float, beta: float = 1.0, draws: int = 200) -> float:
    world = World(2, beta)
    x0 = world.reference.sample(12, torch.Generator().manual_seed(4))
    alpha, sigma = coeffs_like(SCHEDULE, torch.full((12,), t), x0)
    x = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    mean = (
        drs.estimate(config, problem(world.reference, world.reward, beta, t, x, draws))
        .score.view(draws, *x.shape)
        .mean(0)
    )
    exact = world.drs(x, torch.full((12,), t))
    return ((mean - exact).norm() / exact.norm()).item()


def test_importance_loses_its_bias_as_particles_and_steps_grow() -> None:
    few = bias(DRP(estimator="importance", steps=4, particles=4), 0.7)
    many = bias(DRP(estimator="importance", steps=48, particles=96), 0.7, draws=24)
    assert many < 0.5 * few and many < 0.15, (few, many)


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_hybrid_is_near_the_exact_score_where_tweedie_is_not(t: float) -> None:
    hybrid, tweedie = bias(DRP(estimator="hybrid", steps=6, particles=7), t), bias(DRP(estimator="tweedie"), t, draws=1)
    assert hybrid < 0.25 and hybrid < 0.6 * tweedie, (hybrid, tweedie)


def test_hybrid_costs_what_the_table_says_and_differentiates_the_reward_alone() -> None:
    world, calls, steps, particles = World(2, 1.0), [0], 4, 5
    p = problem(world.reference, world.reward, 1.0, 0.7, torch.randn(3, 2))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        calls[0] += len(x)
        return p.denoise(x, t)

    drs.estimate(DRP(estimator="hybrid", steps=steps, particles=particles), replace(p, denoise=denoise))
    assert calls[0] / 3 == 3 + particles * (steps + 2)


def test_backbone_pictures_show_the_coordinates() -> None:
    world = World(64, 1.0)
    backbone: GaussianMixture = build("backbones", world.config().backbone)
    value = build("rewards", world.config().reward)
    x = torch.randn(5, 64)
    images = backbone.decode(x)
    assert images.shape == (5, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert torch.allclose(value.score(images, {}), world.reward(x), atol=1e-3)


def test_the_assistant_starts_as_the_reference() -> None:
    backbone: GaussianMixture = build("backbones", configs.load("exact_2d").backbone)
    x, t = torch.randn(4, 2), torch.rand(4)
    condition = backbone.encode(["a"] * 4)
    assistant, reference = (backbone.x0(backbone.load_network(r), x, t, condition) for r in ("assistant", "reference"))
    assert torch.equal(assistant, reference)


def test_a_benchmark_row_holds_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "start", lambda world: "null")
    file = tmp_path / "rows.json"
    arguments = [
        "--beta",
        "1",
        "--estimator",
        "exact",
        "tweedie",
        "--seeds",
        "1",
        "--updates",
        "2",
        "--json",
        str(file),
    ]
    monkeypatch.setattr(
        exactness,
        "pointwise",
        lambda *_, **__: [dict.fromkeys(("bias", "spread", "cosine", "calls", "seconds", "bytes"), 1.0)],
    )
    exactness.main([*arguments, "--seconds", "0"])
    assert not file.is_file(), "nothing new is begun after the time is up"
    exactness.main(arguments)
    rows = json.loads(file.read_text())
    assert [r["estimator"] for r in rows] == ["exact", "tweedie"]
    wanted = {
        "dim",
        "beta",
        "estimator",
        "seed",
        "distance",
        "reward",
        "reward_star",
        "off_support",
        "evaluations",
        "seconds",
    }
    assert all(wanted <= r.keys() for r in rows)
    monkeypatch.setattr(exactness, "train", lambda *_: pytest.fail("a row that is there was trained again"))
    exactness.main(arguments)


def test_batch_noise_is_seeded() -> None:
    index = next(batches(4, 1)).index
    assert torch.equal(BatchNoise(1).normal(index, (2,), "a"), BatchNoise(1).normal(index, (2,), "a"))
    assert not torch.equal(BatchNoise(1).normal(index, (2,), "a"), BatchNoise(2).normal(index, (2,), "a"))


def test_the_recipe_runs_and_its_export_samples(tmp_path: Path) -> None:
    sets = ["train.steps=3", "train.batch=8", "train.checkpoint_every=3", "evaluation.prompts=4", "evaluation.grid=2"]
    overrides = [a for s in [*sets, f"output={tmp_path}"] for a in ("--set", s)]
    assert main(["--recipe", "exact_2d", *overrides, "--output", str(tmp_path / "run")]) == 0
    export = tmp_path / "run" / "export"
    assert "not a diffusers pipeline" in (export / "README.md").read_text()
    assert OneStep(export).pictures(["a", "b"], [1, 2]).shape == (2, 3, 1, 2)
