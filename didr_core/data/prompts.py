"""Prompt shards and the endless, seeded stream of samples. Pure: pyarrow and numpy, no Ray.

A corpus is a Parquet file, a folder of them (sorted by name), or a glob. Opening it reads footers only. The stream is a
function of ``(seed, sample index)``: sample ``i`` is in epoch ``i // N``, and an epoch is a permutation made in two stages,
so that nothing as long as the corpus is ever in memory and a million prompts start as fast as a thousand:

1. row groups are put in random order and gathered into windows of about :data:`WINDOW` rows (at least one row group);
2. the rows of a window are permuted.

So the row group is the unit of reading: write shards with row groups of at most some ten thousand prompts
(`pyarrow.parquet.write_table(table, path, row_group_size=8192)`). A corpus smaller than a window is shuffled as a whole.

Because a sample is known by its index, resuming needs no iterator state: the cursor is one number, the number of samples consumed.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from didr_core.config import locate
from didr_core.types import DIDRError

WINDOW = 65_536
"""Rows that are shuffled among themselves; also bounds what a reading process keeps in memory (about 60 bytes a row)."""

_SPACE = " \t\n\r\f\v\u00a0"


@dataclass(frozen=True)
class Prompt:
    """One sample: its place in the stream, the id of its prompt in the corpus, and the text."""

    index: int
    id: str
    prompt: str


@dataclass(frozen=True)
class PromptIndex:
    """What the footers say: shards, and the rows of each row group. A few bytes a row group; travels to actors by pickle."""

    path: str  # as the user gave it
    shards: tuple[str, ...]
    column: str
    id_column: str | None  # none: 'shard:row' is the id
    unit_shard: NDArray[np.int64]  # [U] shard of each row group
    unit_group: NDArray[np.int64]  # [U] its number in the shard
    unit_first: NDArray[np.int64]  # [U] its first row in the shard
    unit_rows: NDArray[np.int64]  # [U]
    key: str = "data.prompts"

    @classmethod
    def open(cls, path: str, column: str = "prompt", id_column: str = "id", key: str = "data.prompts") -> PromptIndex:
        """Read the footers of all shards.

        Args:
            path: file, folder, glob, ``zoo://...``, or a URI that pyarrow knows (``s3://bucket/folder``).
            column: text column; must be there in every shard, and be of a string type.
            id_column: used where it exists.
            key: config key, for messages.

        Raises:
            DIDRError: nothing there, no shards, a shard that is not Parquet, a column that is missing or not text, no rows at all.
        """
        shards = _shards(path, key)
        with ThreadPoolExecutor(min(8, len(shards))) as pool:
            footers = list(pool.map(lambda s: _footer(s, column, id_column, key), shards))
        has_id = footers[0][1]
        for shard, (_, other) in zip(shards, footers, strict=True):
            if other != has_id:
                raise DIDRError(
                    f"{key}={path!r}: column {id_column!r} is in some shards and not in others (see {shard}); "
                    "add it everywhere, or set data.id_column to another name to number the rows"
                )
        rows = [group_rows for groups, _ in footers for group_rows in groups]
        index = cls(
            path=path,
            shards=shards,
            column=column,
            id_column=id_column if has_id else None,
            unit_shard=np.repeat(np.arange(len(shards)), [len(groups) for groups, _ in footers]),
            unit_group=np.concatenate([np.arange(len(groups)) for groups, _ in footers]).astype(np.int64),
            unit_first=np.concatenate([np.cumsum([0, *groups])[:-1] for groups, _ in footers]).astype(np.int64),
            unit_rows=np.array(rows, np.int64),
            key=key,
        )
        if len(index) == 0:
            raise DIDRError(
                f"{key}={path!r}: {len(shards)} shard(s) and not one prompt in them. Expected at least one row."
            )
        return index

    def __len__(self) -> int:
        """Prompts in all shards."""
        return int(self.unit_rows.sum())

    @property
    def fingerprint(self) -> str:
        """Short hash of shard names and row counts: a resumed run must find the same corpus."""
        names = [s.rpartition("/")[2] for s in self.shards]
        text = repr((names, self.column, self.unit_shard.tolist(), self.unit_rows.tolist()))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def locate(
        self, indices: Sequence[int] | NDArray[np.int64], seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(unit [B], row in the unit [B])`` of stream positions ``indices [B]``."""
        indices = np.asarray(indices, np.int64)
        units, rows = np.empty_like(indices), np.empty_like(indices)
        epochs, places = np.divmod(indices, len(self))
        for epoch in np.unique(epochs):
            mine = np.flatnonzero(epochs == epoch)
            units[mine], rows[mine] = self._in_epoch(places[mine], seed, int(epoch))
        return units, rows

    def _in_epoch(
        self, places: NDArray[np.int64], seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order, ends, window_ends = _epoch_plan(self.unit_rows.tobytes(), seed, epoch)
        units, rows = np.empty_like(places), np.empty_like(places)
        windows = np.searchsorted(window_ends, places, side="right")
        for window in np.unique(windows):
            mine = np.flatnonzero(windows == window)
            first = int(window_ends[window - 1]) if window else 0
            shuffled = (
                first + _permutation(seed, epoch, int(window), int(window_ends[window]) - first)[places[mine] - first]
            )
            slot = np.searchsorted(ends, shuffled, side="right")
            units[mine] = order[slot]
            rows[mine] = shuffled - (ends[slot] - self.unit_rows[order[slot]])
        return units, rows

    def read(self, indices: Sequence[int] | NDArray[np.int64], seed: int) -> list[Prompt]:
        """The samples at stream positions ``indices``, in that order.

        Raises:
            DIDRError: a prompt that is empty, blank or null (names shard and row), or a shard that can no longer be read.
        """
        indices = np.asarray(indices, np.int64)
        units, rows = self.locate(indices, seed)
        texts: list[Any] = [None] * len(indices)
        ids: list[Any] = [None] * len(indices)
        for unit in np.unique(units):
            mine = np.flatnonzero(units == unit)
            table = self._unit(int(unit)).take(pa.array(rows[mine]))
            for slot, text in zip(mine, table.column(self.column).to_pylist(), strict=True):
                texts[slot] = text
            if self.id_column:
                for slot, value in zip(mine, table.column(self.id_column).to_pylist(), strict=True):
                    ids[slot] = value
        return [
            self._sample(int(i), int(u), int(r), text, value)
            for i, u, r, text, value in zip(indices, units, rows, texts, ids, strict=True)
        ]

    def _sample(self, index: int, unit: int, row: int, text: Any, value: Any) -> Prompt:
        shard = self.shards[self.unit_shard[unit]]
        place = int(self.unit_first[unit]) + row
        if not isinstance(text, str) or not text.strip():
            raise _bad_prompt(self.key, shard, place, self.column, text)
        return Prompt(index, f"{shard.rpartition('/')[2]}:{place}" if value is None else str(value), text)

    def _unit(self, unit: int) -> pa.Table:
        columns = (self.column, self.id_column) if self.id_column else (self.column,)
        return _CACHE.get(self.shards[self.unit_shard[unit]], int(self.unit_group[unit]), columns, self.key)

    def scan(self, rows: int = 200_000) -> int:
        """Look for empty, blank and null prompts in the first ``rows`` rows, a row group at a time; returns the rows looked at.

        Preflight calls it: a small corpus is read whole, a large one in part (the rest is checked when it is read).

        Raises:
            DIDRError: as :meth:`read`.
        """
        seen = 0
        for unit in range(len(self.unit_rows)):
            if seen >= rows:
                break
            shard = self.shards[self.unit_shard[unit]]
            column = _read_group(shard, int(self.unit_group[unit]), (self.column,), self.key).column(self.column)
            text = column.cast(pa.large_string())
            blank = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim(text, characters=_SPACE)), 0), True)
            first = pc.index(blank, True).as_py()
            if first >= 0:
                raise _bad_prompt(
                    self.key, shard, int(self.unit_first[unit]) + first, self.column, column[first].as_py()
                )
            seen += len(column)
        return seen

    def first(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts in file order (held-out grids): index = row in the corpus."""
        found: list[Prompt] = []
        for unit in range(len(self.unit_rows)):
            take = min(count - len(found), int(self.unit_rows[unit]))
            if take <= 0:
                break
            table = self._unit(unit).slice(0, take)
            values = table.column(self.id_column).to_pylist() if self.id_column else [None] * take
            for row, (text, value) in enumerate(zip(table.column(self.column).to_pylist(), values, strict=True)):
                found.append(self._sample(len(found), unit, row, text, value))
        return found


def _bad_prompt(key: str, shard: str, row: int, column: str, value: Any) -> DIDRError:
    return DIDRError(
        f"{key}: the prompt at {shard}:{row} (shard:row, column {column!r}) is {value!r}. "
        "Expected non-empty text; remove the row or fill it in."
    )


def _shards(path: str, key: str) -> tuple[str, ...]:
    filesystem, root = _filesystem(str(locate(path)) if "://" not in path or path.startswith("zoo://") else path)
    prefix = path.partition("://")[0] + "://" if "://" in path and not path.startswith("zoo://") else ""
    if any(c in root for c in "*?["):
        folder, _, pattern = root.rpartition("/")
        found = _match(filesystem, folder or ".", pattern)
        hint = "matches nothing"
    else:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            return (prefix + root,)
        if info.type == pafs.FileType.NotFound:
            raise DIDRError(
                f"{key}={path!r}: no such file or folder. Expected a Parquet file, a folder of .parquet shards, or a glob; set {key}=PATH."
            )
        found = [f.path for f in filesystem.get_file_info(pafs.FileSelector(root)) if f.type == pafs.FileType.File]
        found = [p for p in found if p.endswith(".parquet")]
        hint = "no .parquet files in this folder"
    if not found:
        raise DIDRError(f"{key}={path!r}: {hint}. Expected at least one Parquet shard with a text column.")
    return tuple(prefix + p for p in sorted(found))


def _match(filesystem: Any, folder: str, pattern: str) -> list[str]:
    """Files of one folder whose name matches ``pattern`` (wildcards in folder names only on a local disk)."""
    import fnmatch
    import glob

    if isinstance(filesystem, pafs.LocalFileSystem):
        return [p for p in glob.glob(f"{folder}/{pattern}", recursive=True) if not p.endswith("/")]
    files = filesystem.get_file_info(pafs.FileSelector(folder))
    return [f.path for f in files if f.type == pafs.FileType.File and fnmatch.fnmatch(f.base_name, pattern)]


def _filesystem(path: str) -> tuple[Any, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        return pafs.FileSystem.from_uri(path)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DIDRError(f"prompts {path!r}: pyarrow cannot open this kind of address ({error})") from error


def _open(shard: str, key: str) -> pq.ParquetFile:
    filesystem, path = _filesystem(shard)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DIDRError(
            f"{key}: shard {shard} is not a readable Parquet file ({str(error).splitlines()[0]}). Was it cut short? Replace or remove it."
        ) from error


def _footer(shard: str, column: str, id_column: str, key: str) -> tuple[list[int], bool]:
    """Rows of each row group, and whether the id column is there."""
    with _open(shard, key) as file:
        schema = file.schema_arrow
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    if column not in schema.names:
        near = difflib.get_close_matches(column, schema.names, 1) or difflib.get_close_matches(
            column.lower(), schema.names, 1
        )
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DIDRError(
            f"data.column={column!r}: shard {shard} has no such column; it has {', '.join(schema.names) or 'none'}.{hint} "
            "Set data.column to the text column."
        )
    kind = schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        raise DIDRError(
            f"data.column={column!r}: in shard {shard} it holds {kind}, expected text. Text columns there: {', '.join(texts) or 'none'}."
        )
    return groups, id_column in schema.names


def _read_group(shard: str, group: int, columns: tuple[str, ...], key: str) -> pa.Table:
    with _open(shard, key) as file:
        try:
            return file.read_row_group(group, columns=list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise DIDRError(
                f"{key}: row group {group} of shard {shard} cannot be read ({str(error).splitlines()[0]})."
            ) from error


class _Cache:
    """Recently read row groups of this process, at most two windows of rows."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Any, ...], pa.Table] = OrderedDict()

    def get(self, shard: str, group: int, columns: tuple[str, ...], key: str) -> pa.Table:
        name = (shard, group, columns)
        if name in self._tables:
            self._tables.move_to_end(name)
            return self._tables[name]
        table = _read_group(shard, group, columns, key).combine_chunks()
        self._tables[name] = table
        while len(self._tables) > 1 and sum(t.num_rows for t in self._tables.values()) > 2 * WINDOW:
            self._tables.popitem(last=False)
        return table


_CACHE = _Cache()


@lru_cache(maxsize=4)
def _epoch_plan(
    unit_rows: bytes, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row groups in this epoch's order, the row where each ends, and the row where each window ends."""
    rows = np.frombuffer(unit_rows, np.int64)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    ends = np.cumsum(rows[order])
    window_ends, reached = [], 0
    while reached < ends[-1]:
        reached = int(ends[min(int(np.searchsorted(ends, reached + WINDOW)), len(ends) - 1)])
        window_ends.append(reached)
    return order, ends, np.array(window_ends, np.int64)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, window: int, rows: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, window + 1]).permutation(rows)
