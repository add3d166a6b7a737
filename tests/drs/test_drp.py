"""The estimators against exact answers: a Gaussian reference, whose posterior and tilted scores are known in closed form."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from didr_core import drs
from didr_core.config import DRP, load, registry
from didr_core.diffusion.schedule import VariancePreserving, coeffs_like
from didr_core.types import DIDRError

ROOT = Path(__file__).resolve().parents[2]
VARIANCE, SLOPE, BETA = 0.49, 0.8, 0.7
SCHEDULE = VariancePreserving.scaled_linear()


def exact_denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = coeffs_like(SCHEDULE, t, x)
    return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x


def exact_drs(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[exp(a x0 / beta) | x_t] is exp of the posterior mean plus a constant, so s_r = (a / beta) dD/dx."""
    alpha, sigma = coeffs_like(SCHEDULE, t, x)
    return torch.ones_like(x) * SLOPE / BETA * alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)


def problem(batch: int, t: float, seed: int = 0, dims: int = 4) -> drs.Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dims, generator=generator)
    return drs.Problem(
        x=x,
        t=torch.full((batch,), t),
        schedule=SCHEDULE,
        denoise=exact_denoiser,
        reward=lambda x0: SLOPE * x0.sum(1),
        noise=lambda tag, m: torch.randn(m * batch, dims, generator=generator),
        beta=BETA,
    )


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_tweedie_is_exact_for_a_gaussian_with_a_linear_reward(t: float) -> None:
    p = problem(8, t)
    got = drs.estimate(DRP(estimator="tweedie"), p)
    assert torch.allclose(got.score, exact_drs(p.x, p.t), rtol=1e-4)
    assert torch.allclose(got.x0, exact_denoiser(p.x, p.t))


@pytest.mark.parametrize("t", [0.4, 0.9])
def test_stochastic_is_exact_for_a_linear_reward_whatever_its_particles(t: float) -> None:
    p = problem(8, t)
    got = drs.estimate(DRP(estimator="stochastic", steps=4, particles=3), p)
    assert torch.allclose(got.score, exact_drs(p.x, p.t), rtol=1e-4)


def test_ode_overshoots_at_high_noise_and_truncated_does_not() -> None:
    """Measured in math.md section 3: more deterministic steps are not less bias."""
    p = problem(8, 0.98)
    exact = exact_drs(p.x, p.t)
    assert (drs.estimate(DRP(estimator="ode", steps=32), p).score / exact).mean() > 3
    assert torch.allclose(drs.estimate(DRP(estimator="truncated", steps=8), p).score, exact, rtol=1e-4)


def test_importance_converges_to_the_exact_score_as_particles_and_steps_grow() -> None:
    errors = []
    for particles, steps in [(4, 4), (64, 32), (1024, 256)]:
        p = problem(128, 0.7, dims=1)
        exact = exact_drs(p.x, p.t)
        got = drs.estimate(DRP(estimator="importance", steps=steps, particles=particles), p).score
        errors.append(((got - exact).mean() / exact.mean()).abs().item())
    assert errors[-1] < 0.05 and errors[-1] < errors[0], errors


def test_importance_needs_no_gradient_of_the_reward() -> None:
    p = problem(4, 0.6)
    black_box = drs.Problem(
        **{**vars(p), "reward": lambda x0: torch.tensor([math.copysign(1, float(v)) for v in x0.detach()[:, 0]])}
    )
    got = drs.estimate(DRP(estimator="importance", steps=4, particles=16), black_box)
    assert torch.isfinite(got.score).all() and got.score.abs().max() > 0
    with pytest.raises(RuntimeError):
        drs.estimate(DRP(estimator="tweedie"), black_box)


@pytest.mark.parametrize("estimator,steps", [("tweedie", 1), ("ode", 3)])
def test_gradients_equal_finite_differences(estimator: str, steps: int) -> None:
    """Nonlinear denoiser and reward in float64: s_r is the derivative of reward(proxy) / beta."""
    torch.manual_seed(0)
    mix = torch.randn(3, 3, dtype=torch.float64)

    class Exact(VariancePreserving):
        def coeffs(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            abar = self.alphas_cumprod[self.index(t)]
            return abar.sqrt(), (1 - abar).sqrt()

    schedule = Exact.scaled_linear()
    x = torch.randn(1, 3, dtype=torch.float64)
    base = problem(1, 0.5, dims=3)
    fields = {
        **vars(base),
        "schedule": schedule,
        "denoise": lambda x, t: torch.tanh(x @ mix),
        "reward": lambda x0: x0.pow(3).sum(1),
    }
    config = DRP(estimator=estimator, steps=steps)  # type: ignore[arg-type]
    got = drs.estimate(config, drs.Problem(**{**fields, "x": x})).score
    h = 1e-5
    for i in range(3):
        shift = torch.zeros_like(x)
        shift[0, i] = h
        up = drs.estimate(config, drs.Problem(**{**fields, "x": x + shift})).reward
        down = drs.estimate(config, drs.Problem(**{**fields, "x": x - shift})).reward
        assert abs(((up - down) / (2 * h) / BETA).item() - got[0, i].item()) < 1e-6


@pytest.mark.parametrize("name", registry.names("drs"))
def test_an_estimator_costs_what_the_readme_says(name: str) -> None:
    """Denoiser calls by whether they are differentiated, and pictures rewarded, counted as they happen."""
    p, counted = problem(3, 0.7), {"differentiated": 0, "plain": 0, "rewarded": 0}

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        counted["differentiated" if torch.is_grad_enabled() else "plain"] += len(x)
        return exact_denoiser(x, t)

    def reward(x0: torch.Tensor) -> torch.Tensor:
        counted["rewarded"] += len(x0)
        return p.reward(x0)

    config = DRP(estimator=name) if name in ("tweedie", "shift") else DRP(estimator=name, steps=3, particles=2)
    drs.estimate(config, drs.Problem(**{**vars(p), "denoise": denoise, "reward": reward}))
    table = (ROOT / "didr_core" / "drs" / "README.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith(f"| `{name}.py`"))
    *_, denoiser, rewarded, _ = (cell.partition(";")[0].replace("M (", "M * (").strip() for cell in row.split("|"))
    said = [eval(part, {"K": config.steps, "M": config.particles}) for part in (*denoiser.split("/"), rewarded)]
    assert list(counted.values()) == [3 * calls for calls in said]


def test_the_estimator_in_the_readme_serves_from_its_file(tmp_path: Path) -> None:
    """README of didr_core/drs: one file, named by its path, with its own default of M and its own refusal."""
    source = re.search(r"```python\n(.*?)```", (ROOT / "didr_core" / "drs" / "README.md").read_text(), re.DOTALL)
    assert source
    file = tmp_path / "control.py"
    file.write_text(source[1])
    config = load("exact_2d", [f"drp.estimator={file}:ControlVariate", "train.steps=2", "train.batch=8"])
    assert config.drp.particles == 8 and config.drp.steps == 8
    p = problem(256, 0.6, dims=1)
    got = drs.estimate(config.drp.model_copy(update={"steps": 128, "particles": 256}), p).score
    assert ((got - exact_drs(p.x, p.t)).mean() / exact_drs(p.x, p.t).mean()).abs() < 0.1
    with pytest.raises(DIDRError, match="needs at least 2"):
        load("exact_2d", [f"drp.estimator={file}:ControlVariate", "drp.particles=1"])
