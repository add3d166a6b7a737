"""Scales of a composite reward's parts that the recipe leaves open: measured once, before training, and kept in the run's config.

The measure is that of `baseline` and `spread` (:mod:`didr_core.data.feed`): pictures of the starting generator, noise tied to
``(config.seed, sample index)``, the unbiased variance of a part's score among the pictures of one prompt, pooled over prompts. The numbers
travel with the config, so every process has the same, and a resumed run reads them from its ``config.yaml``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from didr_core.config import Config
from didr_core.data.feed import PromptEncoder, RewardPreparer
from didr_core.data.prompts import columns, open_prompts
from didr_core.rewards.composite import Composite, with_scales
from didr_core.types import DIDRError, Reward


def missing(config: Config) -> list[str]:
    """The keys among ``reward`` and ``judge`` that name a composite with a part of no scale."""
    return [
        key for key in ("reward", "judge") if (c := _composite(config, key)) and any(p.scale is None for p in c.parts)
    ]


def resolve(config: Config, reward: Reward | None = None) -> Config:
    """``config`` with every scale; itself where none is missing. Loads networks where one is. ``reward``: in place of the config's own.

    Raises:
        DIDRError: a part's score is the same for all pictures of every prompt, or not finite.
    """
    for key in missing(config):
        composite = _composite(config, key)
        assert composite is not None
        config = config.model_copy(
            update={key: with_scales(composite, measure(config, key, composite, reward if key == "reward" else None))}
        )
    return config


@torch.no_grad()
def measure(config: Config, key: str, composite: Composite.Config, reward: Reward | None = None) -> list[float]:
    """The pooled within-prompt standard deviation of every part, in its own units."""
    probe = config.model_copy(update={"reward": composite})
    encoder, preparer = PromptEncoder(probe), RewardPreparer(probe, reward)
    parts: Any = preparer.reward
    index, size = open_prompts(config), config.sizes.micro_batch
    total: dict[str, float] = dict.fromkeys(parts.names, 0.0)
    for first in range(0, composite.measure_prompts, size):
        rows = np.arange(first, min(first + size, composite.measure_prompts))
        batch = encoder(columns(index.read(rows, config.seed)))
        inputs = parts.prepare([str(p) for p in batch["prompt"]])
        scores = [parts.raw(images, inputs) for images in preparer.pictures(batch)]
        for name in total:
            total[name] += torch.stack([s[name].double() for s in scores]).var(0, unbiased=True).sum().item()
    scales = [(value / composite.measure_prompts) ** 0.5 for value in total.values()]
    for number, (name, scale) in enumerate(zip(total, scales, strict=True)):
        if not np.isfinite(scale) or scale <= 0:
            raise DIDRError(
                f"{key}.parts[{number}] ({name}): its standard deviation over pictures of the starting generator is {scale:g}, expected a "
                "number above 0. A reward that does not depend on the picture cannot be followed: set its `scale`, or leave the part out."
            )
    return scales


def _composite(config: Config, key: str) -> Composite.Config | None:
    value = getattr(config, key)
    return value if isinstance(value, Composite.Config) else None
