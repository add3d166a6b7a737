"""Each layout in which prompts are published is read as prompts: by the training stream, and into shards by `didr prompts`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from didr_core.data import convert
from didr_core.data.prompts import PromptIndex, normal
from didr_core.data.readers import METADATA
from didr_core.types import DIDRError

UNIGEN = 'index,prompt,sub_dims\n0,"a, b","{""Testpoints"": [""Style""]}"\n'
PARTI = (
    'Prompt\tCategory\tChallenge\na grey stone\tAbstract\tBasic\n"a sign that says ""go"""\tWorld Knowledge\tWriting\n'
)
GENEVAL = [
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 3}],
        "exclude": [{"class": "cup", "count": 4}],
        "prompt": "3 cups",
    },
    {
        "tag": "position",
        "include": [{"class": "bed", "count": 1}, {"class": "owl", "position": ["left of", 0]}],
        "prompt": "an owl",
    },
]
GENEVAL2 = [
    {"prompt": "two green lamps", "atom_count": 3, "vqa_list": [["How many lamps?", "two"]], "skills": ["count"]}
]


def text_of(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("files", "expected", "ids", "told"),
    [
        ({"p.txt": '\ufeffa cat\n\n  é dog, "big" \n'}, ["a cat", 'é dog, "big"'], ["p-00000", "p-00001"], {}),
        ({"u.txt": "a cat\u2028on a mat\r\nb\n"}, ["a cat\u2028on a mat", "b"], ["u-00000", "u-00001"], {}),
        ({"u.jsonl": '{"prompt": "a\u0085b\u2028c"}\n'}, ["a\u0085b\u2028c"], None, {}),
        ({"12.txt": "a long tale\n", "coco7.txt": "another"}, ["a long tale", "another"], ["12", "coco7"], {}),
        (
            {"P.tsv": PARTI},
            ["a grey stone", 'a sign that says "go"'],
            None,
            {"Category": "Abstract", "Challenge": "Basic"},
        ),
        ({"u.csv": UNIGEN}, ["a, b"], None, {"index": "0", "sub_dims": '{"Testpoints": ["Style"]}'}),
        (
            {"anime.json": '["a fox", "a crab"]', "photo.json": '["a fork"]'},
            ["a fox", "a crab", "a fork"],
            ["anime/00000", "anime/00001", "photo/00000"],
            {"style": "anime", "index": 0},
        ),
        ({"train.json": '[{"prompt": "a fork", "rank": [1, 0], "id": 7}]'}, ["a fork"], ["7"], {"rank": [1, 0]}),
        ({"evaluation_metadata.jsonl": text_of(GENEVAL)}, ["3 cups", "an owl"], None, GENEVAL[0]),
        ({"geneval2_data.jsonl": text_of(GENEVAL2)}, ["two green lamps"], None, GENEVAL2[0]),
        (
            {"mine.ndjson": '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n'},
            ["a cat", "a dog"],
            None,
            {"prompt": "a cat"},
        ),
    ],
    ids=[
        "txt",
        "txt, line separators in a text",
        "jsonl, line separators in a text",
        "DPG-Bench",
        "PartiPrompts",
        "UniGenBench",
        "HPDv2 styles",
        "HPDv2 list",
        "GenEval",
        "GenEval 2",
        "jsonl",
    ],
)
def test_published_layouts(
    tmp_path: Path, files: dict[str, str], expected: list[str], ids: list[str] | None, told: dict[str, object]
) -> None:
    (folder := tmp_path / "it's here").mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    paths = [str(folder), f"{folder}/*"] + ([str(folder / name)] if len(files) == 1 else [])
    for path in paths:
        index = PromptIndex.open(path)
        found = index.first(9)
        assert [p.prompt for p in found] == expected and len(index) == len(expected)
        assert [p.id for p in found] == (ids or [f"{name}:{row}" for name in files for row in range(len(expected))])
        assert sorted(p.prompt for p in index.read(range(len(index)), seed=3)) == sorted(expected)
    convert.convert([str(folder)], tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert table.column("prompt").to_pylist() == expected
    assert table.column("id").to_pylist() == (ids or [None] * len(expected))
    first = json.loads(table.column(METADATA)[0].as_py())
    assert first == first | told


def test_the_prompts_that_are_shipped() -> None:
    index = PromptIndex.open("world://prompts/real.json")
    found = index.first(999)
    assert len(found) == len({p.id for p in found}) == len({normal(p.prompt) for p in found}) == 200
    by_category = Counter(p.id.rpartition("-")[0] for p in found)
    assert set(by_category.values()) == {10} and len(by_category) == 20
    assert all(p.prompt == " ".join(p.prompt.split()) for p in found)
    assert sum(len(p.prompt) > 150 for p in found) == by_category["long"], "the rest fits 77 tokens"


def test_datasets_folders_on_disk(tmp_path: Path) -> None:
    """`Dataset.save_to_disk`: Arrow streams beside JSON files; pictures beside prompts stay behind."""
    (folder := tmp_path / "train").mkdir()
    pictures = pa.array([{"bytes": b"\x89", "path": None}] * 3)
    table = pa.table({"caption": ["a", "b", "c"], "image": pictures, "score": [0.5, 1.0, 2.0]})
    for number, rows in enumerate((table.slice(0, 2), table.slice(2))):
        with pa.ipc.new_stream(folder / f"data-{number:05d}-of-00002.arrow", table.schema) as stream:
            stream.write_table(rows)
    with pa.ipc.new_file(folder / "cache-1f.arrow", table.schema) as file:
        file.write_table(table)
    (folder / "state.json").write_text('{"_data_files": []}')
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for path in (tmp_path, folder):
        assert [p.prompt for p in PromptIndex.open(str(path), "caption").first(9)] == ["a", "b", "c"]
    assert len(PromptIndex.open(str(folder / "cache-1f.arrow"), "caption")) == 3  # the file format
    convert.convert([str(folder)], tmp_path / "out", "caption")
    rows = [json.loads(row) for row in pq.read_table(tmp_path / "out").column(METADATA).to_pylist()]
    assert rows[2] == {"caption": "c", "score": 2.0}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("p.json", '{"prompt": "a"}', "expected a list of texts or of objects"),
        ("p.json", '["a", 3]', "expected a list of texts or of objects"),
        ("p.json", '["a"', "not readable as .json"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "not readable as .jsonl"),
        ("p.txt", b"caf\xe9", "not readable as .txt"),
        ("p.arrow", b"ARROW1\0\0nothing", "not readable as .arrow"),
        ("p.csv", "text,n\na,1\n", "it has text, n, metadata"),
        ("p.jsonl", '{"prompt": ["a"]}\n', "it has metadata"),
        ("p.txt", "\n", "not one prompt"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str | bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DIDRError, match=why):
        PromptIndex.open(str(tmp_path))


def test_one_kind_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na\n")
    (tmp_path / "licence.txt").write_text("free")
    with pytest.raises(DIDRError, match=r"files of several kinds \(1 .txt, 1 .csv\)"):
        PromptIndex.open(str(tmp_path))
    assert [p.prompt for p in PromptIndex.open(f"{tmp_path}/*.csv").first(9)] == ["a"]
    pq.write_table(pa.table({"prompt": ["of Parquet"]}), tmp_path / "p.parquet")
    assert [p.prompt for p in PromptIndex.open(str(tmp_path)).first(9)] == ["of Parquet"]


def test_a_file_that_changes_is_read_again_and_long_ones_have_several_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(20_000)))
    index = PromptIndex.open(str(path))
    assert [g.rows for g in index.groups] == [8192, 8192, 3616]
    assert {p.prompt for p in index.read(range(20_000), 0)} == {f"prompt {i}" for i in range(20_000)}
    path.write_text("other")
    assert [p.prompt for p in PromptIndex.open(str(path)).first(2)] == ["other"]


