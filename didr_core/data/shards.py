"""Where prompts lie: which files of a folder are shards, what their footers say, and what to do with files that are none."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from didr_core.config import bundled, locate
from didr_core.types import DIDRError

CONVERT = {
    "txt": "lines = filter(str.strip, open({path!r}, encoding='utf-8-sig').read().splitlines()); "
    "p.write_table(a.table({{{column!r}: list(lines)}}), {to!r})",
    "json": "import json; p.write_table(a.Table.from_pylist(json.load(open({path!r}, encoding='utf-8-sig'))), {to!r})",
    "jsonl": "import pyarrow.json as j; p.write_table(j.read_json({path!r}), {to!r})",
    "csv": "import pyarrow.csv as c; p.write_table(c.read_csv({path!r}), {to!r})",
    "tsv": "import pyarrow.csv as c; p.write_table(c.read_csv({path!r}, parse_options=c.ParseOptions(delimiter='\t')), {to!r})",
}
"""What makes Parquet of other files, by their suffix."""
SPLIT = re.compile(r"(train|validation|valid|val|test|dev|heldout)(?![a-z])", re.IGNORECASE)


def find_shards(path: str, column: str, key: str) -> tuple[str, ...]:
    """The Parquet files that ``path`` means, sorted: itself, those of a folder and the folders in it, or those a glob matches.

    Names that begin with ``.`` or ``_`` are none, neither of files nor of folders. A path that exists is never read as a glob.

    Raises:
        DIDRError: nothing there, or files of another kind; of those that can be converted it names the command.
    """
    filesystem, root = open_filesystem(path)
    prefix = "" if isinstance(filesystem, pafs.LocalFileSystem) else path.partition("://")[0] + "://"
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.File:
        _refuse_text([root], path, column, key)
        return (prefix + root,)
    if info.type == pafs.FileType.Directory:
        files = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        below = {f.path: f.path.removeprefix(info.path).split("/") for f in files if f.type == pafs.FileType.File}
        seen = [p for p, names in below.items() if not any(name.startswith((".", "_")) for name in names)]
        found, hint = [p for p in seen if p.endswith(".parquet")], "no .parquet files in this folder"
    elif any(c in root for c in "*?["):
        folder, _, pattern = root.rpartition("/")
        seen = [
            p for p in _match(filesystem, folder or ".", pattern) if not p.rpartition("/")[2].startswith((".", "_"))
        ]
        found, hint = [p for p in seen if _suffix(p) not in CONVERT], "matches nothing"
    else:
        raise DIDRError(
            f"{key}={path!r}: no such file or folder. Expected a Parquet file, a folder of .parquet shards, or a glob; set {key}=PATH."
        )
    if not found:
        _refuse_text(seen, path, column, key)
        raise DIDRError(f"{key}={path!r}: {hint}. Expected at least one Parquet shard with a text column.")
    return tuple(prefix + p for p in sorted(found))


def splits(shards: Sequence[str]) -> Counter[str]:
    """How many shards are of which split of a data set, by how their names (else their folders') begin."""
    found = ([m[1].lower() for name in reversed(s.split("/")[-2:]) if (m := SPLIT.match(name))] for s in shards)
    return Counter(names[0] for names in found if names)


def _suffix(path: str) -> str:
    suffix = path.rpartition(".")[2].lower()
    return {"ndjson": "jsonl", "text": "txt"}.get(suffix, suffix)


def _refuse_text(files: Sequence[str], path: str, column: str, key: str) -> None:
    file = next((f for f in files if _suffix(f) in CONVERT), None)
    if file is not None:
        to = f"{file.rpartition('.')[0]}.parquet"
        code = CONVERT[_suffix(file)].format(path=file, to=to, column=column)
        raise DIDRError(
            f"{key}={path!r}: {file} is {_suffix(file)}, expected Parquet. Convert it, and name what this makes:\n"
            f"python -c {shlex.quote('import pyarrow as a, pyarrow.parquet as p; ' + code)}"
        )


def _match(filesystem: Any, folder: str, pattern: str) -> list[str]:
    """Files of one folder whose name matches ``pattern`` (wildcards in folder names only on a local disk)."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return [p for p in glob.glob(f"{folder}/{pattern}", recursive=True) if not p.endswith("/")]
    files = filesystem.get_file_info(pafs.FileSelector(folder))
    return [f.path for f in files if f.type == pafs.FileType.File and fnmatch.fnmatch(f.base_name, pattern)]


def open_filesystem(path: str) -> tuple[Any, str]:
    """The file system that ``path`` lies in, and its path there."""
    if bundled(path) or "://" not in path:
        return pafs.LocalFileSystem(), str(locate(path))
    try:
        return pafs.FileSystem.from_uri(path)  # type: ignore[no-any-return]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DIDRError(f"prompts {path!r}: pyarrow cannot open this kind of address ({error})") from error


def _open(shard: str, key: str) -> pq.ParquetFile:
    filesystem, path = open_filesystem(shard)
    with _in_words(f"{key}: shard {shard} is not a readable Parquet file"):
        return pq.ParquetFile(filesystem.open_input_file(path))


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Damage may show as any of these errors: a name that is no UTF-8, a length that memory has no room for."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DIDRError(f"{what} ({reason}). Was it cut short? Replace or remove it.") from error


def read_footer(shard: str, column: str, id_column: str, key: str) -> tuple[list[int], bool]:
    """Rows of each row group, and whether the id column is there."""
    with _open(shard, key) as file, _in_words(f"{key}: shard {shard} is not a readable Parquet file"):
        schema = file.schema_arrow
        schema.names  # noqa: B018  (they are decoded here)
        groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        if min(groups, default=0) < 0:
            raise ValueError(f"a row group of {min(groups)} rows")
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


def read_group(shard: str, group: int, columns: Sequence[str], key: str, rows: int) -> pa.Table:
    """``columns`` of a row group, read from disk; ``rows`` are expected in it."""
    with _open(shard, key) as file, _in_words(f"{key}: row group {group} of shard {shard} cannot be read"):
        table = file.read_row_group(group, columns=list(columns))
        if len(table) != rows:
            raise ValueError(f"{len(table)} rows, where its footer told of {rows}")
        return table
