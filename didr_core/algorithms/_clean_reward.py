"""What the rivals that reward clean pictures share: ``r(g(z))``, its gradient, and how hard it pulls against the matching."""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.types import GeneratorContext


def clean_reward(ctx: GeneratorContext) -> tuple[Tensor, Tensor]:
    """``r(x0) [B]``, differentiable in ``x0``, and ``grad r [B, ...]`` without grad.

    Decoder and reward run forward and backward here and are freed, before the generator's own backward pass.
    """
    with torch.enable_grad():
        leaf = ctx.x0.detach().requires_grad_()
        reward = ctx.reward(leaf)
        (gradient,) = torch.autograd.grad(reward.sum(), leaf)
    return losses.linear(ctx.x0, reward.detach(), gradient), gradient


def pull(matching: Tensor, push: Tensor, unit: Tensor | float) -> dict[str, Tensor]:
    """Metrics ``[B]``: ``matching/rms``, ``reward/rms`` and their cosine ``reward/cosine`` (-1: the reward undoes the matching).

    Args:
        matching: ``D_psi - D~_ref [B, ...]``.
        push: minus the reward term's gradient in ``x0``, ``[B, ...]``.
        unit: what one element of ``matching`` weighs in the loss averaged over elements; brings both to the latent's unit, as in DIDR.
    """
    push = push * push[0].numel() / unit
    return {
        "matching/rms": losses.rms(matching),
        "reward/rms": losses.rms(push),
        "reward/cosine": losses.cosine(push, -matching),
    }
