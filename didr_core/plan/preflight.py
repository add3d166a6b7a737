"""Everything that can be known to be wrong before the first weight is loaded: data, models, output. Takes about a second."""

from __future__ import annotations

import re
import shutil

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


def preflight(config: Config, *, here: bool = True) -> PromptIndex:
    """Look at prompts (footers, and the text of the first :data:`SCAN_ROWS` rows), weights folders and output folder.

    Args:
        here: this process trains, so ``device`` must exist on this machine.

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
        local_folder("data.cache", config.data.cache)
    _output(config)
    return index


def _output(config: Config) -> None:
    folder = local_folder("output", config.output)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise DIDRError(f"output={config.output!r}: {folder} is a file. Expected a folder.")
    if (free := shutil.disk_usage(folder).free) < LEAST_FREE:
        raise DIDRError(
            f"output={config.output!r}: {free:,} bytes free on its disk; a run needs at least {LEAST_FREE:,}."
        )
