"""The prompt stream: a permutation every epoch, the same for a seed, read in parts; and the batches that are made of it."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data import prompts as data
from didr_core.data import shards
from didr_core.data.feed import LocalFeed, PromptEncoder, RewardPreparer, ahead
from didr_core.data.prompts import PromptIndex, columns
from didr_core.types import DIDRError


def write(folder: Path, sizes: list[int], group: int = 8192, **more: object) -> Path:
    """Shards of the given sizes; the prompt says shard and row."""
    folder.mkdir(parents=True, exist_ok=True)
    for s, rows in enumerate(sizes):
        table = {
            "prompt": pa.array([f"prompt {s}:{r}" for r in range(rows)], pa.string()),
            "tags": list(range(rows)),
            **more,
        }
        pq.write_table(pa.table(table), folder / f"{s:03d}.parquet", row_group_size=group)
    return folder


def texts(index: PromptIndex, first: int, last: int, seed: int = 0) -> list[str]:
    return [p.prompt for p in index.read(np.arange(first, last), seed)]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    group=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    window=st.integers(1, 30),
)
def test_every_epoch_is_a_permutation_of_all_rows(rows: list[int], group: int, seed: int, window: int) -> None:
    everything = sorted(f"prompt {s}:{r}" for s in range(len(rows)) for r in range(rows[s]))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WINDOW", window)
        index = PromptIndex.open(str(write(Path(folder), rows, group)))
        data._window.cache_clear()
        for epoch in (0, 1, 5):
            assert sorted(texts(index, epoch * len(index), (epoch + 1) * len(index), seed)) == everything
        data._window.cache_clear()


def test_a_corpus_of_one_window_has_the_order_it_always_had(tmp_path: Path) -> None:
    """Runs of any version go on with the same prompts. Of more windows the order is another since 0.2, and the fingerprint says so."""
    index = PromptIndex.open(str(write(tmp_path / "p", [30, 50, 20], group=8)))
    stream = hashlib.sha256(repr([(p.index, p.id, p.prompt) for p in index.read(np.arange(205), 7)]).encode())
    assert (index.fingerprint, stream.hexdigest()[:12]) == ("52e20894e06bf8ab", "86cda7bdca30")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WINDOW", 99)
        assert index.fingerprint != "52e20894e06bf8ab"


def test_the_stream_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    index = PromptIndex.open(str(write(tmp_path / "p", [30, 50, 20], group=8)))
    whole = texts(index, 0, 300)
    assert len(index) == 100 and sorted(whole[:100]) == sorted(whole[100:200])
    assert whole[:100] != whole[100:200]  # another epoch, another order
    assert whole[:100] != texts(index, 0, 100, seed=1)
    assert texts(index, 137, 260) == whole[137:260]  # in parts, across an epoch's end, from anywhere
    assert len({t.split(":")[0] for t in whole[:12]}) == 3  # a small corpus is shuffled across its shards
    assert [p.id for p in index.read([5], 0)] == [
        f"{int(whole[5].split()[1].split(':')[0]):03d}.parquet:{whole[5].split(':')[1]}"
    ]


def test_file_folder_and_glob_are_the_same_corpus(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", [3, 4])
    assert PromptIndex.open(f"{folder}/*.parquet").fingerprint == PromptIndex.open(str(folder)).fingerprint
    assert len(PromptIndex.open(f"{folder}/001.parquet")) == 4
    assert texts(PromptIndex.open(folder.as_uri()), 0, 7) == texts(PromptIndex.open(str(folder)), 0, 7)


def test_a_million_prompts_open_and_read_like_a_thousand(tmp_path: Path) -> None:
    large = write(tmp_path / "large", [100_000] * 10)
    pool = pa.default_memory_pool()
    taken = pool.bytes_allocated()
    began = time.process_time()
    index = PromptIndex.open(str(large))
    opened = pool.bytes_allocated() - taken
    read = index.read(np.arange(1000), 0)
    seconds = time.process_time() - began
    assert len(index) == 1_000_000 and len(read) == 1000
    assert opened < 2**20  # footers only
    assert pool.bytes_allocated() - taken < 40 * 2**20  # two windows of rows at most, not the 30 MB x 10 of the corpus
    index.read(np.arange(500_000, 500_500), 0)
    assert data._window.cache_info().currsize <= 2  # of WINDOW rows
    assert seconds < 10  # of CPU; about 0.2


@pytest.mark.parametrize(
    "value",
    ["", "  \n", None, "\u00a0\u3000", "\u200b", "\ufeff", "\u2800", "\u3164", "\x00\x1f", "\u2066\u2069", "\ufe0f"],
)
def test_blank_prompts_are_named_by_shard_and_row(tmp_path: Path, value: str | None) -> None:
    prompts = [f"p{r}" for r in range(25)]
    pq.write_table(
        pa.table({"prompt": [*prompts[:17], value, *prompts[18:]]}), tmp_path / "a.parquet", row_group_size=10
    )
    index = PromptIndex.open(str(tmp_path))
    with pytest.raises(DIDRError, match=r"a\.parquet:17 .*non-empty text"):
        list(index.texts())
    with pytest.raises(DIDRError, match=r"a\.parquet:17 "):
        index.read(np.arange(25), 0)
    assert (
        sum(map(len, index.texts(rows=10))) == 10
    )  # a large corpus is looked at in part; the rest is checked when read


def test_what_leaves_ink_is_a_prompt_and_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    shown = ["x", "\ufeffa cat", "\u200b猫", "…", "\U0001f9ff", "e\u0301"]
    pq.write_table(pa.table({"prompt": shown}), tmp_path / "a.parquet")
    index = PromptIndex.open(str(tmp_path))
    assert next(index.texts()) == [p.prompt for p in index.first(9)] == ["x", "a cat", *shown[2:]]


@pytest.mark.parametrize("column", ["prompt", "id"])
def test_text_in_another_encoding_is_named_by_shard_and_row(tmp_path: Path, column: str) -> None:
    good, bad = (pa.array([b"one", b"two \xef\xbf\xbd", last]).view(pa.string()) for last in (b"three", b"caf\xe9"))
    table = pa.table({"prompt": good, "id": good} | {column: bad})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    index = PromptIndex.open(str(tmp_path))
    for read in (lambda: list(index.texts()), lambda: index.first(3), lambda: index.read([0, 1, 2], 0)):
        with pytest.raises(DIDRError, match=rf"a\.parquet:2 \(shard:row, column '{column}'\) is not UTF-8: b'caf"):
            read()


def test_shards_of_all_depths_are_read_hidden_ones_are_not_and_ids_tell_them_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / ".cache" / "p [v2]", [3])
    for name in ("k0", "k1"):
        write(folder / f"kind={name}", [4])
    for name in ("._000.parquet", "_metadata.parquet", ".hidden/000.parquet", "_temporary/000.parquet", "note.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no shard")
    index = PromptIndex.open(str(folder))  # has brackets, and is there: no glob
    assert sorted(p.id for p in index.first(99))[:5] == [
        *(f"000.parquet:{r}" for r in range(3)),
        *(f"kind=k0/000.parquet:{r}" for r in (0, 1)),
    ]
    assert (
        len({p.id for p in index.read(range(11), 0)}) == 11 and "11 prompts in 3 shards, at 2 depths" in index.notes[0]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert len(PromptIndex.open(".")) == len(PromptIndex.open("./")) == 11
    assert len(PromptIndex.open(f"{tmp_path}/.cache/*/*.parquet")) == 3
    assert not PromptIndex.open(str(folder / "kind=k0")).notes


def test_splits_read_together_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", [3, 2, 1])
    for old, new in (("000", "train-00000"), ("001", "train-00001"), ("002", "validation-00000-of-00001")):
        (folder / f"{old}.parquet").rename(folder / f"{new}.parquet")
    assert "several splits are read together: 2 train, 1 validation" in PromptIndex.open(str(folder)).notes[0]
    assert not PromptIndex.open(f"{folder}/train-*.parquet").notes
    assert not PromptIndex.open(str(write(tmp_path / "train", [3, 2]))).notes


def test_other_string_types_are_text_too(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"prompt": pa.array(["a cat", "a dog"], pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        index = PromptIndex.open(str(tmp_path))
        assert sorted(texts(index, 0, 2)) == ["a cat", "a dog"] == next(index.texts())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return configs.load(str(toy_recipe(tmp_path_factory.mktemp("toy"))))


def test_what_a_sample_gets_does_not_depend_on_its_batch(config: Config) -> None:
    index = PromptIndex.open(config.data.prompts)
    encode, prepare = PromptEncoder(config), RewardPreparer(config)

    def made(rows: list[int]) -> dict[str, np.ndarray]:
        return prepare(encode(columns(index.read(rows, config.seed))))

    together, alone = made([3, 9, 4, 100]), made([4])
    assert list(together) == [
        "index",
        "id",
        "prompt",
        "condition/prompt_embeds",
        "condition/pooled",
        "reward/text",
        "baseline",
        "spread",
    ]
    for name in ("condition/prompt_embeds", "reward/text", "baseline", "spread"):
        np.testing.assert_allclose(together[name][2], alone[name][0], rtol=1e-4, atol=1e-5)
    assert together["prompt"][2] == alone["prompt"][0]
    assert (together["spread"] > 0).all()  # the pictures of a prompt differ
    # Row 4 and row 84 are the same corpus of 80 one epoch apart, but other samples: other noise.
    assert made([4])["baseline"] == alone["baseline"]


def test_the_local_feed_resumes_and_splits(config: Config) -> None:
    whole = list(LocalFeed(config))
    assert [b.index.tolist() for b in whole] == [list(range(k, k + 8)) for k in range(0, 48, 8)]
    later = list(LocalFeed(config, 24))
    assert len(later) == 3
    for a, b in zip(whole[3:], later, strict=True):
        assert a.prompts == b.prompts and a.ids == b.ids
        assert torch.equal(a.baseline, b.baseline) and torch.equal(
            a.condition.tensors["pooled"], b.condition.tensors["pooled"]
        )
    halves = [next(iter(LocalFeed(config, 40, rank=r, world_size=2))) for r in range(2)]
    assert [i for h in halves for i in h.index.tolist()] == whole[5].index.tolist()
    torch.testing.assert_close(torch.cat([h.spread for h in halves]), whole[5].spread, rtol=1e-4, atol=1e-5)


def test_ahead_makes_one_batch_more_than_is_used_and_tells_errors_in_their_place() -> None:
    made: list[int] = []

    def source() -> Iterator[Any]:
        for number in range(3):
            made.append(number)
            yield number
        raise DIDRError("shard:4 is empty")

    stream = ahead(source())
    assert next(stream) == 0
    settled(lambda: made == [0, 1])
    assert next(stream) == 1
    settled(lambda: made == [0, 1, 2])
    assert next(stream) == 2
    with pytest.raises(DIDRError, match="shard:4"):
        next(stream)
    assert list(ahead(iter(()))) == []


def settled(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_that_cannot_be_listed_is_named_and_so_is_the_whole_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(pafs.LocalFileSystem):
        def get_file_info(self, asked: Any) -> Any:
            if isinstance(asked, pafs.FileSelector):
                raise PermissionError(13, "Permission denied")
            return super().get_file_info(asked)

    for path in ("/", f"{tmp_path.anchor}tmp/.."):
        with pytest.raises(DIDRError, match="data.prompts='/.*': this is the whole disk"):
            PromptIndex.open(path)
    monkeypatch.setattr(shards, "open_filesystem", lambda path, _: (Closed(), path))
    with pytest.raises(DIDRError, match=r"a folder in it cannot be read \(Permission denied\)"):
        PromptIndex.open(str(tmp_path))
