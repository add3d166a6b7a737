"""Any prompt files into one Parquet shard, and what is found on the way: empty rows, duplicates, what another set holds too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from didr_core.config.files import replaced
from didr_core.data.prompts import BOM, VISIBLE, normal
from didr_core.data.readers import METADATA, READERS, kind
from didr_core.data.shards import GROUP, find_shards, read_footer, read_group, read_schema
from didr_core.types import DIDRError

KEY = "FILES"
SCHEMA = pa.schema({"prompt": pa.string(), "id": pa.string(), METADATA: pa.string()})


@dataclass
class Found:
    """Rows read, left out as empty, seen before, in the other set (and the first of those), and written."""

    rows: int = 0
    empty: int = 0
    duplicates: int = 0
    shared: int = 0
    example: str = ""
    written: int = 0


def convert(
    paths: Iterable[str],
    out: Path,
    column: str = "prompt",
    id_column: str = "id",
    *,
    others: Sequence[str] = (),
    drop: bool = False,
    watch: Callable[[list[str]], object] = lambda _: None,
) -> Found:
    """Write ``out/prompts.parquet``: columns ``prompt``, ``id``, and ``metadata``, a row as it was, as JSON.

    Empty rows are always left out. Prompts are the same where they differ in letter case and spaces alone.

    Args:
        others: files of a set to compare with. drop: leave duplicates out, and what ``others`` holds.
        watch: shown the prompts that are written.

    Raises:
        DIDRError: a file cannot be read, nothing would be written, or there are shards in ``out`` already.
    """
    if any(out.glob("*.parquet")):
        raise DIDRError(
            f"--out {out}: holds .parquet files already, which would be read together. Name an empty folder."
        )
    known = {normal(text) for path in others for table in tables(path, column, id_column) for text in _texts(table)}
    found, seen = Found(), set[str]()

    def kept() -> Iterator[pa.Table]:
        for table in _in_groups(table for path in paths for table in tables(path, column, id_column)):
            inked = table.filter(pc.fill_null(pc.match_substring_regex(table.column("prompt"), VISIBLE), False))
            found.rows, found.empty = found.rows + len(table), found.empty + len(table) - len(inked)
            keep = []
            for text in _texts(inked):
                name = normal(text)
                twice, shared = name in seen, name in known
                seen.add(name)
                found.duplicates, found.shared = found.duplicates + twice, found.shared + shared
                found.example = found.example or text * shared
                keep.append(not drop or not (twice or shared))
            chosen = inked.filter(pa.array(keep, pa.bool_()))
            found.written += len(chosen)
            watch(_texts(chosen))
            yield chosen
        if not found.written:
            raise DIDRError(f"{KEY}: not one prompt is left of {found.rows:,} rows ({found.empty:,} are empty).")

    with replaced(out / "prompts.parquet") as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for table in kept():
            writer.write_table(table, GROUP)
    return found


def tables(path: str, column: str, id_column: str) -> Iterator[pa.Table]:
    """A table of :data:`SCHEMA` for each row group of the files that ``path`` means; empty prompts are in it.

    Raises:
        DIDRError: a file cannot be read, or has no text column of that name.
    """
    for shard in find_shards(path, KEY):
        groups, has_id = read_footer(shard, column, id_column, KEY, path)
        schema = read_schema(shard, column, KEY, path)[0]
        names = [column, *(f.name for f in schema if f.name != column and _told(f.type))]
        written = kind(shard) in READERS or schema.names == SCHEMA.names  # with a column of metadata already
        for group, count in enumerate(groups):
            table = read_group(shard, group, names, KEY, count, path)
            rows = [] if written else table.to_pylist()
            told = pa.array([json.dumps(row, ensure_ascii=False, default=str) for row in rows], pa.string())
            ids = table.column(id_column).cast(pa.string()) if has_id else pa.nulls(len(table), pa.string())
            yield pa.table(
                [table.column(column).cast(pa.string()), ids, table.column(METADATA) if written else told], SCHEMA
            )


def _in_groups(found: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of :data:`GROUP` rows and somewhat more: a thousand files of one prompt are one row group."""
    waiting: list[pa.Table] = []
    for table in found:
        waiting.append(table)
        if sum(map(len, waiting)) >= GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _told(type_: Any) -> bool:
    """Whether JSON can hold a column: pictures beside the prompts are left behind."""
    if pa.types.is_nested(type_):
        return all(_told(type_.field(i).type) for i in range(type_.num_fields))
    return not (pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_))


def _texts(table: pa.Table) -> list[str]:
    return [text.removeprefix(BOM) for text in table.column("prompt").to_pylist() if text]
