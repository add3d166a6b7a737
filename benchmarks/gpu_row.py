"""One row of `benchmarks.gpu_step`, in a process of its own: build it around random weights, time its update, trace one.

    python -m benchmarks.gpu_row '{"name": "try", "recipe": "sdxl_1gpu", "set": {"train.batch": 4}}' --size tiny --output row.json

Time is taken from the device's own events, beside the host's clock; nothing waits inside an update but what the update itself waits for.
What is known is written as it comes, so that a time limit in the trace costs the trace alone.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import hollow_sdxl
from benchmarks.plain_loop import Plain
from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.provenance import provenance
from didr_core.config.sections import Train
from didr_core.plan import hollow, published
from didr_core.train.learner import Learner
from didr_core.types import Batch
from didr_core.world import random_models

GIB = 2**30
MOST_UPDATES, MOST_SECONDS = 3, 20.0
"""At most so many updates are timed, and no further one is begun that would end later than this."""
KERNELS = 20


def config_of(row: Mapping[str, Any], size: str, folder: Path) -> Config:
    """The row's recipe with what it sets, around sizes without weights: the published ones, or toy ones written into ``folder``.

    Raises:
        DIDRError: a key or value that this version does not know.
    """
    values: dict[str, Any] = {"name": "gpu_step", "judge": None, "data": {"prompts": "none"}}
    values |= {"backbone.pipeline": "none", "backbone.generator": "none", "reward.path": "none"}
    values["train.assistant_warmup"] = 0  # every iteration that is timed is a whole one
    values["roles.gradient_checkpointing"] = True  # where recipes leave it to what fits
    family = configs.load(row["recipe"]).backbone.name
    if size == "tiny":
        parts = random_models.PARTS[family]
        toy = {part: parts[part] for part in ("unet", "transformer", "vae") if part in parts}
        values["backbone.pipeline"] = str(published.write(family, folder / "toy", **toy))
        values["reward"] = hollow_sdxl.reward("tiny", folder)
        values |= {"backbone.resolution": 64, "roles.rank": 4}
        del values["reward.path"]
    compiled = row.get("compile", "none")
    if compiled != "none" or "compile" in Train.model_fields:
        values["train.compile"] = compiled
    values |= row.get("set", {})
    if size == "tiny" and family == "zimage":
        values["backbone.max_tokens"] = 20
    return configs.load(row["recipe"], values=values)


def case_of(row: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What a reader must know to compare a row with another."""
    train, roles, drp = config.train, config.roles, config.drp
    return {
        "loop": row.get("loop", "ours"),
        "family": config.backbone.name,
        "generator": roles.generator,
        "assistant": roles.assistant,
        "estimator": drp.estimator,
        "batch": train.batch,
        "micro": config.sizes.micro_batch,
        "updates": config.sizes.assistant_updates,
        "checkpointing": roles.gradient_checkpointing,
        "compiled": row.get("compile", "none") != "none",
    }


def prompts(backbone: Any, size: int, device: torch.device | str) -> Batch:
    """Random conditions of ``size`` prompts."""
    torch.manual_seed(7)
    names = [str(i) for i in range(size)]
    condition = backbone.blank(size).map(lambda v: torch.randn_like(v) if v.is_floating_point() else v)
    return Batch(torch.arange(size), names, names, condition, {}, torch.zeros(size), torch.full((size,), 0.01)).to(
        device
    )


class Clock:
    """Seconds and peak memory of an update's phases, by name. Phases lie in one another; a peak counts for all that are open."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[
            tuple[str, int, Any, Any, float]
        ] = []  # name, depth, begin and end on the device, host's seconds
        self.peaks: dict[str, int] = defaultdict(int)
        self._open: list[int] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Everything inside counts for ``name``."""
        self._note_peak()
        self._open.append(0)
        begin, began = self._mark(), time.perf_counter()
        try:
            yield
        finally:
            self.spans.append((name, len(self._open) - 1, begin, self._mark(), time.perf_counter() - began))
            self._note_peak()
            self.peaks[name] = max(self.peaks[name], self._open.pop())

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _note_peak(self) -> None:
        if self.cuda:
            most = torch.cuda.max_memory_allocated()
            self._open = [max(peak, most) for peak in self._open]
            torch.cuda.reset_peak_memory_stats()

    def table(self) -> dict[str, dict[str, float]]:
        """By phase: seconds on the device and of the host, calls, peak in GiB; of all updates together. "passes" are the innermost
        update's parts: all but the optimizer, which waits for the device."""
        wait(self.cuda)
        out: dict[str, dict[str, float]] = defaultdict(lambda: {"s": 0.0, "host_s": 0.0, "calls": 0})
        for name, depth, begin, end, host in self.spans:
            seconds = begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
            for key in (name, "passes") if depth == 2 else (name,):
                row = out[key]
                row["s"], row["host_s"], row["calls"] = row["s"] + seconds, row["host_s"] + host, row["calls"] + 1
        for name, peak in self.peaks.items() if self.cuda else ():
            out[name]["peak_gib"] = peak / GIB
        return dict(out)


