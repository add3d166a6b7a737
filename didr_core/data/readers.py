"""Prompt files that are not Parquet, as tables of text: the layouts in which benchmarks and data sets are published.

    .txt     a prompt a line; a file of one line is one prompt with the file's name as its id (a folder of them: DPG-Bench)
    .csv     a header, then rows (PartiPrompts: Prompt, Category, Challenge; UniGenBench: index, prompt_en, ...); .tsv likewise
    .json    a list of texts, whose file's name is their style (HPDv2: anime.json, ...), or a list of objects
    .jsonl   an object a line (GenEval, GenEval 2, `{"prompt": ...}`)
    .arrow   what `datasets` writes to disk, read by pyarrow alone

Each is read whole by every process that reads prompts; `didr prompts` makes shards of large ones. A row keeps what else the file says of
it as JSON in the column :data:`METADATA`: scorers want it back (:mod:`didr_core.evaluate.layouts`).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

METADATA = "metadata"
"""Column with a row as its file has it, as a JSON object."""
LINE_END = re.compile(r"\r\n|\r|\n")
"""Not `splitlines`: U+2028, U+0085 and others, which it takes for line ends too, stand in texts that were scraped."""
Row = Mapping[str, Any]


def _lines(text: str, stem: str, column: str) -> list[Row]:
    texts = [line for raw in LINE_END.split(text) if (line := raw.strip().removeprefix("\ufeff"))]
    names = [stem] if len(texts) == 1 else [f"{stem}-{number:05d}" for number in range(len(texts))]
    return [{"id": name, column: line} for name, line in zip(names, texts, strict=True)]


def _separated(delimiter: str) -> Callable[[str, str, str], list[Row]]:
    return lambda text, stem, column: [
        {name: value for name, value in row.items() if name is not None}  # cells beyond the header
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    ]


def _json(text: str, stem: str, column: str) -> list[Row]:
    return _objects(json.loads(text), stem, column)


def _json_lines(text: str, stem: str, column: str) -> list[Row]:
    return _objects([json.loads(line) for line in LINE_END.split(text) if line.strip()], stem, column)


def _objects(found: Any, stem: str, column: str) -> list[Row]:
    if not isinstance(found, list) or not all(isinstance(row, str | dict) for row in found):
        raise ValueError("expected a list of texts or of objects with a text in each")
    return [
        {"id": f"{stem}/{number:05d}", column: row, "style": stem, "index": number} if isinstance(row, str) else row
        for number, row in enumerate(found)
    ]


READERS = {
    "txt": _lines,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "json": _json,
    "jsonl": _json_lines,
}
ARROW = "arrow"
KINDS = (*READERS, ARROW)


def kind(path: str) -> str:
    """Which of :data:`KINDS` a file is of, by its suffix; of others the suffix itself."""
    suffix = PurePosixPath(path).suffix[1:].lower()
    return {"ndjson": "jsonl", "text": "txt"}.get(suffix, suffix)


def parse(path: str, data: bytes, column: str) -> pa.Table:
    """The rows of a text file: every key whose values are texts or numbers, as text, and :data:`METADATA`.

    Args:
        path: says the kind and names the rows. data: what is in the file, UTF-8.
        column: name of the text column; one that differs in case alone (``Prompt``) gets it.

    Raises:
        ValueError: it is not UTF-8 or not of its kind.
    """
    try:
        rows = READERS[kind(path)](data.decode("utf-8-sig"), PurePosixPath(path).stem, column)
    except (csv.Error, RecursionError) as error:
        raise ValueError(str(error)) from error
    values = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    texts = {name: _texts(column) for name, column in values.items() if all(map(_plain, column))}
    if not rows:  # or a file without a line would stand out among others of one
        texts = dict.fromkeys((column, "id"), _texts([]))
    told = [json.dumps(row, ensure_ascii=False) for row in rows]
    return renamed(pa.table({**texts, METADATA: pa.array(told, pa.string())}), column)


def arrow(source: Any, column: str) -> pa.Table:
    """The table of an Arrow file, stream (as `datasets` writes it) or file format.

    Raises:
        pa.ArrowException, OSError: it is neither.
    """
    try:
        table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_file(source).read_all()
    for values in table.columns:  # offsets that lead nowhere; which encoding texts are in is asked, and told, later
        bare = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(values.type)
        (values.cast(bare) if bare else values).validate(full=True)
    return renamed(table, column)


def renamed(table: pa.Table, column: str) -> pa.Table:
    """``table``, in which the one column whose name is ``column`` but for case has it, where none has it exactly."""
    near = [name for name in table.column_names if name.lower() == column.lower()]
    if column in table.column_names or len(near) != 1:
        return table
    return table.rename_columns([column if name == near[0] else name for name in table.column_names])


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _texts(values: Sequence[Any]) -> pa.Array:
    return pa.array([value if value is None else str(value) for value in values], pa.string())
