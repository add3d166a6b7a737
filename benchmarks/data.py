"""How fast prompts come: through encoder and reward actors, from a cache, and a million of them in flat memory.

    python -m benchmarks.data                              # about five minutes on two idle cores
    python -m benchmarks.data --prompts 50000              # a shorter stream

- Pools of 1, 2 and 4 encoder actors and as many reward actors, of recipe `tiny` and its models, one CPU thread an actor, and one process
  alone: prompts a second from the first batch to the last, with an empty cache (`data.cache`), which is filled, and with a full one. More
  actors than cores cannot be faster.
- A stream of `--prompts` through the same reading tasks, repartitioning and actor pools, but with stub actors which only make 1 KiB a
  prompt: the models would take hours, and what is asked is whether anything grows. Memory of driver, actors and all else of Ray
  (each process's own), and of the object store, is sampled while the stream runs; growth is that between its second fifth and its last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import Tree, wait_until_idle
from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.provenance import provenance
from didr_core.data.feed import LocalFeed
from didr_core.data.prompts import Columns, open_prompts
from pipelines.cluster.resources import Need
from pipelines.cluster.session import ray_session

SMALL = Need(cpus=0.25)
MIB = 2**20
BLOCK = 1000
"""Prompts a block of the long stream."""


class StubEncoder:
    """Makes 1 KiB a prompt."""

    def __init__(self, tree: dict[str, Any]) -> None: ...

    def __call__(self, batch: Columns) -> Columns:
        """Adds a condition."""
        return {**batch, "condition/x": np.zeros((len(batch["index"]), 256), np.float32)}


class StubReward:
    """Makes two numbers a prompt."""

    def __init__(self, tree: dict[str, Any]) -> None: ...

    def __call__(self, batch: Columns) -> Columns:
        """Adds baseline and spread."""
        number = np.ones(len(batch["index"]), np.float32)
        return {**batch, "baseline": number, "spread": number}


def recipe(*changes: str) -> Config:
    """Recipe `tiny` for one trainer."""
    return configs.load("tiny", ["workers.train=1", *changes])


def stream(config: Config, stages: Any = None) -> Iterator[int]:
    """Prompts that have arrived at the trainer so far, a batch at a time."""
    from pipelines.cluster import prompts, worker

    made = prompts.prompt_stream(config, open_prompts(config), 0, SMALL, SMALL, *([stages] if stages else []))
    made.context.execution_options = prompts.execution_options()
    (shard,) = made.streaming_split(1, equal=True)
    for done, batch in enumerate(worker.batches(shard, config.sizes.share), 1):
        assert int(batch.index[0]) == (done - 1) * len(batch), "batches must come in order"
        yield done * len(batch)


def pace(counts: Iterator[int]) -> dict[str, float]:
    """Seconds until the first of ``counts``, and how many a second from then on."""
    began = time.perf_counter()
    first = next(counts)
    started = time.perf_counter()
    last = max(counts, default=first)
    return {"start_s": started - began, "prompts_per_s": (last - first) / (time.perf_counter() - started)}


def pools(count: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of both states of a cache for each size of the two pools."""
    rows = []
    for size in sizes:
        told = f"{size} encoder and {size} reward actor{'s' * (size > 1)}"
        rows += cached(told, stream, count, f"workers.encoders={size}", f"workers.rewards={size}")
    return rows


def alone(config: Config) -> Iterator[int]:
    """Prompts that one process has made batches of so far."""
    for done, batch in enumerate(LocalFeed(config), 1):
        yield done * len(batch)


