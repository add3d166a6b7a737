"""Differentiable picture preparation, shared by the rewards. In float32: antialiased bicubic has no half-precision CPU kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def clamp_straight_through(images: Tensor) -> Tensor:
    """``clamp(0, 1)`` whose gradient is the identity: a saturated pixel can still come back."""
    return images + (images.detach().clamp(0, 1) - images.detach())


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] -> ``[B, 3, size, size]`` for CLIP-like towers: resize shortest edge, centre crop, normalise."""
    images = images.float()
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    mean = torch.tensor(OPENAI_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std
