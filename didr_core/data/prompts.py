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

import difflib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from didr_core.config import Config, bundled, locate
from didr_core.types import DIDRError

WINDOW = 65_536
"""Rows that are shuffled among themselves. A reading process keeps two windows: about 100 bytes a row more than the text."""


HASHED_ROWS = 200_000
"""Rows whose text :attr:`PromptIndex.contents` reads: a fraction of a second."""


@dataclass(frozen=True)
class Prompt:
    """One sample: its place in the stream, the id of its prompt in the corpus, and the text."""

    index: int
    id: str
    prompt: str


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
    def fingerprint(self) -> str:
        """Short hash of shard names, row counts and order of samples: a resumed run must find the same corpus."""
        names = [s.rpartition("/")[2] for s in self.shards]
        text = repr((names, self.column, [g.shard for g in self.groups], [g.rows for g in self.groups]))
        if len(self) > WINDOW:  # before 0.2 windows ended with row groups; one window had today's order
            text += f" windows of {WINDOW}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def contents(self) -> str:
        """:attr:`fingerprint`, "-", and a hash of the text: of the first :data:`HASHED_ROWS` rows as it stands, of later row groups as
        sizes, smallest and largest text in their footers. Reads these rows."""
        text, seen = hashlib.blake2b(digest_size=8), 0
        for shard, groups in itertools.groupby(self.groups, lambda group: group.shard):
            footer: Any = None
            for group in groups:
                if seen < HASHED_ROWS:
                    rows = self._rows(group).column("prompt").to_pylist()
                    text.update("\0".join(map(str, rows)).encode("utf-8", "surrogatepass") + b"\0")
                else:
                    footer = footer or _open(self.shards[shard], self.key).metadata
                    text.update(repr(_facts(footer.row_group(group.number), self.column)).encode())
                seen += group.rows
        return f"{self.fingerprint}-{text.hexdigest()}"

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
        """Rows of :meth:`_rows` as samples; raises DIDRError for a blank one."""
        samples = []
        for index, row in zip(indices, table.to_pylist(), strict=True):
            if not (row["prompt"] or "").strip():
                raise DIDRError(
                    f"{self.key}: the prompt at {self.shards[row['shard']]}:{row['row']} (shard:row, column {self.column!r}) is "
                    f"{row['prompt']!r}. Expected non-empty text; remove the row or fill it in."
                )
            samples.append(Prompt(index, row["id"], row["prompt"]))
        return samples

    def _rows(self, group: RowGroup, start: int = 0, stop: int | None = None) -> pa.Table:
        """Rows of a row group, read from disk: ``prompt``, ``id``, and where they stand, ``shard`` and ``row``."""
        columns = [self.column, *([self.id_column] if self.id_column else [])]
        table = _read_group(self.shards[group.shard], group.number, columns, self.key)
        table = table.slice(start, None if stop is None else stop - start)
        rows = range(group.first + start, group.first + start + len(table))
        ids = table.column(self.id_column).to_pylist() if self.id_column else [None] * len(table)
        name = self.shards[group.shard].rpartition("/")[2]
        names = [f"{name}:{row}" if value is None else str(value) for row, value in zip(rows, ids, strict=True)]
        return pa.table(
            {
                "prompt": table.column(self.column).cast(pa.large_string()),
                "id": pa.array(names, pa.string()),
                "shard": np.full(len(table), group.shard),
                "row": np.array(rows, np.int64),
            }
        )

    def scan(self, rows: int = 200_000) -> int:
        """Look for empty, blank and null prompts in the first ``rows`` rows, a row group at a time; returns the rows looked at.

        Preflight calls it: a small corpus is read whole, a large one in part (the rest is checked when it is read).

        Raises:
            DIDRError: as :meth:`read`.
        """
        seen = 0
        for group in self.groups:
            if seen >= rows:
                break
            table = self._rows(group)
            length = pc.utf8_length(pc.utf8_trim_whitespace(table.column("prompt")))
            blank = table.filter(pc.fill_null(pc.equal(length, 0), True))
            self._samples(range(len(blank)), blank)  # refuses the first
            seen += len(table)
        return seen

    def first(self, count: int) -> list[Prompt]:
        """The first ``count`` prompts in file order (held-out grids): index = row in the corpus."""
        found: list[Prompt] = []
        for group in self.groups:
            if len(found) == count:
                break
            table = self._rows(group, 0, min(count - len(found), group.rows))
            found += self._samples(range(len(found), len(found) + len(table)), table)
        return found


def open_prompts(config: Config) -> PromptIndex:
    """The training corpus of ``config``."""
    return PromptIndex.open(config.data.prompts, config.data.column, config.data.id_column)


@lru_cache(maxsize=2)
def _window(index: PromptIndex, seed: int, epoch: int, window: int) -> pa.Table:
    """The rows ``window * WINDOW ...`` of an epoch, in the order that the stream has them."""
    rows = np.array([group.rows for group in index.groups])
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    ends = np.cumsum(rows[order])
    first, last = window * WINDOW, min((window + 1) * WINDOW, int(ends[-1]))
    parts = []
    for slot in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last)) + 1):
        begin = int(ends[slot] - rows[order[slot]])
        parts.append(index._rows(index.groups[order[slot]], max(first - begin, 0), min(last, int(ends[slot])) - begin))
    return pa.concat_tables(parts).take(np.random.default_rng([seed, epoch, window + 1]).permutation(last - first))


def _shards(path: str, key: str) -> tuple[str, ...]:
    filesystem, root = _filesystem(path)
    prefix = "" if isinstance(filesystem, pafs.LocalFileSystem) else path.partition("://")[0] + "://"
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
    if bundled(path) or "://" not in path:
        return pafs.LocalFileSystem(), str(locate(path))
    try:
        return pafs.FileSystem.from_uri(path)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DIDRError(f"prompts {path!r}: pyarrow cannot open this kind of address ({error})") from error


def _open(shard: str, key: str) -> pq.ParquetFile:
    filesystem, path = _filesystem(shard)
    with _in_words(f"{key}: shard {shard} is not a readable Parquet file"):
        return pq.ParquetFile(filesystem.open_input_file(path))


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Damage may show as any of these errors: a text that is no UTF-8, a length that memory has no room for."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DIDRError(f"{what} ({reason}). Was it cut short? Replace or remove it.") from error


def _footer(shard: str, column: str, id_column: str, key: str) -> tuple[list[int], bool]:
    """Rows of each row group, and whether the id column is there."""
    with _open(shard, key) as file, _in_words(f"{key}: shard {shard} is not a readable Parquet file"):
        schema = file.schema_arrow
        schema.names  # noqa: B018  (they are decoded here)
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


def _facts(group: Any, column: str) -> tuple[Any, ...]:
    """What a footer knows of the text of a row group."""
    columns = (group.column(n) for n in range(group.num_columns))
    found = next(c for c in columns if c.path_in_schema == column)
    known = found.statistics
    return found.num_values, found.total_uncompressed_size, known and known.has_min_max and (known.min, known.max)


def _read_group(shard: str, group: int, columns: Sequence[str], key: str) -> pa.Table:
    with _open(shard, key) as file, _in_words(f"{key}: row group {group} of shard {shard} cannot be read"):
        table = file.read_row_group(group, columns=list(columns))
        table.validate(full=True)
        return table
