"""Prompts at an address: the same corpus as on a disk, read again while its server does not answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from random_models import prompt_shards

from didr_core.data import storage
from didr_core.data.prompts import PromptIndex
from didr_core.data.storage import Store, patiently
from didr_core.types import DIDRError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


def fails(times: int, answer: object = "read") -> Callable[..., Any]:
    left = iter([OSError("NETWORK_CONNECTION")] * times)

    def call(*given: object, **more: object) -> object:
        for error in left:
            raise error
        return answer

    return call


def test_the_same_corpus(tmp_path: Path) -> None:
    here = prompt_shards(tmp_path / "prompts", 2, 12)
    store = Store("fsspec+memory:///bucket/prompts")
    for file in Path(here).glob("*.parquet"):
        store.put(file.name, file.read_bytes())
    disk, address = PromptIndex.open(str(here)), PromptIndex.open("fsspec+memory:///bucket/prompts")
    assert address.fingerprint == disk.fingerprint and list(address.texts()) == list(disk.texts())
    assert address.read(np.arange(30), 1) == disk.read(np.arange(30), 1)


def test_a_shard_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("fsspec+memory:///bucket/again")
    for file in Path(prompt_shards(tmp_path / "prompts", 1, 12)).glob("*.parquet"):
        store.put(file.name, file.read_bytes())
    index, read, calls = PromptIndex.open("fsspec+memory:///bucket/again"), pq.ParquetFile.read_row_group, fails(1)

    def late(*given: Any, **more: Any) -> Any:
        calls()
        return read(*given, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", late)
    assert len(index.first(12)) == 12


def test_until_the_server_answers_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SimpleNamespace(get_file_info=fails(5, SimpleNamespace(type="File")))
    assert patiently(gone, "x", fails(6)) == "read"
    answers = SimpleNamespace(get_file_info=lambda path: SimpleNamespace(type="File"))
    with pytest.raises(OSError, match="NETWORK"):  # of a file that is damaged: read twice
        patiently(answers, "x", fails(2))
    monkeypatch.setattr(storage, "WAIT_S", 0.0)
    with pytest.raises(OSError, match="NETWORK"):
        patiently(gone, "x", fails(1))


def test_an_address_that_is_no_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match=r"data.prompts='ftp://host/x'.*Expected s3, gs, abfs.*fsspec\+NAME"):
        PromptIndex.open("ftp://host/x")
    with pytest.raises(DIDRError, match="no such file or folder"):
        PromptIndex.open("fsspec+memory:///bucket/none")
