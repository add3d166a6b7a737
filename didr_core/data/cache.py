"""What prompts become, kept on disk: embeddings, the reward's text features, baselines of the start; and plain arrays.

A stage of :mod:`didr_core.data.feed` takes a block, the samples of one rank and step. What it adds to a block is one Parquet file with
tensor columns, named by a hash of all that it follows from: the stage's ``key`` (files of the text encoder, start, roles, reward, ...) and
the block's prompts (baselines: and sample indices). So nothing is ever out of date, any number of runs may share a folder, and what is
read is bit for bit what was made in the same place. Files are written aside and renamed: two that make one at once write the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from didr_core.config import Config
from didr_core.config.files import replaced
from didr_core.data.prompts import Columns

_DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError)


class Kept:
    """A stage, whose columns are read from ``config.cache`` where they are there; its models are loaded when the first are not."""

    def __init__(self, stage: type[Any], config: Config, **given: Any) -> None:
        """``stage``: built as ``stage(config, **given)``; has ``key(config)`` and ``reads``, the columns its work follows from."""
        assert config.cache is not None
        self.stage, self.config, self.given = stage, config, given
        self.folder = config.cache / stage.key(config)
        self._made: Any = None

    def __call__(self, batch: Columns) -> Columns:
        """``batch`` with the stage's columns; a damaged file is made again."""
        path = self.path(batch)
        added = self._read(path)
        if added is None:
            self._made = self._made or self.stage(self.config, **self.given)
            added = {name: value for name, value in self._made(batch).items() if name not in batch}
            write_columns(path, added)
        return {**batch, **added}

    def path(self, batch: Columns) -> Path:
        """The file of this block."""
        read = [np.asarray(batch[name]).tolist() for name in self.stage.reads]
        name = hashlib.sha256(json.dumps(read).encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.parquet"

    def has(self, batch: Columns) -> bool:
        """Whether the block's file is there, with its footer: what a cut takes."""
        try:
            return bool(pq.read_metadata(self.path(batch)).num_rows)
        except _DAMAGE:
            return False

    def _read(self, path: Path) -> Columns | None:
        try:
            return read_columns(path)
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            logging.warning("data.cache: %s is damaged (%s); it is made again", path, str(error).splitlines()[0])
            return None


def write_columns(path: Path, columns: Columns) -> None:
    """Numeric arrays ``[B, ...]`` as ``path`` (.parquet), whole or not at all: a tensor column each, plain where it is ``[B]``."""
    whole = {name: np.ascontiguousarray(value) for name, value in columns.items()}
    table = {k: v if v.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(v) for k, v in whole.items()}
    with replaced(path) as partial:
        # padding packs well, and a page that rots on the disk is noticed
        pq.write_table(pa.table(table), partial, compression="zstd", use_dictionary=False, write_page_checksum=True)


def read_columns(path: Path) -> Columns:
    """Inverse of :func:`write_columns`.

    Raises:
        FileNotFoundError, or another of ``OSError``, ``ValueError`` and ``ArrowException``: it is missing, or damaged.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read(use_threads=False).combine_chunks()
    return {name: _array(table.column(name).chunk(0)) for name in table.column_names}


def _array(column: pa.Array) -> Any:
    if isinstance(column, pa.FixedShapeTensorArray):  # whose own way to numpy knows no booleans
        return _array(column.storage.flatten()).reshape(-1, *column.type.shape)
    return column.to_numpy(zero_copy_only=False)


def read_arrays(path: Path) -> Columns | None:
    """The arrays of ``path`` (.npz); None where it is not there or cut short (a full disk): make them again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write_arrays(path: Path, arrays: Columns) -> None:
    """Write ``path`` (.npz), whole or not at all."""
    with replaced(path) as partial:
        np.savez(partial, **arrays)  # type: ignore[arg-type]
