"""The clamp between pictures and rewards."""

from __future__ import annotations

import torch

from didr_core.diffusion.sampling import clamp_to_rewards


def test_a_saturated_pixel_comes_back_and_is_drawn_no_further() -> None:
    pixels = torch.tensor([-0.5, -0.5, 0.0, 0.3, 0.3, 1.0, 1.5, 1.5], requires_grad=True)
    pull = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])  # the reward's gradient: uphill
    clamped = clamp_to_rewards(pixels)
    assert torch.allclose(clamped, pixels.detach().clamp(0, 1))
    (gradient,) = torch.autograd.grad((pull * clamped).sum(), pixels)
    assert gradient.tolist() == [1, 0, 0, 1, -1, 0, 0, -1]
    assert not clamp_to_rewards(pixels.detach()).requires_grad


def test_a_reward_of_brightness_ends_at_white() -> None:
    """One pixel, N(0, 1) tilted by exp(3 clamp(x)), by Langevin steps: the mean is that of the law itself, by quadrature."""
    grid = torch.linspace(-8, 8, 4001)
    weight = (-0.5 * grid**2 + 3 * grid.clamp(0, 1)).exp()
    true = ((grid * weight).sum() / weight.sum()).item()

    def mean(slope: float) -> float:
        generator, x = torch.Generator().manual_seed(0), torch.ones(4000)
        for _ in range(300):
            leaf = x.requires_grad_()
            (gradient,) = torch.autograd.grad(slope * clamp_to_rewards(leaf).sum(), leaf)
            x = (x + 0.05 * (gradient - x) + 0.1**0.5 * torch.randn(4000, generator=generator)).detach()
        return x.mean().item()

    assert abs(mean(3.0) - true) < 0.3 and true < 1.1, "an identity would end at 3; below 0 it is one"
