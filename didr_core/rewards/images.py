"""Differentiable picture preparation, shared by the rewards. In float32: antialiased bicubic has no half-precision CPU kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from didr_core.diffusion.noise import constant
from didr_core.diffusion.sampling import clamp_straight_through

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] -> ``[B, 3, height, width]``, float32, antialiased bicubic, which overshoots [0, 1] beside edges and,
    by a rounding error, where pictures are plain white."""
    images = images.float()
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] to the units that CLIP and BLIP were trained in."""
    mean, std = (constant(values, images.device).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    return (images - mean) / std


def clip_pixels(images: Tensor, size: int, half: Callable[[float], int] = int) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] -> ``[B, 3, size, size]`` for CLIP-like towers: resize shortest edge, centre crop, normalise.

    PIL's bicubic without its rounding to 8 bits; its cut to [0, 1] is straight-through. The long edge is cut to whole pixels, as
    torchvision's Resize and transformers' CLIPImageProcessor do. Where it leaves an odd number to crop, transformers cuts the ``half``
    pixel (``int``) and torchvision rounds it to even (``round``): a reward takes what its upstream takes.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = clamp_straight_through(resize(images, size * height // short, size * width // short))
    top, left = half((images.shape[-2] - size) / 2), half((images.shape[-1] - size) / 2)
    return normalise(images[..., top : top + size, left : left + size])


def padded_pixels(images: Tensor, size: int) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] -> ``[B, 3, size, size]`` as HPSv2 does: resize longest edge, pad with black, normalise.

    As upstream resizes float tensors, nothing is cut to [0, 1]. The odd row or column of padding goes to the bottom or right.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resize(images, max(1, round(height * scale)), max(1, round(width * scale)))
    down, right = size - images.shape[-2], size - images.shape[-1]
    images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalise(images)