def test_counts_of_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "GROUP", 2)
    table = pa.table({"prompt": ["a cat", None, " ", "A  cat", "b", "c", "d", "e"]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    (tmp_path / "held.txt").write_text("B\nz\n")
    seen: list[str] = []
    source, held = [str(tmp_path / "p.parquet")], [str(tmp_path / "held.txt")]
    found = convert.convert(source, tmp_path / "all", others=held, watch=seen.extend)
    assert found == convert.Found(rows=8, empty=2, duplicates=1, shared=1, example="b", written=6)
    assert (
        seen == ["a cat", "A  cat", "b", "c", "d", "e"] == pq.read_table(tmp_path / "all").column("prompt").to_pylist()
    )
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["prompts.parquet"]
    assert [g.rows for g in PromptIndex.open(str(tmp_path / "all")).groups] == [1, 1, 2, 2]
    convert.convert(source, tmp_path / "few", others=held, drop=True)
    assert pq.read_table(tmp_path / "few").column("prompt").to_pylist() == ["a cat", "c", "d", "e"]
    with pytest.raises(DIDRError, match="holds .parquet files already"):
        convert.convert(source, tmp_path / "few")
    with pytest.raises(DIDRError, match="not one prompt is left of 2 rows"):
        convert.convert(held, tmp_path / "none", others=held, drop=True)
    assert not list((tmp_path / "none").iterdir())
