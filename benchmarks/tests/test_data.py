"""The data benchmark: its arithmetic, its corpus and its stubs, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import data
from didr_core.data.feed import to_batch
from didr_core.data.prompts import PromptIndex, columns


def test_growth_is_between_the_second_and_the_last_fifth() -> None:
    rows = [{"prompts": done, "driver": 50.0 if done < 20 else 100.0 + done} for done in range(0, 101, 5)]
    told = data.growth(rows, 100)
    assert told == {"driver": {"second_fifth": 127.5, "last_fifth": 190.0, "most": 200.0}}
    assert data.growth(rows[:2], 100) == {}  # over before it could be looked at


def test_pace_counts_from_the_first_batch() -> None:
    told = data.pace(iter([10, 20, 30]))
    assert told["start_s"] >= 0 and told["prompts_per_s"] > 0
    assert data.pace(iter([10]))["prompts_per_s"] == 0


def test_the_stubs_make_batches_of_the_corpus(tmp_path: Path) -> None:
    index = PromptIndex.open(data.write_corpus(tmp_path, 60_000))
    assert len(list(tmp_path.iterdir())) == 2
    config = data.recipe(f"data.prompts={tmp_path}", "train.batch=8", "train.steps=1")
    made = columns(index.read(np.arange(8), 0))
    batch = to_batch(data.StubReward(config)(data.StubEncoder(config)(made)))
    assert batch.condition.tensors["x"].shape == (8, 256) and len(set(batch.prompts)) == 8
    assert batch.spread is not None and batch.spread.shape == (8,)
