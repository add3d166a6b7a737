"""Everything that can be known to be wrong before the first weight is loaded: data, models, output. Takes about a second."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from didr_core.config import Config, build
from didr_core.data.prompts import PromptIndex, open_prompts
from didr_core.export.folder import find_export
from didr_core.networks import optim
from didr_core.networks.tokenizers import longer_than
from didr_core.plan import advice, fit
from didr_core.train.run_folder import LEAST_FREE, local_folder, room
from didr_core.types import DIDRError

SCAN_ROWS = 200_000
COUNTED = 5_000  # prompts whose tokens are counted


def preflight(
    config: Config, *, here: bool = True, output: Path | None = None, note: Callable[[str], object] = lambda _: None
) -> PromptIndex:
    """Look at prompts (footers, and the text of the first :data:`SCAN_ROWS` rows), weights folders and output folder.

    Args:
        here: this process trains, so ``device`` must exist on this machine.
        output: the run's folder, where it is not to be made in ``config.output``; it may hold checkpoints already.
        note: takes sentences on what is no mistake, but may not be meant.

    Returns:
        The training corpus, with the digest of its first texts.

    Raises:
        DIDRError: the first thing that is wrong.
    """
    if here:
        _ = config.torch_device
    index, texts = _read(open_prompts(config))
    for told in index.notes:
        note(told)
    if config.data.heldout:
        PromptIndex.open(config.data.heldout, config.data.column, config.data.id_column, "data.heldout").scan(SCAN_ROWS)
    optim.check(config)
    build("algorithms", config.algorithm)
    readers = {"encoder": build("backbones", config.backbone)}
    readers["encoder"].check()
    if config.needs_reward and config.reward is not None:
        readers["reward"] = build("rewards", config.reward)
        readers["reward"].check()
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
    if cut := [text for name, reader in readers.items() if (text := _cut(name, reader.tokenizers() or {}, texts))]:
        note(
            f"of the first {len(texts):,} prompts, longer than what is read of them: {'; '.join(cut)}. The rest is cut off."
        )
    return index


def _read(index: PromptIndex) -> tuple[PromptIndex, list[str]]:
    """``index`` with its digest, after a look at the first :data:`SCAN_ROWS` texts; and the first :data:`COUNTED` of them."""
    digest, first = hashlib.blake2b(digest_size=8), list[str]()
    for texts in index.texts(SCAN_ROWS):
        digest.update("\n".join(texts).encode())
        first += texts[: COUNTED - len(first)]
    return replace(index, digest=digest.hexdigest()), first


def _cut(name: str, tokenizers: Mapping[Path, int], texts: Sequence[str]) -> str:
    counts = {tokens: longer_than(folder, tokens, texts) for folder, tokens in tokenizers.items()}
    tokens = max(counts, key=lambda tokens: counts[tokens], default=0)
    return f"{counts[tokens]:,} by the {name} ({tokens} tokens)" if tokens and counts[tokens] else ""
