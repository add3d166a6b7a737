"""Pictures on disk as the scorers of published benchmarks read them. One table of layouts, one function: :func:`write_pictures`.

What a scorer wants back of a prompt (its checks, its style, its number) is the ``metadata`` that its prompt file said
(:mod:`didr_core.data.readers`). Pictures are PNG, but for HPSv2, whose own pictures are JPEG.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from didr_core.config.files import replace_text, replaced
from didr_core.types import DIDRError


@dataclass(frozen=True)
class Row:
    """A prompt and its pictures, in the order of their noise seeds. ``place`` is its number in the prompt file, from 0."""

    place: int
    id: str
    prompt: str
    metadata: Mapping[str, Any]
    pictures: Sequence[Image.Image]


Files = dict[str, Image.Image | str]
"""Pictures and texts by their path in the folder."""


@dataclass(frozen=True)
class Layout:
    """``files`` of a row; ``closing`` ones of all rows (without pictures), given the folder. ``needs``: keys of the metadata."""

    scorer: str
    files: Callable[[Row], Files]
    needs: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()  # how many pictures a prompt may have; none = any number
    closing: Callable[[Sequence[Row], Path], Files] = lambda rows, out: {}


def _plain(row: Row) -> Files:
    return {f"{row.place:05d}-{number}.png": picture for number, picture in enumerate(row.pictures)}


def _manifest(rows: Sequence[Row], out: Path) -> Files:
    lines = [
        {"file": name, "prompt": row.prompt, "id": row.id, "picture": number, "metadata": dict(row.metadata)}
        for row in rows
        for number, name in enumerate(_plain(row))
    ]
    return {"manifest.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)}


def _geneval(row: Row) -> Files:
    folder = f"{row.place:05d}"
    told = {f"{folder}/metadata.jsonl": json.dumps({**row.metadata, "prompt": row.prompt})}
    return told | {f"{folder}/samples/{number:04d}.png": picture for number, picture in enumerate(row.pictures)}


def _geneval2(row: Row) -> Files:
    return {f"{row.place:05d}.png": row.pictures[0]}


def _paths(rows: Sequence[Row], out: Path) -> Files:
    files = {row.prompt: str(out.resolve() / f"{row.place:05d}.png") for row in rows}
    if len(files) < len(rows):
        raise DIDRError(
            f"layout 'geneval2': {len(rows)} prompts, {len(files)} of them different; it knows them by their text"
        )
    return {"image_paths.json": json.dumps(files, indent=1, ensure_ascii=False)}


def _dpg(row: Row) -> Files:
    """One picture, or four as a 2 x 2 grid: the scorer cuts it at its ``--resolution``, the first row first."""
    width, height = row.pictures[0].size
    across = 1 if len(row.pictures) == 1 else 2
    grid = Image.new("RGB", (across * width, across * height))
    for number, picture in enumerate(row.pictures):
        grid.paste(picture, (number % across * width, number // across * height))
    return {f"{row.id}.png": grid}


def _hpsv2(row: Row) -> Files:
    return {f"{row.metadata['style']}/{int(row.metadata['index']):05d}.jpg": row.pictures[0]}


def _unigenbench(row: Row) -> Files:
    return {f"{int(row.metadata['index'])}_{number}.png": picture for number, picture in enumerate(row.pictures)}


LAYOUTS = {
    "plain": Layout("any; manifest.jsonl says which picture is of which prompt", _plain, closing=_manifest),
    "geneval": Layout("djghosh13/geneval, evaluation/evaluate_images.py", _geneval, ("tag", "include")),
    "geneval2": Layout("facebookresearch/GenEval2, evaluation.py", _geneval2, counts=(1,), closing=_paths),
    "dpg": Layout("TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py", _dpg, counts=(1, 4)),
    "hpsv2": Layout("tgxs002/HPSv2, hpsv2.evaluate", _hpsv2, ("style", "index"), (1,)),
    "unigenbench": Layout("CodeGoat24/UniGenBench, eval/", _unigenbench, ("index",)),
}


def write_pictures(layout: str, out: Path, rows: Iterable[Row]) -> int:
    """Write the pictures of ``rows``, one row after another, in ``layout``; returns how many files there are. Safe to repeat.

    Args:
        layout: a key of :data:`LAYOUTS`. out: the folder that the scorer is given; nothing else should be in it.

    Raises:
        DIDRError: no such layout, a number of pictures or metadata that it cannot hold, or two rows in one file.
    """
    how, written, told = _layout(layout), set[str](), list[Row]()
    for row in rows:
        _check(layout, how, row)
        for name, content in how.files(row).items():
            if name in written:
                raise DIDRError(f"layout {layout!r}: {name} is of two prompts, the second {row.prompt!r}")
            written.add(name)
            _write(out / name, content)
        told.append(replace(row, pictures=[None] * len(row.pictures)))  # type: ignore[list-item]  # files, not pictures
    for name, content in how.closing(told, out).items():
        written.add(name)
        _write(out / name, content)
    return len(written)


def check_rows(layout: str, prompts: Sequence[str], told: Sequence[Mapping[str, Any]], pictures: int) -> None:
    """Whether ``layout`` can hold so many pictures of each prompt, before there is one.

    Args:
        told: ``id`` and ``metadata`` of each prompt.

    Raises:
        DIDRError: see :func:`write_pictures`.
    """
    how = _layout(layout)
    for number, (prompt, row) in enumerate(zip(prompts, told, strict=True)):
        _check(layout, how, Row(number, row["id"], prompt, row["metadata"], [None] * pictures))  # type: ignore[list-item]


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise DIDRError(f"layout {name!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _check(layout: str, how: Layout, row: Row) -> None:
    if missing := [key for key in how.needs if key not in row.metadata]:
        raise DIDRError(
            f"layout {layout!r}: prompt {row.place} ({row.prompt!r}) has no {', '.join(missing)}, which {how.scorer} reads. "
            "Expected the prompt file of that benchmark."
        )
    if not row.pictures or (how.counts and len(row.pictures) not in how.counts):
        expected = " or ".join(map(str, how.counts)) or "at least 1"
        raise DIDRError(
            f"layout {layout!r}: {len(row.pictures)} pictures of a prompt, expected {expected} (noise seeds a prompt)"
        )
    if layout == "dpg" and ("." in row.id or "/" in row.id):
        raise DIDRError(
            f"layout 'dpg': id {row.id!r} of prompt {row.place} is not the name of a prompt file. Expected its folder."
        )


def _write(path: Path, content: Image.Image | str) -> None:
    if isinstance(content, str):
        replace_text(path, content)
        return
    with replaced(path) as partial:
        content.save(partial, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))
