"""Each layout is read back the way its scorer reads it: the names, and which picture is of which prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from didr_core.evaluate.layouts import LAYOUTS, Row, write_pictures
from didr_core.types import DIDRError

SIZE = 4


def row(place: int, pictures: int = 1, prompt: str = "", **metadata: Any) -> Row:
    images = [Image.new("RGB", (SIZE, SIZE), colour(place, number)) for number in range(pictures)]
    return Row(place, f"p{place}", prompt or f"prompt {place}", metadata, images)


def colour(place: int, number: int) -> tuple[int, int, int]:
    return (40 * place, 50 * number, 100)


def shown(path: Path, box: tuple[int, int, int, int] | None = None) -> tuple[int, ...]:
    """The one colour of a picture, or of a part of it."""
    image = Image.open(path)
    pixels = np.asarray(image.crop(box) if box else image).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


def test_geneval(tmp_path: Path) -> None:
    """`os.listdir`, folders that are digits, `json.load` of metadata.jsonl, samples that match ``\\d+\\.png``."""
    include = [{"class": "bed", "count": 1}, {"class": "owl", "count": 1, "position": ["left of", 0]}]
    rows = [row(n, 4, tag="position", include=include, prompt=f"prompt {n}") for n in range(3)]
    assert write_pictures("geneval", tmp_path, rows) == 15
    for folder in tmp_path.iterdir():
        assert folder.name.isdigit() and len(folder.name) == 5
        said = json.loads((folder / "metadata.jsonl").read_text())
        place = int(folder.name)
        assert said == {"tag": "position", "include": include, "prompt": f"prompt {place}"}
        names = sorted(p.name for p in (folder / "samples").iterdir())
        assert names == [f"{n:04d}.png" for n in range(4)] and all(re.match(r"\d+\.png", name) for name in names)
        assert [shown(folder / "samples" / name) for name in names] == [colour(place, n) for n in range(4)]


def test_geneval2(tmp_path: Path) -> None:
    """One dictionary of prompt -> path."""
    write_pictures("geneval2", tmp_path, [row(0), row(1, prompt='two "é"')])
    paths = json.loads((tmp_path / "image_paths.json").read_text())
    assert list(paths) == ["prompt 0", 'two "é"']
    assert [shown(Path(path)) for path in paths.values()] == [colour(0, 0), colour(1, 0)]
    with pytest.raises(DIDRError, match="2 prompts, 1 of them different"):
        write_pictures("geneval2", tmp_path, [row(0), row(1, prompt="prompt 0")])


def test_dpg_bench(tmp_path: Path) -> None:
    """Flat, named by the prompt's file; crops of the resolution, the first row first."""
    write_pictures("dpg", tmp_path, [row(2, 4)])
    path = tmp_path / "p2.png"
    assert [p.name for p in tmp_path.iterdir()] == ["p2.png"] and Image.open(path).size == (2 * SIZE, 2 * SIZE)
    corners = [(0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE)]
    assert [shown(path, (x, y, x + SIZE, y + SIZE)) for x, y in corners] == [colour(2, n) for n in range(4)]
    write_pictures("dpg", tmp_path / "one", [row(1)])
    assert Image.open(tmp_path / "one" / "p1.png").size == (SIZE, SIZE)


def test_hpsv2(tmp_path: Path) -> None:
    """A folder a style, `{index:05d}.jpg` in each; whatever else lay there would be taken for a style."""
    rows = [row(0, style="anime", index=0), row(1, style="anime", index=1), row(2, style="concept-art", index=0)]
    write_pictures("hpsv2", tmp_path, rows)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["anime/00000.jpg", "anime/00001.jpg", "concept-art/00000.jpg"]
    picture = Image.open(tmp_path / "anime" / "00001.jpg")
    assert picture.format == "JPEG"
    assert np.abs(np.asarray(picture).astype(int) - colour(1, 0)).max() <= 2


def test_unigenbench(tmp_path: Path) -> None:
    """`{index}_{picture}.png`; the index is the file's own, and a text in CSV."""
    write_pictures("unigenbench", tmp_path, [row(0, 4, index="7"), row(1, 4, index="12")])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{i}_{n}.png" for i in (7, 12) for n in range(4))
    assert shown(tmp_path / "12_3.png") == colour(1, 3)


def test_plain(tmp_path: Path) -> None:
    assert write_pictures("plain", tmp_path, (row(n, 2, kind="x") for n in range(2))) == 5
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [(shown(tmp_path / line["file"]), line["prompt"], line["id"], line["metadata"]) for line in lines] == [
        (colour(place, number), f"prompt {place}", f"p{place}", {"kind": "x"}) for place in (0, 1) for number in (0, 1)
    ]


@pytest.mark.parametrize(
    ("layout", "rows", "why"),
    [
        ("genval", [row(0)], "expected one of plain, geneval"),
        ("geneval", [row(0)], "has no tag, include, which djghosh13/geneval"),
        ("hpsv2", [row(0, style="anime")], "has no index"),
        ("hpsv2", [row(0, 2, style="anime", index=0)], "2 pictures of a prompt, expected 1"),
        ("dpg", [row(0, 3)], "3 pictures of a prompt, expected 1 or 4"),
        ("dpg", [Row(0, "a.txt:0", "p", {}, row(0).pictures)], "not the name of a prompt file"),
        ("unigenbench", [row(0, index=1), row(1, index=1)], "1_0.png is of two prompts, the second 'prompt 1'"),
        ("plain", [row(0, 0)], "0 pictures of a prompt, expected at least 1"),
    ],
)
def test_what_a_layout_cannot_hold(tmp_path: Path, layout: str, rows: list[Row], why: str) -> None:
    with pytest.raises(DIDRError, match=why):
        write_pictures(layout, tmp_path, rows)


def test_every_layout_is_tested() -> None:
    named = Path(__file__).read_text()
    assert all(f'write_pictures("{name}"' in named for name in LAYOUTS)
