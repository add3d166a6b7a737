"""What a sweep will need and how long it may take: arithmetic, answered before anything starts."""

from __future__ import annotations

import math
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from didr_core.config import Config
from didr_core.config.files import mapping, read_yaml
from didr_core.data.storage import local_folder
from didr_core.train.run_folder import read_lines
from didr_core.types import DIDRError
from pipelines.cluster.resources import (
    CPU,
    ClusterView,
    Demands,
    Group,
    Need,
    NoRoom,
    Room,
    check,
    demands_of,
    train_need,
)
from pipelines.report.console import clock
from pipelines.sweeps.bench import WORDS
from pipelines.sweeps.folder import SweepOptions, drives_group
from pipelines.sweeps.space import Space, given

DRIVER_CPUS = 0.1  # of a trial that has workers of its own: it waits and reads files
MOST_AT_ONCE = 64
EARLIER_RUNS = 20


def trial_need(config: Config, view: ClusterView, workers: int) -> Need:
    """What a trial's own process reserves: a training worker's share (a GPU, half a one); next to nothing where it only drives others."""
    return Need(DRIVER_CPUS) if drives_group(config, workers) else train_need(config.workers, view)


def sweep_demands(config: Config, view: ClusterView, workers: int, at_once: int) -> Demands:
    """All that runs at the same time: trials x (their process, or driver + workers + actors)."""
    need = trial_need(config, view, workers)
    groups = [Group("trial", at_once, need, "--concurrent", "workers.train_cpus or .train_gpus")]
    if drives_group(config, workers):
        settings = config.workers.model_copy(update={"train": workers})
        for g in demands_of(config.model_copy(update={"workers": settings}), view, most=True).groups:
            groups.append(Group(f"{g.name} of a trial", g.count * at_once, g.need, "--concurrent", g.need_setting))
    return Demands(tuple(groups))


def trials_at_once(
    config: Config, view: ClusterView, workers: int, trials: int, at_once: int | None
) -> tuple[int, Room]:
    """How many trials run at once, and how they are placed: as many as fit (on this machine not more than it has cores), or ``at_once``.

    Raises:
        NoRoom: not even one does, or not ``at_once``.
    """
    if at_once:
        return at_once, check(sweep_demands(config, view, workers, at_once), view)
    most = min(trials, MOST_AT_ONCE)
    if view.local and not config.workers.train_gpus:
        most = min(most, max(1, (os.cpu_count() or 1) // (config.train.threads * workers)))
    found = check(sweep_demands(config, view, workers, 1), view)
    for count in range(2, most + 1):
        try:
            found = check(sweep_demands(config, view, workers, count), view)
        except NoRoom:
            return count - 1, found
    return max(1, most), found


def slots(config: Config, workers: int, at_once: int) -> int:
    """CPUs that a Ray of our own is told it has."""
    needed = sweep_demands(config, ClusterView(()), workers, at_once).totals().get(CPU, 0.0)
    return max(config.workers.local_cpus, os.cpu_count() or 1, math.ceil(needed) + 1)


def earlier_seconds(config: Config) -> float | None:
    """Median seconds a step in earlier runs of this recipe with this batch; None where there is none."""
    found = []
    folders = sorted(local_folder("output", config.output).glob("*/config.yaml"), key=lambda p: -p.stat().st_mtime)
    for path in folders[:EARLIER_RUNS]:
        with suppress(DIDRError):  # a damaged one is not needed
            tree = mapping(path.read_bytes(), str(path), parse=read_yaml)
            same = tree.get("name") == config.name and (tree.get("train") or {}).get("batch") == config.train.batch
            files = [path.parent / "metrics.jsonl", *path.parent.glob("trials/*/metrics.jsonl")] if same else []
            found += [row["time/step"] for file in files for row in read_lines(file) if row.get("time/step")]
    return statistics.median(found) if found else None


def estimate(config: Config, options: SweepOptions, seconds_a_step: float | None) -> str:
    """How long it may take, in words."""
    if seconds_a_step is None:
        return "known when the shared work is done (no earlier run of this recipe to go by)"
    one = seconds_a_step * config.train.steps
    rounds = math.ceil(options.trials / options.concurrent)
    return f"about {clock(one * rounds)} ({options.trials} trials of about {clock(one)}, {options.concurrent} at once), plus shared work"


def plan_table(config: Config, space: Space, options: SweepOptions, found: Room, path: Path) -> Table:
    """The plan for people."""
    said, evaluation = given(options.overrides), config.evaluation
    needs = ", ".join(f"{v:g} {k}" for k, v in trial_need(config, found.cluster, options.workers).amounts().items())
    drives = drives_group(config, options.workers)
    group = (
        f", driving {options.workers} training worker{'s' * (options.workers > 1)} and their actors" if drives else ""
    )
    to_end = "all to their end" if options.scheduler == "none" else "poor ones stopped early by ASHA on the score"
    if config.judge is not None:
        judge = f"{config.judge.name}, which is never trained on"
    else:
        judge = "the training reward: no judge is configured, so trials that hack their reward look good; name one with --set judge=..."
    if evaluation.teacher_steps:
        reference = f"the {evaluation.teacher_steps}-step guided reference"
    else:
        reference = "the start (evaluation.teacher_steps=0: no reference is drawn)"
    rows = {
        "space": f"{space.name}: {space.about}",
        **{f"  {key}": f"{domain.kind} {list(domain.values)}" for key, domain in space.domains.items()},
        **{f"  {key}": f"{value} (fixed)" for key, value in space.fixed.items() if key not in said},
        "trials": f"{options.trials} by {options.search}, {to_end}",
        "each": f"{config.train.steps} steps of {config.train.batch} samples; reserves {needs}{group}",
        "at once": f"{options.concurrent} on {_cluster(found.cluster)}",
        "judged on": f"{evaluation.prompts} held-out prompts x {max(2, evaluation.seeds)} noises by {judge}",
        "objective": f"the front of held-out gain against distance to {reference}; {WORDS}",
        "time": estimate(config, options, earlier_seconds(config)),
        "folder": str(path),
    }
    looks: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": None, "pad_edge": False}
    columns = Column(style="dim"), Column(overflow="fold")
    table = Table(*columns, title=f"sweep {options.name}", show_header=False, **looks)
    for row in rows.items():
        table.add_row(*row)
    return table


def _cluster(view: ClusterView) -> str:
    where = "this machine" if view.local else f"{len(view.nodes)} node(s)"
    return f"{where} ({', '.join(f'{v:g} {k}' for k, v in view.totals().items() if k in (CPU, 'GPU') and v)})"
