"""The loss maths, pure: tensors in, tensors out. Section and equation numbers are those of DIDR (arXiv 2605.24001) as in docs/method.md."""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.diffusion.schedule import expand


def per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch: ``[B, ...] -> [B]``."""
    return x.flatten(1).mean(1)


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample ``[B]``."""
    return per_sample(x.square()).sqrt()


def denoising_score_matching(x0_hat: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Stage I, the teaching assistant's loss per sample ``[B]``: ``(alpha/sigma)^2 ||D_psi(x_t) - x0||^2``, the eps loss written in x0."""
    return per_sample((alpha / sigma).square() * (x0_hat - x0).square())


def normalizer(x0: Tensor, reference: Tensor) -> Tensor:
    """DMD's weight per sample, ``1 / mean |x0 - D~_ref|`` (arXiv 2311.18828, eq. 8), shaped to broadcast."""
    return 1 / expand(per_sample((x0 - reference).abs()).clamp_min(1e-4), x0)


def tilted_target(reference: Tensor, drs: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Denoiser of the tilted law: ``D_target = D~_ref + (sigma^2 / alpha) s_r``."""
    return reference + sigma.square() / alpha * drs


def matching(x0: Tensor, direction: Tensor) -> Tensor:
    """Stage II per sample ``[B]``: ``0.5 ||x0 - sg(x0 - direction)||^2``; its gradient in ``x0`` is ``direction`` over the size."""
    return 0.5 * per_sample((x0 - (x0 - direction).detach()).square())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per sample ``[B]``; 0 where either is zero."""
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def clip_rms(x: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each sample down to ``rms <= limit [B]``; returns the result and which samples were clipped ``[B]`` (0/1)."""
    size = rms(x)
    factor = (limit / size.clamp_min(1e-12)).clamp_max(1)
    return x * expand(factor, x), (factor < 1).float()


def pseudo_huber(y: Tensor, c: float) -> Tensor:
    """``d(y) = sqrt(mean y^2 + c^2) - c`` per sample ``[B]``; ``y [B, ...]`` and ``c`` in the same unit (arXiv 2410.16794, section 3.3)."""
    return (per_sample(y.square()) + c**2).sqrt() - c


def score_divergence(x0: Tensor, assistant: Tensor, reference: Tensor, c: float) -> Tensor:
    """SIM's tractable loss per sample ``[B]`` (arXiv 2410.16794): its gradient, not its value, is that of ``E d(D_psi - D~_ref)``.

    With ``y = D_psi - D~_ref``: ``-d'(y)^T (s_psi - grad log q(x_t|x0))``, both scores written as x0 predictions, is
    ``d'(y)^T (x0 - D_psi)``. All three ``[B, ...]`` carry their gradients through ``x_t``; the weights of the networks carry none.
    """
    y = assistant - reference
    size = pseudo_huber(y, c) + c
    return per_sample(y * (x0 - assistant)) / size


def hinge(reward: Tensor, margin: float) -> Tensor:
    """ReFL's loss ``max(0, margin - r) [B]``: a picture above the margin is left alone (arXiv 2304.05977, section 3)."""
    return torch.relu(margin - reward)


def linear(x0: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value [B]`` as a function of ``x0 [B, ...]`` whose gradient there is ``gradient [B, ...]``: a graph computed and freed before."""
    return value + ((x0 - x0.detach()) * gradient).flatten(1).sum(1)
