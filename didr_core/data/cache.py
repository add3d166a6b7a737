"""Training batches kept on disk, for runs that read the same prompts in the same order: the trials of a sweep.

What a batch holds (prompt embeddings, the reward's text features, the starting generator's baseline) follows from a few sections of the
config alone, so trials that differ in `drp`, `guidance` or learning rates share it. The first trial that needs a step's batch makes it and
writes it; two that make it at once write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from didr_core.config import Config, dump
from didr_core.config.files import replaced
from didr_core.data.feed import Columns, LocalFeed, to_batch
from didr_core.data.prompts import open_prompts
from didr_core.types import Batch


def feed_key(config: Config) -> str:
    """A hash of all that the columns of a batch depend on."""
    tree = dump(config)
    parts: dict[str, Any] = {name: tree[name] for name in ("data", "seed", "device", "backbone")}
    parts |= {"batch": config.train.batch, "corpus": open_prompts(config).contents}
    if (
        config.needs_reward
    ):  # then there are baselines: pictures of the start, which has the type and base that its role says
        roles = {"generator": tree["roles"]["generator"], "dtype": tree["roles"]["dtype"]}
        parts |= {"reward": tree["reward"], "baseline": tree["baseline"], "roles": roles}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class CachedFeed:
    """The same batches as :class:`LocalFeed` (one rank), read from ``folder`` where they are there already."""

    def __init__(self, config: Config, folder: Path, start: int = 0) -> None:
        self.config, self.start = config, start
        self.folder = folder / feed_key(config)

    def __iter__(self) -> Iterator[Batch]:
        size, made = self.config.train.batch, None
        for step in range(self.start // size, self.config.train.steps):
            path = self.folder / f"{step:06d}.npz"
            columns = read_arrays(path)
            if columns is None:
                made = made or LocalFeed(self.config)
                columns = made.columns(step)
                write_arrays(path, columns)
            yield to_batch(columns)


def read_arrays(path: Path) -> Columns | None:
    """The arrays of ``path`` (.npz); None where it is not there or cut short (a full disk): make them again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write_arrays(path: Path, arrays: Columns) -> None:
    """Write ``path`` (.npz), whole or not at all; texts become fixed-width."""
    plain = {k: np.asarray(v, str) if np.asarray(v).dtype == object else v for k, v in arrays.items()}
    with replaced(path) as partial:
        np.savez(partial, **plain)  # type: ignore[arg-type]
