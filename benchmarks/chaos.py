"""What does a run survive? Faults of every kind (`chaos_faults.py`), at random moments from start to export, on real runs.

    python -m benchmarks.chaos --faults 100 --seed 0    # goes on where it was; nice 10 beside other work
    python -m benchmarks.chaos --table                  # what all seeds have shown so far, as Markdown

A voyage is one run folder of recipe `exact_2d` (under Ray: two workers and a black-box reward in an actor; else one process) that a few
faults happen to, one after the other; where one ends the run, `didr align --resume` goes on. At its end it is compared with a run that
nothing happened to: the same bits in every tensor of the last checkpoint, the same metrics, a whole export. Outcomes:

    survived          the run went on by itself
    moot              the run was over, or what was to be hit was not there any more
    failed cleanly    it ended with the right exit code, status and sentence, and `--resume` went on
    unclean           it ended in another way (a traceback, a wrong status or sentence)
    lost              more steps than lie between two checkpoints (and two: one is written while training goes on), or no way on
    hung              no end and no step within patience
    wrong             at the end other numbers than those of the undisturbed run

One line of JSON a fault in `<work>/seed-<n>.jsonl`, written when its voyage is over. A voyage that was itself cut short is made again,
which `attempt` says. Exits with 1 where anything was unclean, lost, hung or wrong. Linux; a full disk needs root (a tmpfs is mounted).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos_faults import KINDS, Door, mode
from benchmarks.chaos_voyage import STEPS, Fault, Sailing
from benchmarks.sweep_soak import Soaked
from didr_core.train.run_folder import RunFolder, read_lines

ROOT = Path(__file__).resolve().parents[1]
GOOD = ("survived", "failed cleanly", "moot")
OUTCOMES = (*GOOD, "unclean", "lost", "hung", "wrong")
FAULTS = {"ray": 4, "local": 6, "mlflow": 1}  # a voyage


@dataclass
class Voyage:
    number: int
    job: str
    faults: list[Fault] = field(default_factory=list)


def plan(seed: int) -> Iterator[Voyage]:
    """Endless; every kind once before any comes again."""
    rng = random.Random(seed)
    begun: dict[str, Voyage] = {}
    number = voyages = 0
    while True:
        for kind in rng.sample(sorted(KINDS), len(KINDS)):
            job = KINDS[kind].job
            if job not in begun:
                begun[job], voyages = Voyage(voyages, job), voyages + 1
            seconds = rng.uniform(1, 30 if job == "ray" else 10)
            early = KINDS[kind].early and rng.random() < 0.25
            begun[job].faults.append(Fault(number, kind, seconds=seconds if early else None))
            number += 1
            if len(begun[job].faults) == FAULTS[job]:
                yield _timed(begun.pop(job), rng)


def _timed(voyage: Voyage, rng: random.Random) -> Voyage:
    """Steps for its faults, in order; of three voyages one has its last fault while it draws, scores and exports."""
    most = len(voyage.faults)
    voyage.faults.sort(key=lambda fault: not KINDS[fault.kind].first)
    for i, fault in enumerate(voyage.faults):
        fault.moment = 1 + int((STEPS[voyage.job] - 8) / most * (i + rng.random()))
        if KINDS[fault.kind].first:
            fault.moment = 0
        elif i + 1 == most > 1 and rng.random() < 0.3:
            fault.moment = STEPS[voyage.job]
    return voyage


def undisturbed(work: Path, job: str) -> Sailing:
    """A run that nothing happens to, made once."""
    job = "ray" if job == "ray" else "local"  # tracking changes no number
    sailing = Sailing(work / f"undisturbed-{job}", job, 0)
    if not (sailing.folder / "whole").is_file():
        shutil.rmtree(sailing.folder, ignore_errors=True)
        sailing.prepare(full_disk=False)
        if wrong := sailing.arrive():
            raise SystemExit(f"the undisturbed run failed: {wrong}; see {sailing.folder}/log")
        sailing.end()
        (sailing.folder / "whole").touch()
    return sailing


def sail(work: Path, seed: int, voyage: Voyage, door: Door | None) -> list[dict[str, Any]]:
    """One voyage; returns its rows."""
    kinds = [fault.kind for fault in voyage.faults]
    folder = work / f"seed-{seed}-voyage-{voyage.number:03d}"
    attempts = len(list(work.glob(f"{folder.name}*")))
    if folder.exists():
        if (folder / "disk").is_mount():
            subprocess.run(["umount", "--lazy", str(folder / "disk")], check=True)
        folder.rename(folder.with_name(f"{folder.name}.cut-{attempts}"))
        print(f"voyage {voyage.number} was cut short: made again (attempt {attempts + 1})", flush=True)
    expected = undisturbed(work, voyage.job).result()
    if door:
        door.open()
    sailing = Sailing(folder, voyage.job, seed * 1000 + voyage.number, door)
    sailing.prepare(full_disk="disk full" in kinds)
    (folder / "kinds").write_text("\n".join(kinds))
    rows = []
    try:
        for fault in voyage.faults:
            rows.append(sailing.suffer(fault))
        wrong = sailing.arrive()
        if not wrong:
            tensors, numbers = sailing.result()
            bad = [k for k, v in expected[0].items() if k not in tensors or not torch.equal(v, tensors[k])]
            wrong = f"other bits in {len(bad)} tensors" if bad else "" if numbers == expected[1] else "other metrics"
    finally:
        mode("")(sailing)
        orphans = sailing.end()
    shared = {"seed": seed, "voyage": voyage.number, "job": voyage.job, "attempt": attempts + 1}
    for row in rows:
        if "recovery_s" in row:
            row["recovery_s"] = round(row["recovery_s"], 1)
        if wrong and row["outcome"] in GOOD:
            row |= {"outcome": "wrong", "why": wrong}
    rows[-1]["orphans"] = orphans
    return [shared | row for row in rows]


@contextlib.contextmanager
def mlflow_server(work: Path) -> Iterator[Door]:
    """A tracking server behind a door."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    uri = f"sqlite:///{work}/server.db"
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    words += ["--port", str(ports[1]), "--workers", "1", "--artifacts-destination", str(work / "artifacts")]
    door = Door(*ports)
    with Soaked(words, work / "server.log"):
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ports[1])):
                break
            time.sleep(0.2)
        door.open()
        yield door
        door.shut()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """By kind: how often each outcome, seconds from the fault to the next new step, steps that had to be taken again."""
    lines = [f"| fault | {' | '.join(OUTCOMES)} | recovery, s: median (most) | steps lost, most |"]
    lines.append("|---|" + "---|" * (len(OUTCOMES) + 2))
    for kind in [*KINDS, ""]:
        of = [row for row in rows if row["kind"] == kind or not kind]
        if of:
            counts = [sum(row["outcome"] == outcome for row in of) for outcome in OUTCOMES]
            seconds = [row["recovery_s"] for row in of if row.get("recovery_s") is not None]
            times = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else ""
            lost = max((row.get("lost") or 0 for row in of), default=0)
            lines.append(
                f"| {kind or '**all**'} | {' | '.join(str(c or '') for c in counts)} | {times} | {lost or ''} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--table", action="store_true", help="print the table of all seeds, do nothing")
    given = parser.parse_args(arguments)
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if given.table:
        found = [row for file in sorted(work.glob("seed-*.jsonl")) for row in read_lines(file, "n")]
        print(table(found))
        return int(any(row["outcome"] not in GOOD for row in found))
    if os.getuid():
        print("not root: no disk can be filled, so voyages with that fault are left out", flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    file = work / f"seed-{given.seed}.jsonl"
    rows = read_lines(file, "n")
    done = {row["voyage"] for row in rows}
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunFolder(work).lock())  # two at once would sail the same voyages
        door: Door | None = None
        for voyage in plan(given.seed):
            if len(rows) >= given.faults:
                break
            kinds = [fault.kind for fault in voyage.faults]
            if voyage.number in done or (os.getuid() and "disk full" in kinds):
                continue
            if "gone" in kinds[0] and door is None:
                door = stack.enter_context(mlflow_server(work))
            made = sail(work, given.seed, voyage, door if "gone" in kinds[0] else None)
            with file.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in made))
            rows += made
            for row in made:
                print(json.dumps(row), flush=True)
    print(table(rows))
    return int(any(row["outcome"] not in GOOD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