def wait(cuda: bool) -> None:
    """For the device, where there is one."""
    if cuda:
        torch.cuda.synchronize()


def measure(subject: Any, batch: Batch, clock: Clock) -> dict[str, Any]:
    """One update to warm up, then as many as fit into :data:`MOST_SECONDS`: means of one."""
    began = time.perf_counter()
    subject.step(batch)  # kernels are chosen, moments are made, blocks compiled
    wait(clock.cuda)
    warm = time.perf_counter() - began
    clock.spans.clear()
    clock.peaks.clear()
    began, times = time.perf_counter(), 0
    while times < MOST_UPDATES and (time.perf_counter() - began) * (times + 1) <= MOST_SECONDS * max(times, 1):
        with clock("update"):
            subject.step(batch)
        wait(clock.cuda)
        times += 1
    seconds = (time.perf_counter() - began) / times
    phases = {
        name: {key: value if key == "peak_gib" else value / times for key, value in row.items()}
        for name, row in clock.table().items()
    }
    whole = phases.pop("update")
    return {
        "fits": True,
        "updates_timed": times,
        "warm_s": warm,
        "s_per_update": seconds,
        "images_per_s": len(batch) / seconds,
        "peak_gib": whole.get("peak_gib"),
        "phases": phases,
    }


def traced(subject: Any, batch: Batch, cuda: bool, file: Path) -> dict[str, Any]:
    """One update under the profiler, the device's activity alone; a Chrome trace in ``file`` (.json.gz)."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        began = time.perf_counter()
        subject.step(batch)
        wait(cuda)
        seconds = time.perf_counter() - began
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))
    with gzip.open(file) as text:
        return heaviest(json.load(text)["traceEvents"], seconds)


def heaviest(events: Iterable[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Of a Chrome trace: the heaviest kernels (on a CPU: operators) by their own time, and the share of ``seconds`` without any."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset", "cpu_op")
    ran = [e for e in events if e.get("ph") == "X" and e.get("cat") in kinds]
    own: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])  # calls, microseconds
    inside: list[tuple[Any, float, str]] = []  # thread, end, name of the events that are open
    for e in sorted(ran, key=lambda e: (str(e["pid"]), str(e["tid"]), e["ts"], -e["dur"])):
        thread = e["pid"], e["tid"]
        while inside and (inside[-1][0] != thread or inside[-1][1] <= e["ts"]):
            inside.pop()
        if inside:
            own[inside[-1][2]][1] -= e["dur"]
        own[e["name"]][0] += 1
        own[e["name"]][1] += e["dur"]
        inside.append((thread, e["ts"] + e["dur"], e["name"]))
    busy = until = 0.0
    for e in sorted(ran, key=lambda e: e["ts"]):
        end = e["ts"] + e["dur"]
        busy += max(0.0, end - max(e["ts"], until))
        until = max(until, end)
    rows = sorted(own.items(), key=lambda item: -item[1][1])[:KERNELS]
    return {
        "traced_s": seconds,
        "launches": len(ran),
        "busy_s": busy / 1e6,
        "idle_share": 1 - busy / 1e6 / seconds,
        "kernels": [{"name": name[:120], "calls": int(n), "s": us / 1e6} for name, (n, us) in rows],
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers are of, with the rate of one large matrix product: the peak that can be reached."""
    cuda = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    for times in (2, 10):  # the first to warm up
        wait(cuda)
        began = time.perf_counter()
        for _ in range(times):
            a @ a
        wait(cuda)
        seconds = (time.perf_counter() - began) / times
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if cuda else None,
        "cuda": torch.version.cuda,
        "matmul_tflops": 2 * side**3 / seconds / 1e12,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the row; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("row", type=json.loads)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, row = Clock(device), given.row
    with TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        config = config_of(row, given.size, folder)
        out = {"name": row["name"], "size": given.size, "case": case_of(row, config), "hardware": hardware(device)}
        out |= {"date": datetime.date.today().isoformat(), **provenance()}
        given.output.write_text(json.dumps(out))
        try:
            if row.get("loop") == "plain":
                subject: Any = Plain(config, folder / "published", device, clock)
            else:
                backbone = hollow.backbone(config.backbone, folder / "published", str(device))
                reward: Any = hollow.Reward(config.reward, str(device))
                subject = Learner(config, device=device, backbone=backbone, reward=reward, phase=clock)
            wait(clock.cuda)
            out["build_s"] = time.perf_counter() - began
            batch = prompts(subject.backbone, config.train.batch, device)
            out |= measure(subject, batch, clock)
            given.output.write_text(json.dumps(out))
            if row.get("trace"):
                out |= traced(subject, batch, clock.cuda, given.output.with_suffix(".trace.json.gz"))
        except torch.cuda.OutOfMemoryError:
            out.setdefault("fits", False)
    given.output.write_text(json.dumps(out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
