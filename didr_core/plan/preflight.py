"""Everything that can be known to be wrong before the first weight is loaded: data, models, output. Takes about a second."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from didr_core.config import Config, build
from didr_core.data.prompts import PromptIndex, open_prompts
from didr_core.export.folder import find_export
from didr_core.networks import optim
from didr_core.plan import advice, fit
from didr_core.train.run_folder import local_folder
from didr_core.types import DIDRError

SCAN_ROWS = 200_000
LEAST_FREE = 64 * 2**20


def preflight(config: Config, *, here: bool = True, output: Path | None = None) -> PromptIndex:
    """Look at prompts (footers, and the text of the first :data:`SCAN_ROWS` rows), weights folders and output folder.

    Args:
        here: this process trains, so ``device`` must exist on this machine.
        output: the run's folder, where it is not to be made in ``config.output``; it may hold checkpoints already.

    Returns:
        The training corpus.

    Raises:
        DIDRError: the first thing that is wrong.
    """
    if here:
        _ = config.torch_device
    index = open_prompts(config)
    index.scan(SCAN_ROWS)
    if config.data.heldout:
        PromptIndex.open(config.data.heldout, config.data.column, config.data.id_column, "data.heldout").scan(SCAN_ROWS)
    optim.check(config)
    build("algorithms", config.algorithm)
    build("backbones", config.backbone).check()
    if config.needs_reward and config.reward is not None:
        build("rewards", config.reward).check()
    if config.judge is not None:
        try:
            build("rewards", config.judge).check()
        except DIDRError as error:  # rewards know themselves as `reward`
            raise DIDRError(re.sub(r"\breward\.(?=[a-z]+[=:\[])", "judge.", str(error))) from error
    if config.evaluation.control:
        find_export(config.evaluation.control)
    if torch.cuda.is_available() and not fit.undecided(config):  # else :func:`fit.here` looks, too
        cards = range(torch.cuda.device_count())
        advice.check(config, min(torch.cuda.get_device_properties(i).total_memory for i in cards) / 1e9)
    if config.data.cache:
        room("data.cache", local_folder("data.cache", config.data.cache))
    recorded = local_folder("output", config.output)
    if output is None:
        room("output", recorded)
    else:  # the next checkpoint is as large as the last, beside it until it is whole
        last = max(output.glob("checkpoints/step-*"), default=None)
        size = sum(file.stat().st_size for file in last.glob("*")) if last else 0
        room("--output", output, max(LEAST_FREE, size))
    return index


def room(key: str, path: Path, needed: int = LEAST_FREE) -> None:
    """Whether the disk where ``path`` is, or will be made, has ``needed`` bytes.

    Raises:
        DIDRError: it has not, or a file is in the way; names ``key``, path, needed and free.
    """
    folder = next(p for p in (path, *path.parents) if p.exists())
    if not folder.is_dir():
        raise DIDRError(f"{key}={str(path)!r}: {folder} is a file. Expected a folder.")
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DIDRError(
            f"{key}={str(path)!r}: {free:,} bytes free on its disk; a run needs at least {needed:,}. Free some, or choose another folder."
        )