def cached(told: str, counts: Callable[[Config], Iterator[int]], count: int, *changes: str) -> list[dict[str, Any]]:
    """``counts`` with an empty cache, which it fills, then with a full one."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(f"data.cache={folder}", f"train.steps={-(-count // 24)}", *changes)
        for state in ("cold", "warm"):
            rows.append({"case": f"{told}, cache {state}", **pace(counts(config))})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def write_corpus(folder: Path, rows: int) -> str:
    """Prompt shards of 50,000 rows."""
    for first in range(0, rows, 50_000):
        numbers = range(first, min(first + 50_000, rows))
        table = pa.table({"id": [str(i) for i in numbers], "prompt": [f"prompt {i} " + "x" * 40 for i in numbers]})
        pq.write_table(table, folder / f"{first:09d}.parquet", row_group_size=8192)
    return str(folder)


@contextmanager
def sampled(done: Sequence[int], every: float = 1.0) -> Iterator[list[dict[str, float]]]:
    """Inside, a list grows by a row every so often: prompts ``done`` (the last entry), and MiB by process and in the object store."""
    import ray

    rows: list[dict[str, float]] = []
    over, tree = threading.Event(), Tree(os.getpid())
    whole = ray.cluster_resources()["object_store_memory"]

    def work() -> None:
        while not over.wait(every):
            tree.look(memory=True)
            held = {name: used / MIB for name, used in tree.held().items()}
            driver, actors = held.pop("driver"), held.pop("StubEncoder", 0.0) + held.pop("StubReward", 0.0)
            stored = (whole - ray.available_resources().get("object_store_memory", whole)) / MIB
            rest = sum(held.values())
            rows.append(
                {"prompts": done[-1], "driver": driver, "actors": actors, "rest of Ray": rest, "object store": stored}
            )

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield rows
    finally:  # before Ray ends
        over.set()
        thread.join()


def growth(rows: Sequence[Mapping[str, float]], total: int) -> dict[str, dict[str, float]]:
    """MiB by holder: medians of the second and of the last fifth of the stream, and the most; empty where a fifth has no sample."""
    early = [row for row in rows if 0.2 * total <= row["prompts"] < 0.4 * total]
    late = [row for row in rows if 0.8 * total <= row["prompts"]]
    if not early or not late:
        return {}
    told = {}
    for name in (key for key in rows[0] if key != "prompts"):
        before, after = (statistics.median(row[name] for row in part) for part in (early, late))
        told[name] = {"second_fifth": before, "last_fifth": after, "most": max(row[name] for row in rows)}
    return told


def long_stream(count: int) -> dict[str, Any]:
    """Stub actors; memory while it runs."""
    steps = max(1, count // BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder), steps * BLOCK)
        config = recipe(f"data.prompts={corpus}", f"train.batch={BLOCK}", f"train.steps={steps}")
        done = [0]

        def counted() -> Iterator[int]:
            for done[-1] in stream(config, (StubEncoder, StubReward)):
                yield done[-1]

        with sampled(done) as rows:
            speed = pace(counted())
    return {"prompts": steps * BLOCK, **speed, "mib": growth(rows, steps * BLOCK)}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    text = [
        "# How fast prompts come\n",
        f"`{report['command']}`, {report['cores']} CPU cores ({report['machine']}), {report['date'][:10]}, commit {report['commit']}; "
        f"other programs kept {report['busy_before']:.2f} cores busy before. `benchmarks/data.py` says what is measured.\n",
        "| recipe `tiny`, its own models | first batch after, s | prompts a second |",
        "|---|---|---|",
        *(f"| {row['case']} | {row['start_s']:.1f} | {row['prompts_per_s']:,.0f} |" for row in report["rows"]),
    ]
    if long := report.get("stream"):
        text += [
            f"\n{long['prompts']:,} prompts through stub actors (1 KiB each): {long['prompts_per_s']:,.0f} a second, the first batch after "
            f"{long['start_s']:.1f} s. Memory, MiB:\n",
            "| | second fifth of the stream | last fifth | most |",
            "|---|---|---|---|",
        ]
        for name, row in long["mib"].items():
            text.append(f"| {name} | {row['second_fifth']:.0f} | {row['last_fifth']:.0f} | {row['most']:.0f} |")
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line each, write JSON and Markdown; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=1_000_000, help="of the long stream; 0 = none")
    parser.add_argument("--pool-prompts", type=int, default=1_200, help="through the real actors")
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for idle cores")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder of data.json and data.md"
    )
    given = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "command": "python -m benchmarks.data",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        **provenance(),
        "busy_before": wait_until_idle(given.patience),
        "pool_prompts": given.pool_prompts,
    }
    root = str(Path(__file__).parents[1])  # Ray's workers import the stubs from here
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    report["rows"] = cached("one process", alone, given.pool_prompts)
    with ray_session("local", 4):
        report["rows"] += pools(given.pool_prompts, given.pools)
        if given.prompts:
            report["stream"] = long_stream(given.prompts)
            print(json.dumps(report["stream"]), flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "data.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.output / "data.md").write_text(markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
