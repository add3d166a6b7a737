"""Make pictures: one step of a generator, or N guided DDIM steps of the reference, from noise that every model shares.

The noise of a picture is keyed by (seed, position of its prompt in the list) and by nothing else, so that two models asked for the same
prompts and seed start from the same ``z`` whatever their batch size: comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from didr_core.diffusion.noise import Noise
from didr_core.diffusion.schedule import chain_times, expand, step
from didr_core.types import Backbone, Condition

Sampler = Callable[[Condition, Tensor], Tensor]
"""``(condition of B prompts, z [B, *latent_shape]) -> clean latents [B, *latent_shape]``, without grad."""


def noise(seed: int, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``z [N, *shape]``, standard normal, float32, CPU; row i depends on ``(seed, positions[i])`` alone."""
    return Noise(seed).normal(positions, shape, "picture")


@torch.no_grad()
def sample_reference(
    backbone: Backbone, network: nn.Module, condition: Condition, z: Tensor, steps: int = 50, guidance: float = 4.0
) -> Tensor:
    """Deterministic DDIM (Euler for rectified flow) with classifier-free guidance.

    The chain starts at t = 1 from ``z`` scaled to the noise level there, ``sqrt(alpha_1^2 + sigma_1^2)`` (1 for VP and for rectified flow),
    visits ``steps`` times evenly spaced in t, and ends in the last ``x0`` prediction.

    Args:
        z: ``[B, ...]`` standard normal.
        steps: denoiser evaluations (each of twice the batch unless ``guidance`` is 1).
        guidance: ``w`` in ``D(null) + w (D(c) - D(null))``.

    Returns:
        Clean latents ``[B, ...]``, float32.

    Raises:
        ValueError: ``steps`` < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: sampling takes at least one step")
    times = chain_times(torch.ones(len(z), device=z.device), steps)
    alpha, sigma = backbone.schedule.coeffs(times[0])
    x = z * expand((alpha**2 + sigma**2).sqrt(), z)
    x0 = guided_x0(backbone, network, x, times[0], condition, guidance)
    for before, now in pairwise(times):
        x = step(backbone.schedule, x, x0, before, now)
        x0 = guided_x0(backbone, network, x, now, condition, guidance)
    return x0


def guided_x0(
    backbone: Backbone, network: nn.Module, x: Tensor, t: Tensor, condition: Condition, guidance: float
) -> Tensor:
    """``D(null) + w (D(c) - D(null))``, one call of twice the batch; ``w = 1`` is the plain prediction at half the cost."""
    if guidance == 1.0:
        return backbone.x0(network, x, t, condition)
    both = backbone.null(condition).cat(condition)
    null, conditioned = backbone.x0(network, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return null + guidance * (conditioned - null)


def one_step(backbone: Backbone, network: nn.Module) -> Sampler:
    """The generator's single evaluation: ``z [B, ...] ~ N(0, I)`` to clean latents ``[B, ...]``."""
    return torch.no_grad()(lambda condition, z: backbone.generate(network, z, condition))


def reference(backbone: Backbone, network: nn.Module, steps: int = 50, guidance: float = 4.0) -> Sampler:
    """:func:`sample_reference` as a :data:`Sampler`."""
    return lambda condition, z: sample_reference(backbone, network, condition, z, steps, guidance)


def clamp_straight_through(images: Tensor) -> Tensor:
    """``clamp(0, 1)`` whose gradient is the identity: a saturated pixel can still come back."""
    return images + (images.detach().clamp(0, 1) - images.detach())


def clamp_to_rewards(images: Tensor) -> Tensor:
    """:func:`clamp_straight_through` that leads no saturated pixel further out, towards a reward that it cannot reach.

    What comes back must be the gradient of a reward, followed uphill, not of a loss: everything here differentiates rewards themselves.
    """
    given, clamped = images.detach(), clamp_straight_through(images)
    if clamped.requires_grad:
        clamped.register_hook(lambda g: g.masked_fill(((given >= 1) & (g > 0)) | ((given <= 0) & (g < 0)), 0))
    return clamped
