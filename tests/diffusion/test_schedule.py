"""Schedules against diffusers' own, and identities that hold for every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from didr_core.algorithms.losses import denoising_score_matching
from didr_core.diffusion.schedule import (
    RectifiedFlow,
    VariancePreserving,
    chain_times,
    coeffs_like,
    diffuse,
    step,
)
from didr_core.types import Schedule

FAMILIES = [VariancePreserving.scaled_linear(), RectifiedFlow(), RectifiedFlow(3.0)]


def test_alphas_are_those_class_of() -> None:
    from diffusers import DDIMScheduler

    ours = VariancePreserving.scaled_linear().alphas_cumprod
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.allclose(ours.float(), theirs, rtol=1e-5)
    assert abs(ours[399].item() - 0.426086) < 1e-5


@given(st.integers(0, 999))
def test_every_row_is_found_at_its_time(index: int) -> None:
    schedule = FAMILIES[0]
    assert isinstance(schedule, VariancePreserving)
    assert schedule.index(torch.tensor([index / 1000])).item() == index


@pytest.mark.parametrize("schedule", FAMILIES)
@given(t=st.floats(0.05, 0.95), s=st.floats(0.01, 0.99))
def test_a_ddim_step_with_the_true_x0_lands_on_the_same_path(schedule: Schedule, t: float, s: float) -> None:
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    now, then = torch.full((2,), t), torch.full((2,), t * s)
    moved = step(schedule, diffuse(schedule, x0, eps, now), x0, now, then)
    assert torch.allclose(moved, diffuse(schedule, x0, eps, then), atol=1e-4)


@pytest.mark.parametrize("schedule", FAMILIES)
def test_an_ancestral_step_keeps_the_marginal_variance(schedule: Schedule) -> None:
    """x0 = 0 known: x_t ~ N(0, sigma_t^2), so x_s ~ N(0, sigma_s^2)."""
    torch.manual_seed(0)
    n = 200_000
    t, s = torch.full((n,), 0.8), torch.full((n,), 0.3)
    zero = torch.zeros(n, 1)
    x = diffuse(schedule, zero, torch.randn(n, 1), t)
    moved = step(schedule, x, zero, t, s, eta=1.0, noise=torch.randn(n, 1))
    assert abs(moved.std().item() / schedule.coeffs(s)[1][0].item() - 1) < 0.01


def test_a_chain_starts_at_t_and_never_evaluates_at_zero() -> None:
    times = chain_times(torch.tensor([0.8]), 4)
    assert [round(x.item(), 4) for x in times] == [0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("schedule", FAMILIES)
def test_the_assistants_loss_is_finite_at_both_ends(schedule: Schedule) -> None:
    """`times.assistant` is [0, 1] by default; a prediction of eps that is wrong by 1 must cost about as much at t = 0 as elsewhere."""
    x0, t = torch.randn(2, 8), torch.tensor([0.0, 1.0])
    alpha, sigma = coeffs_like(schedule, t, x0)
    loss = denoising_score_matching(x0 + sigma / alpha.clamp_min(1e-3), x0, alpha, sigma)
    assert loss.isfinite().all() and loss[0] == pytest.approx(1, rel=1e-3) and sigma[1] >= 0.99
