"""Where prompts lie: which files of a folder are shards, what their footers say, and what is in them.

Shards are Parquet, which is read a row group at a time, or of the kinds of :mod:`didr_core.data.readers`, which are read whole."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from didr_core.data import readers
from didr_core.data.storage import open_filesystem, patiently, reached
from didr_core.types import DIDRError

GROUP = 8192
"""Rows of a file that is not Parquet that are read as one row group."""
SPLIT = re.compile(r"(train|validation|valid|val|test|dev|heldout)(?![a-z])", re.IGNORECASE)


def find_shards(path: str, key: str) -> tuple[str, ...]:
    """The files that ``path`` means, sorted: itself, those of a folder and the folders in it, or those a glob matches.

    Of a folder they are the Parquet files, else the Arrow files, else the text files, if all are of one kind. Names that begin with
    ``.`` or ``_`` are none, neither of files nor of folders. A path that exists is never read as a glob.

    Raises:
        DIDRError: nothing there, or text files of several kinds in one folder.
    """
    with reached(key, path):
        return _find_shards(path, key)


def _find_shards(path: str, key: str) -> tuple[str, ...]:
    filesystem, root = open_filesystem(path, key)
    prefix = "" if isinstance(filesystem, pafs.LocalFileSystem) else path.partition("://")[0] + "://"
    try:
        info = filesystem.get_file_info(root)
    except Exception as error:  # whatever the library behind an address raises
        told = f"{type(error).__name__}: {error}"
        raise DIDRError(f"{key}={path!r}: cannot be reached ({told}). Download it, and give the folder.") from error
    if info.type == pafs.FileType.File:
        return (prefix + root,)
    if info.type == pafs.FileType.Directory:
        if not prefix and Path(root).resolve() == Path(Path(root).resolve().anchor):
            raise DIDRError(
                f"{key}={path!r}: this is the whole disk. Expected a file of prompts, a folder of them, or a glob."
            )
        try:
            files = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        except OSError as error:
            if prefix:
                raise  # the storage's: its hint is of credentials
            raise DIDRError(
                f"{key}={path!r}: a folder in it cannot be read ({error.strerror or error}). Expected a folder of prompts alone: "
                "name the one that is meant, or mend its permissions."
            ) from error
        below = {f.path: f.path.removeprefix(info.path).split("/") for f in files if f.type == pafs.FileType.File}
        seen = [p for p, names in below.items() if not any(name.startswith((".", "_")) for name in names)]
        found, hint = _of_one_kind(seen, path, key), "no .parquet files in this folder"
    elif any(c in root for c in "*?["):
        folder, _, pattern = root.rpartition("/")
        matched = _match(filesystem, folder or ".", pattern)
        found, hint = [p for p in matched if not p.rpartition("/")[2].startswith((".", "_"))], "matches nothing"
    else:
        raise DIDRError(
            f"{key}={path!r}: no such file or folder. Expected a file of prompts, a folder of them, or a glob."
        )
    if not found:
        raise DIDRError(
            f"{key}={path!r}: {hint}. Expected at least one file with a text column: Parquet, or {', '.join(readers.KINDS)}."
        )
    return tuple(prefix + p for p in sorted(found))


def _of_one_kind(files: Sequence[str], path: str, key: str) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for file in files:
        by_kind.setdefault(readers.kind(file), []).append(file)
    for known in ("parquet", readers.ARROW):
        if known in by_kind:  # beside Arrow files `datasets` keeps what it computed later
            return [file for file in by_kind[known] if not file.rpartition("/")[2].startswith("cache-")]
    texts = {known: by_kind[known] for known in readers.READERS if known in by_kind}
    if len(texts) > 1:
        counts = ", ".join(f"{len(names)} .{known}" for known, names in texts.items())
        raise DIDRError(
            f"{key}={path!r}: files of several kinds ({counts}). Name those that are meant, e.g. 'FOLDER/*.{next(iter(texts))}'."
        )
    return next(iter(texts.values()), [])


def splits(shards: Sequence[str]) -> Counter[str]:
    """How many shards are of which split of a data set, by how their names (else their folders') begin."""
    found = ([m[1].lower() for name in reversed(s.split("/")[-2:]) if (m := SPLIT.match(name))] for s in shards)
    return Counter(names[0] for names in found if names)


def _match(filesystem: Any, folder: str, pattern: str) -> list[str]:
    """Files of one folder whose name matches ``pattern`` (wildcards in folder names only on a local disk)."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return [p for p in glob.glob(f"{folder}/{pattern}", recursive=True) if not p.endswith("/")]
    files = filesystem.get_file_info(pafs.FileSelector(folder))
    return [f.path for f in files if f.type == pafs.FileType.File and fnmatch.fnmatch(f.base_name, pattern)]


def _lies(shard: str, origin: str) -> tuple[Any, str]:
    """Its file system, opened as ``origin`` says (the names of shards have no keys and options), and its path there."""
    return open_filesystem(origin)[0], shard.partition("://")[2] or shard


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Damage may show as any of these errors: a name that is no UTF-8, a length that memory has no room for."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DIDRError(f"{what} ({reason}). Was it cut short? Replace or remove it.") from error


def read_schema(shard: str, column: str, key: str, origin: str) -> tuple[pa.Schema, list[int]]:
    """Columns of a shard of ``origin`` (what :func:`find_shards` was given), and the rows of each row group.

    Raises:
        DIDRError: it cannot be read.
    """
    if readers.kind(shard) in readers.KINDS:
        table = read_table(shard, column, key, origin)
        return table.schema, [min(GROUP, len(table) - first) for first in range(0, len(table), GROUP)]
    filesystem, path = _lies(shard, origin)

    def read() -> tuple[pa.Schema, list[int]]:
        with pq.ParquetFile(filesystem.open_input_file(path)) as file:
            schema = file.schema_arrow
            schema.names  # noqa: B018  (they are decoded here)
            return schema, [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]

    with _in_words(f"{key}: shard {shard} is not a readable Parquet file"):
        schema, groups = patiently(filesystem, path, read)
        if min(groups, default=0) < 0:
            raise ValueError(f"a row group of {min(groups)} rows")
        return schema, groups


def read_footer(shard: str, column: str, id_column: str, key: str, origin: str) -> tuple[list[int], bool]:
    """Rows of each row group, and whether the id column is there."""
    schema, groups = read_schema(shard, column, key, origin)
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


def read_group(shard: str, group: int, columns: Sequence[str], key: str, rows: int, origin: str) -> pa.Table:
    """``columns`` of a row group, read from disk; the first is the text column. ``rows`` are expected in it."""
    if readers.kind(shard) in readers.KINDS:
        return read_table(shard, columns[0], key, origin).select(list(columns)).slice(group * GROUP, GROUP)
    filesystem, path = _lies(shard, origin)

    def read() -> pa.Table:
        with pq.ParquetFile(filesystem.open_input_file(path)) as file:
            return file.read_row_group(group, columns=list(columns))

    with _in_words(f"{key}: row group {group} of shard {shard} cannot be read"):
        table = patiently(filesystem, path, read)
        if len(table) != rows:
            raise ValueError(f"{len(table)} rows, where its footer told of {rows}")
        return table


def read_table(shard: str, column: str, key: str, origin: str) -> pa.Table:
    """All of a file that is not Parquet; kept as long as the file stays as it is.

    Raises:
        DIDRError: it cannot be read.
    """
    filesystem, path = _lies(shard, origin)

    def read() -> pa.Table:
        info = filesystem.get_file_info(path)
        return _read_table(shard, column, origin, info.mtime_ns, info.size)

    with _in_words(f"{key}: {shard} is not readable as .{readers.kind(shard)}"):
        return patiently(filesystem, path, read)


@lru_cache(maxsize=16)
def _read_table(shard: str, column: str, origin: str, changed: int, size: int) -> pa.Table:
    filesystem, path = _lies(shard, origin)
    if readers.kind(path) == readers.ARROW:
        local = isinstance(filesystem, pafs.LocalFileSystem)
        return readers.arrow(pa.memory_map(path) if local else filesystem.open_input_file(path), column)
    with filesystem.open_input_stream(path, compression=None) as file:
        return readers.parse(path, file.read(), column)
