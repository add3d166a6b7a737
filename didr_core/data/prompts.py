"""Prompt shards and the endless, seeded stream of samples. Pure: pyarrow and numpy, no Ray.

A corpus is a Parquet file, a folder of them (sorted by name), or a glob. Opening it reads footers only. The stream is a
function of ``(seed, sample index)``: sample ``i`` is in epoch ``i // N``, and an epoch is a permutation made in two stages,
so that nothing as long as the corpus is ever in memory and 1e8 prompts start as fast as a thousand:

1. row groups are put in random order;
2. of the rows in that order, every :data:`WINDOW` are permuted among themselves: what is read at once, and kept.

A window holds whole row groups but for its first and last, so write shards with row groups of at most some ten thousand prompts
(`pyarrow.parquet.write_table(table, path, row_group_size=8192)`). A corpus smaller than a window is shuffled as a whole.

Because a sample is known by its index, resuming needs no iterator state: the cursor is one number, the number of samples consumed.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from didr_core.config import Config
from didr_core.data.shards import find_shards, read_footer, read_group, splits
from didr_core.data.storage import is_address
from didr_core.types import DIDRError

WINDOW = 65_536
"""Rows that are shuffled among themselves. A reading process keeps two windows: about 100 bytes a row more than the text."""
VISIBLE = r"[^\s\pZ\pM\p{Cc}\p{Cf}\x{115F}\x{1160}\x{2800}\x{3164}\x{FFA0}]"
"""A character that leaves ink (RE2): no space, mark, control or format character, nor a filler of Hangul or Braille."""
BOM = "\ufeff"


Columns = dict[str, Any]
"""Name to numpy array; all of one length."""


@dataclass(frozen=True)
class Prompt:
    """One sample: its place in the stream, the id of its prompt in the corpus, and the text."""

    index: int
    id: str
    prompt: str


def columns(prompts: Sequence[Prompt]) -> Columns:
    """``index [B] int64``, ``id [B]`` and ``prompt [B]`` of samples."""
    return {
        "index": np.array([p.index for p in prompts], np.int64),
        "id": np.array([p.id for p in prompts], object),
        "prompt": np.array([p.prompt for p in prompts], object),
    }


class RowGroup(NamedTuple):
    """The unit of reading: shard (by number), number in the shard, first row in the shard, rows."""

    shard: int
    number: int
    first: int
    rows: int


@dataclass(frozen=True)
class PromptIndex:
    """What the footers say: shards and their row groups. Some bytes a row group; travels to actors by pickle."""

    path: str  # as the user gave it
    shards: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    column: str = "prompt"
    id_column: str | None = None  # none: 'shard:row' is the id
    key: str = "data.prompts"
    digest: str = ""  # of the first texts, once somebody has read them
    overlap: str = ""  # what was found of held-out prompts among them, in a sentence

    @classmethod
    def open(cls, path: str, column: str = "prompt", id_column: str = "id", key: str = "data.prompts") -> PromptIndex:
        """Read the footers of all shards.

        Args:
            path: file, folder, glob, ``world://...``, or a URI that pyarrow knows (``s3://bucket/folder``).
            column: text column; must be there in every shard, and be of a string type.
            id_column: used where it exists.
            key: config key, for messages.

        Raises:
            DIDRError: nothing there, no shards, a shard that is not Parquet, a column that is missing or not text, no rows at all.
        """
        shards = find_shards(path, key)
        with ThreadPoolExecutor(min(8, len(shards))) as pool:
            footers = list(pool.map(lambda s: read_footer(s, column, id_column, key, path), shards))
        has_id = footers[0][1]
        for shard, (_, other) in zip(shards, footers, strict=True):
            if other != has_id:
                raise DIDRError(
                    f"{key}={path!r}: column {id_column!r} is in some shards and not in others (see {shard}); "
                    "add it everywhere, or set data.id_column to another name to number the rows"
                )
        groups = tuple(
            RowGroup(shard, number, first, rows)
            for shard, (sizes, _) in enumerate(footers)
            for number, (first, rows) in enumerate(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
        )
        index = cls(path, shards, groups, column, id_column if has_id else None, key)
        if len(index) == 0:
            raise DIDRError(
                f"{key}={path!r}: {len(shards)} shard(s) and not one prompt in them. Expected at least one row."
            )
        return index

    def __len__(self) -> int:
        """Prompts in all shards."""
        return sum(group.rows for group in self.groups)

    @property
    def notes(self) -> list[str]:
        """What its user may not have meant, in sentences."""
        told, found = [], splits(self.shards)
        if len(found) > 1:
            told.append(
                f"shards of several splits are read together: {', '.join(f'{n} {s}' for s, n in sorted(found.items()))}"
            )
        if len(depths := {shard.count("/") for shard in self.shards}) > 1:
            told.append(f"{len(self)} prompts in {len(self.shards)} shards, at {len(depths)} depths of folders")
        return [
            f"{self.key}={self.path!r}: {text}. If only some are meant, name them, e.g. 'FOLDER/train-*.parquet'."
            for text in told
        ]

    @property
    def fingerprint(self) -> str:
        """Short hash of shard names, row counts and order of samples: a resumed run must find the same corpus."""
        names = [s.rpartition("/")[2] for s in self.shards]
        text = repr((names, self.column, [g.shard for g in self.groups], [g.rows for g in self.groups]))
        if len(self) > WINDOW:  # before 0.2 windows ended with row groups; one window had today's order
            text += f" windows of {WINDOW}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def read(self, indices: Sequence[int] | NDArray[np.int64], seed: int) -> list[Prompt]:
        """The samples at stream positions ``indices``, in that order.

        Raises:
            DIDRError: a prompt that is empty, blank or null (names shard and row), or a shard that can no longer be read.
        """
        indices = np.asarray(indices, np.int64)
        epochs, places = np.divmod(indices, len(self))
        windows, rows = np.divmod(places, WINDOW)
        samples: dict[int, Prompt] = {}
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist(), strict=True))):
            mine = np.flatnonzero((epochs == epoch) & (windows == window))
            found = _window(self, seed, epoch, window).take(rows[mine])
            samples |= zip(mine.tolist(), self._samples(indices[mine].tolist(), found), strict=True)
        return [samples[slot] for slot in range(len(indices))]

    def _samples(self, indices: Sequence[int], table: pa.Table) -> list[Prompt]:
        """Rows of :meth:`_rows` as samples, without byte-order marks; raises DIDRError for a blank one."""
        inked = pc.fill_null(pc.match_substring_regex(table.column("prompt"), VISIBLE), False)
        if pc.any(pc.invert(inked)).as_py():
            row = table.slice(inked.index(False).as_py(), 1).to_pylist()[0]
            raise DIDRError(
                f"{self.key}: the prompt at {self.shards[row['shard']]}:{row['row']} (shard:row, column {self.column!r}) is "
                f"{row['prompt']!r}. Expected non-empty text; remove the row or fill it in."
            )
        texts, ids = table.column("prompt").to_pylist(), table.column("id").to_pylist()
        return [Prompt(*each) for each in zip(indices, ids, (text.removeprefix(BOM) for text in texts), strict=True)]

    def _rows(self, group: RowGroup, start: int = 0, stop: int | None = None) -> pa.Table:
        """Rows of a row group, read from disk: ``prompt``, ``id``, and where they stand, ``shard`` and ``row``."""
        columns = [self.column, *([self.id_column] if self.id_column else [])]
        table = read_group(self.shards[group.shard], group.number, columns, self.key, group.rows, self.path)
        table = table.slice(start, None if stop is None else stop - start)
        rows = range(group.first + start, group.first + start + len(table))
        self._refuse_other_encodings(group, start, table)
        ids = table.column(self.id_column).to_pylist() if self.id_column else [None] * len(table)
        name = self.shards[group.shard].removeprefix(self._folder)
        names = [f"{name}:{row}" if value is None else str(value) for row, value in zip(rows, ids, strict=True)]
        return pa.table(
            {
                "prompt": table.column(self.column).cast(pa.large_string()),
                "id": pa.array(names, pa.string()),
                "shard": np.full(len(table), group.shard),
                "row": np.array(rows, np.int64),
            }
        )

    @cached_property
    def _folder(self) -> str:
        """What all shards' names begin with, "/" included."""
        return posixpath.commonpath([posixpath.dirname(shard) for shard in self.shards]) + "/"

    def _refuse_other_encodings(self, group: RowGroup, start: int, table: pa.Table) -> None:
        """Raises DIDRError for a text that is not UTF-8, which Parquet lets pass."""
        for name in table.column_names:
            try:
                table.column(name).validate(full=True)
            except pa.ArrowInvalid as error:
                rows = enumerate(table.column(name).cast(pa.large_binary()).to_pylist(), group.first + start)
                row, value = next((r, v) for r, v in rows if v and v.decode(errors="ignore").encode() != v)
                raise DIDRError(
                    f"{self.key}: {self.shards[group.shard]}:{row} (shard:row, column {name!r}) is not UTF-8: {value[:60]!r}. "
                    "Write the shard again with text decoded from its own encoding."
                ) from error

    def texts(self, rows: int = 200_000) -> Iterator[list[str]]:
        """The first ``rows`` prompts, a whole row group at a time, in file order. Preflight reads them to see whether they are prompts: a
        small corpus whole, a large one in part (the rest is checked when it is read).

        Raises:
            DIDRError: as :meth:`read`.
        """
        seen = 0
        for group in self.groups:
            if seen < rows:
                table = self._rows(group)
                seen += len(table)
                yield [sample.prompt for sample in self._samples(range(len(table)), table)]

    def first(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts in file order (held-out grids): index = row in the corpus."""
        found: list[Prompt] = []
        for group in self.groups:
            if len(found) == count:
                break
            table = self._rows(group, 0, min(count - len(found), group.rows))
            found += self._samples(range(len(found), len(found) + len(table)), table)
        return found


def normal(text: str) -> str:
    """What two prompts share that are the same: letter case and runs of spaces do not tell them apart."""
    return " ".join(text.split()).casefold()


def open_prompts(config: Config) -> PromptIndex:
    """The training corpus of ``config``."""
    return PromptIndex.open(config.data.prompts, config.data.column, config.data.id_column)


@lru_cache(maxsize=WINDOW)
def _kept(index: PromptIndex, group: RowGroup, start: int, stop: int) -> pa.Table:
    """What one window holds as a whole is asked of its server once, not every epoch: that may be gone by then."""
    return index._rows(group, start, stop)


@lru_cache(maxsize=2)
def _window(index: PromptIndex, seed: int, epoch: int, window: int) -> pa.Table:
    """The rows ``window * WINDOW ...`` of an epoch, in the order that the stream has them."""
    rows = np.array([group.rows for group in index.groups])
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    ends = np.cumsum(rows[order])
    first, last = window * WINDOW, min((window + 1) * WINDOW, int(ends[-1]))
    parts = []
    rows_of = _kept if is_address(index.path) and len(index) <= WINDOW else PromptIndex._rows
    for slot in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last)) + 1):
        begin = int(ends[slot] - rows[order[slot]])
        begins, stops = max(first - begin, 0), min(last, int(ends[slot])) - begin
        parts.append(rows_of(index, index.groups[order[slot]], begins, stops))
    return pa.concat_tables(parts).take(np.random.default_rng([seed, epoch, window + 1]).permutation(last - first))
