"""Two workers on this machine, and the parts that `scaling_simulation` makes their step of: `python -m benchmarks.scaling --calibrate`.

Recipe `tiny` at batch 4 as in `benchmarks.overhead`: two plain processes of one CPU thread each, half the batch each, gloo between them. In
turns, so that whatever else the machine does falls on all alike:

- alone: the passes of one process while the other waits;
- side by side: those of both at once, nothing averaged (two programs share caches and memory; GPUs of a cluster do not);
- averaging: the bytes of a TA's and of a generator's gradients, from a common start;
- together: whole steps with averaging, which is what the simulation predicts from the passes side by side and the averaging.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.overhead_case import settings
from benchmarks.scaling_simulation import Cluster, simulate
from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.provenance import provenance
from didr_core.data.feed import LocalFeed
from didr_core.train.distributed import ProcessGroup, Single
from didr_core.train.learner import Learner

BATCH, UPDATES, STEPS, AVERAGINGS = 4, 5, 4, 5
Times = dict[str, list[float]]


class _Passes:
    """A learner's phase hook: seconds of every update."""

    def __init__(self) -> None:
        self.found: Times = {"TA update": [], "generator update": []}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        if name in self.found:
            self.found[name].append(time.perf_counter() - since)

    def take(self) -> Times:
        found, self.found = self.found, {name: [] for name in self.found}
        return found


def _worker(rank: int, config: Config, folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder.resolve()}/meeting", rank=rank, world_size=2)
    group, phase = ProcessGroup(), _Passes()
    learner = Learner(config, parallel=group, phase=phase)
    batches = list(islice(LocalFeed(config, rank=rank, world_size=2), 3))
    gradients = {}
    learner.step(batches[0])  # the first makes memory
    for name, optimizer in (("TA update", learner.assistant_opt), ("generator update", learner.generator_opt)):
        weights = [p for part in optimizer.param_groups for p in part["params"]]
        gradients[name] = [torch.zeros_like(p) for p in weights]
    found: dict[str, Times] = {way: {} for way in ("alone", "side by side", "averaging", "together")}

    def steps(way: str, parallel: Any, runs: bool) -> None:
        learner.parallel = parallel
        dist.barrier()
        phase.take()
        for number in range(STEPS if runs else 0):
            since = time.perf_counter()
            learner.step(batches[number % len(batches)])
            found[way].setdefault("step", []).append(time.perf_counter() - since)
        for name, seconds in phase.take().items():
            found[way].setdefault(name, []).extend(seconds)

    for _ in range(rounds):
        steps("alone", Single(), rank == 0)
        steps("side by side", Single(), True)
        for name in list(gradients) * AVERAGINGS:
            dist.barrier()
            since = time.perf_counter()
            group.mean_(gradients[name])
            found["averaging"].setdefault(name, []).append(time.perf_counter() - since)
        steps("together", group, True)
    sizes = {name: sum(g.numel() * g.element_size() for g in parts) for name, parts in gradients.items()}
    (folder / f"{rank}.json").write_text(json.dumps({"times": found, "bytes": sizes}))
    dist.destroy_process_group()


def spread(values: Sequence[float]) -> float:
    """Relative standard deviation, from the quartiles: a burst of another program is not a jitter of ours."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.349 / middle


def predict(passes: tuple[float, float], averaging: tuple[float, float], jitter: float) -> float:
    """Seconds a step of two workers, by the simulation."""
    cluster = Cluster(
        *passes,
        workers=2,
        assistant_updates=UPDATES,
        assistant_averaging_s=averaging[0],
        generator_averaging_s=averaging[1],
        jitter=jitter,
        steps=200,
    )
    return simulate(cluster).step_s


def compared(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of what both ranks measured, the simulation's step beside theirs, and the ratio of the two."""
    names = ("TA update", "generator update")

    def of(way: str, name: str) -> list[float]:
        return [s for rank in ranks for s in rank["times"][way].get(name, [])]

    middle = {
        way: [statistics.median(of(way, name)) for name in names] for way in ("alone", "side by side", "averaging")
    }
    jitter = spread(of("side by side", "TA update"))
    measured = statistics.median(of("together", "step"))
    averaging = (middle["averaging"][0], middle["averaging"][1])
    out: dict[str, Any] = {"bytes": ranks[0]["bytes"], "jitter": jitter, **middle, "measured_s": measured}
    for way in ("side by side", "alone"):
        step = predict((middle[way][0], middle[way][1]), averaging, jitter)
        out[f"predicted from {way}"] = {"step_s": step, "ratio": step / measured}
    return out


def measure(rounds: int) -> dict[str, Any]:
    """Run both processes and compare: plain data, seconds."""
    steps = 10 * rounds * STEPS
    config = configs.load("tiny", settings(steps, BATCH, 2, prepared=False))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.spawn(_worker, (config, folder, rounds), 2)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    load = os.getloadavg()[0]
    made = {
        "date": date.today().isoformat(),
        "commit": provenance()["commit"],
        "cores": os.cpu_count(),
        "rounds": rounds,
    }
    return {**made, "load": load, **compared(ranks)}
