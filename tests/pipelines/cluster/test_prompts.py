"""The Ray Data stream: order and exact resume whatever the pools, the same numbers as one process, flat memory with a million prompts."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from stages import Encoder, Preparer, WideEncoder
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data.feed import LocalFeed
from didr_core.data.prompts import PromptIndex
from didr_core.plan.preflight import preflight
from didr_core.train.loop import outcome, train
from didr_core.train.run_folder import RunFolder
from didr_core.types import Batch
from didr_core.world import random_models
from pipelines.align import align
from pipelines.cluster.resources import Need

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_here")]

SMALL = Need(cpus=0.25)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


def ranks(
    config: Config, cursor: int, stages: Any = None, limit: int | None = None
) -> tuple[list[list[Batch]], list[float]]:
    """What each rank receives, read by all ranks at once; and when the first batch came."""
    from pipelines.cluster import prompts, worker

    began = time.perf_counter()
    index = PromptIndex.open(config.data.prompts)
    stream = prompts.prompt_stream(config, index, cursor, SMALL, SMALL, *([stages] if stages else []))
    stream.context.execution_options = prompts.execution_options()
    stream.context.wait_for_min_actors_s = 900  # whole pools, however late a process starts
    received: list[list[Batch]] = [[] for _ in range(config.workers.train)]
    firsts: list[float] = []

    def read(rank: int, shard: Any) -> None:
        for batch in worker.batches(shard, config.sizes.share):
            firsts.append(time.perf_counter() - began)
            received[rank].append(batch)
            if limit and len(received[rank]) == limit:
                return

    threads = [
        threading.Thread(target=read, args=pair)
        for pair in enumerate(stream.streaming_split(config.workers.train, equal=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return received, firsts


def test_order_and_exact_resume_with_pools_of_one_and_two(toy: Path) -> None:
    steps, share = 40, 4
    base = [f"train.steps={steps}"]
    two = configs.load(str(toy), [*base, "workers.encoders=2", "workers.rewards=2"])
    whole, _ = ranks(two, 0, (Encoder, Preparer))
    for rank in range(2):
        assert [b.index.tolist() for b in whole[rank]] == [
            list(range(k * 8 + rank * share, k * 8 + (rank + 1) * share)) for k in range(steps)
        ]
    assert len({p for r in whole for b in r for p in b.condition.tensors["pid"].tolist()}) == 2  # both actors took part
    expected = [p.prompt for p in PromptIndex.open(two.data.prompts).read(np.arange(steps * 8), two.seed)]
    assert [p for k in range(steps) for r in range(2) for p in whole[r][k].prompts] == expected

    later, _ = ranks(configs.load(str(toy), base), 8 * 17, (Encoder, Preparer))  # pools of one, from step 17
    for rank in range(2):
        assert len(later[rank]) == steps - 17
        for a, b in zip(whole[rank][17:], later[rank], strict=True):
            assert a.index.tolist() == b.index.tolist() and a.prompts == b.prompts and a.ids == b.ids
            assert torch.equal(a.condition.tensors["x"], b.condition.tensors["x"]) and torch.equal(a.spread, b.spread)


def test_the_real_actors_give_what_one_process_gives(toy: Path) -> None:
    config = configs.load(str(toy), ["train.steps=2"])
    received, _ = ranks(config, 0)
    for step, whole in enumerate(LocalFeed(config)):
        parts = [received[rank][step] for rank in range(2)]
        assert [i for p in parts for i in p.ids] == whole.ids
        for name in ("prompt_embeds", "pooled"):
            together = torch.cat([p.condition.tensors[name] for p in parts])
            torch.testing.assert_close(together, whole.condition.tensors[name], rtol=1e-4, atol=1e-5)
        text = torch.cat([p.reward_inputs["text"] for p in parts])
        torch.testing.assert_close(text, whole.reward_inputs["text"], rtol=1e-4, atol=1e-5)
        for name in ("baseline", "spread"):
            made = torch.cat([getattr(p, name) for p in parts])
            torch.testing.assert_close(made, getattr(whole, name), rtol=1e-3, atol=1e-4)


def test_precomputed_runs_have_the_stream_s_numbers_bit_for_bit(toy: Path, tmp_path: Path) -> None:
    """Two workers: as a stream, then from what the actors made beforehand, then again with nothing left to make."""
    settings = ["train.steps=4", "evaluation.prompts=0", "evaluation.grid=2", f"data.cache={tmp_path / 'cache'}"]
    runs, kept = [align(str(toy), settings[:-1], output=str(tmp_path / "stream"))], []
    for name in ("made", "found"):
        runs.append(align(str(toy), [*settings, "workers.precompute=true"], output=str(tmp_path / name)))
        kept.append({p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.parquet")})
    assert kept[0] == kept[1] and len(kept[0]) == 2 * 4 * 2  # ranks, steps, stages
    weights = [{f.name: load_file(f) for f in run.checkpoint(4).glob("*.safetensors")} for run in runs]
    assert len(weights[0]) >= 3
    for other in weights[1:]:
        for file, tensors in weights[0].items():
            assert [k for k, v in tensors.items() if not torch.equal(v, other[file][k])] == [], file
    lines = [[json.loads(line) for line in run.metrics_path.read_text().splitlines()] for run in runs]
    for rows in zip(*lines, strict=True):
        for row in rows:
            row.update({"time": 0, "time/step": 0, "time/data": 0})
        assert rows[0] == rows[1] == rows[2]


def test_tiny_zimage_trains_with_two_workers_as_with_one(tmp_path: Path) -> None:
    """The whole job on the cluster that is there: long padded conditions, a network that takes lists and is split over two ranks."""
    pipeline = random_models.zimage(tmp_path / "zimage")
    settings = [f"backbone.pipeline={pipeline}", "train.steps=2", "train.checkpoint_every=2", "evaluation.grid=2"]
    settings += ["evaluation.prompts=0", "tracking.uri=none"]
    two = align("tiny_zimage", [*settings, "roles.fsdp=true", "evaluation.every=2"], output=str(tmp_path / "two"))
    one = RunFolder.create(config := configs.load("tiny_zimage", [*settings, "workers.train=1"]), str(tmp_path / "one"))
    with outcome(one):
        train(config, one, preflight(config))
    assert (two.path / "export" / "transformer").is_dir() and (two.path / "grid.png").is_file()
    assert (two.path / "grids" / "step-000002.png").is_file()
    assert (two.checkpoint(2) / "generator.1.safetensors").is_file()
    rows = [[json.loads(line) for line in run.metrics_path.read_text().splitlines()] for run in (two, one)]
    for ours, theirs in zip(*rows, strict=True):
        for key in ("loss/assistant", "loss/generator", "reward/gain", "grad/generator", "grad/assistant"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-3), key
    align(resume=str(two.path), overrides=["train.steps=3", "workers.train=1"], local=True)
    assert two.last_step() == 3 and not list(two.checkpoint(3).glob("*.1.safetensors"))


def corpus(folder: Path, rows: int) -> str:
    folder.mkdir()
    size = min(rows, 50_000)
    for s in range(rows // size):
        table = pa.table(
            {"id": [f"{s}-{r}" for r in range(size)], "prompt": [f"prompt {s} {r} " + "x" * 40 for r in range(size)]}
        )
        pq.write_table(table, folder / f"{s:03d}.parquet", row_group_size=8192)
    return str(folder)


def test_a_million_prompts_start_as_fast_and_stay_as_small(toy: Path, tmp_path: Path) -> None:
    """An epoch of each corpus as one stream; twenty batches are taken. Prints what it measures (`pytest -s`)."""
    driver = psutil.Process()
    seen: dict[int, tuple[float, float]] = {}
    for rows in (1_000, 1_000_000):
        config = configs.load(
            str(toy), [f"data.prompts={corpus(tmp_path / str(rows), rows)}", f"train.steps={rows // 8}"]
        )
        before = driver.memory_info().rss
        received, firsts = ranks(config, 0, (Encoder, Preparer), limit=20)
        grown = (driver.memory_info().rss - before) / 2**20
        assert all(len(r) == 20 for r in received)
        seen[rows] = (min(firsts), grown)
        print(f"\n{rows:>9,} prompts: first batch after {min(firsts):.1f} s, driver grew by {grown:.0f} MiB")
    assert (
        seen[1_000_000][0] < 3 * seen[1_000][0] + 30
    )  # a crowded machine; a start that reads all rows takes 1,000 times
    assert seen[1_000_000][1] < 100  # the text alone would be 60 MB, its samples as Python objects 300 MB


def test_a_slow_trainer_holds_back_the_encoders(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 MiB with 64 MiB allowed ahead: the object store must not fill up with the 2,000 that the run will need."""
    import ray

    from pipelines.cluster import prompts, worker

    monkeypatch.setattr(prompts, "AHEAD_BYTES", 64 * 2**20)
    config = configs.load(str(toy), ["train.steps=1000"])
    stream = prompts.prompt_stream(
        config, PromptIndex.open(config.data.prompts), 0, SMALL, SMALL, (WideEncoder, Preparer)
    )
    stream.context.execution_options = prompts.execution_options()
    whole = ray.cluster_resources()["object_store_memory"]

    def used() -> float:
        return (whole - ray.available_resources().get("object_store_memory", 0.0)) / 2**20

    before = used()
    shards = [worker.batches(s, config.sizes.share) for s in stream.streaming_split(2, equal=True)]
    most = 0.0
    for _ in range(3):
        threads = [threading.Thread(target=next, args=(shard,)) for shard in shards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(10):  # time in which nothing is taken
            time.sleep(0.5)
            most = max(most, used() - before)
    print(f"\nobject store: at most {most:.0f} MiB ahead of the trainer")
    assert 2 < most < 256
