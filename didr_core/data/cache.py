"""Training batches kept on disk, for runs that read the same prompts in the same order: the trials of a sweep.

What a batch holds (prompt embeddings, the reward's text features, the starting generator's baseline) follows from a few sections of the
config alone, so trials that differ in `drp`, `guidance` or learning rates share it. The first trial that needs a step's batch makes it and
writes it; two that make it at once write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from didr_core.config import Config, dump
from didr_core.data.feed import Columns, LocalFeed, to_batch
from didr_core.data.prompts import open_prompts
from didr_core.types import Batch


def feed_key(config: Config) -> str:
    """A hash of all that the columns of a batch depend on."""
    tree = dump(config)
    parts: dict[str, Any] = {name: tree[name] for name in ("data", "seed", "device", "backbone")}
    parts |= {"batch": config.train.batch, "corpus": open_prompts(config).fingerprint}
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
            columns = _read(path)
            if columns is None:
                made = made or LocalFeed(self.config)
                columns = made.columns(step)
                _write(path, columns)
            yield to_batch(columns)


def _read(path: Path) -> Columns | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # not there, or cut short by a full disk: made again


def _write(path: Path, columns: Columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    plain = {k: np.asarray(v, str) if np.asarray(v).dtype == object else v for k, v in columns.items()}
    np.savez(part, **plain)  # type: ignore[arg-type]
    os.replace(part, path)
