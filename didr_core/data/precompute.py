"""All that a run's prompts become, made before training starts, so that text encoder, start and reward leave the device to the trainer.

Block by block into ``data.cache`` (:mod:`didr_core.data.cache`); nothing is held. What is there is not made again: after a kill, for a run
or trial with the same prompts, or for one that goes on.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence

import torch

from didr_core.config import Config
from didr_core.data import feed
from didr_core.data.cache import Kept
from didr_core.data.prompts import PromptIndex
from didr_core.types import DIDRError

SAYS = "encoding prompts"


def precompute(config: Config, index: PromptIndex, start: int, say: Callable[[str, int, int], None]) -> None:
    """In this process, as whole batches, from sample ``start`` on; ``say``: what is being done, done, to do.

    Raises:
        DIDRError: it would not fit on the disk; or what a stage raises.
    """
    size, stages = config.train.batch, feed.stages(config)
    todo = list(absent(config, index, stages, size, start))
    for done, number in enumerate(todo):
        say(SAYS, done, len(todo))
        batch = made = feed.samples(config, index, number * size, size)
        for stage in stages:
            made = stage(made)
        if not done:
            require_room(config, stages, batch, len(todo) - 1)
    del stages
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def absent(config: Config, index: PromptIndex, stages: Sequence[Kept], size: int, start: int) -> Iterator[int]:
    """Numbers of the run's blocks of ``size`` samples, from sample ``start`` on, that are not wholly on disk."""
    for number in range(start // size, config.sizes.total_prompts // size):
        batch = feed.samples(config, index, number * size, size)
        if not all(stage.has(batch) for stage in stages):
            yield number


def require_room(config: Config, stages: Sequence[Kept], first: feed.Columns, blocks: int) -> None:
    """For ``blocks`` more like the one of samples ``first``, which is there.

    Raises:
        DIDRError: the disk has not that much.
    """
    needed = blocks * sum(stage.path(first).stat().st_size for stage in stages)
    if needed > (free := shutil.disk_usage(config.cache or ".").free):
        raise DIDRError(
            f"data.cache={str(config.cache)!r}: the run's prompts need about {needed / 1e9:.1f} GB more there, {free / 1e9:.1f} GB are "
            "free. Name a larger disk, or set workers.precompute=false: then they are made as training goes on."
        )
