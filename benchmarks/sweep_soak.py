"""Does a sweep end by itself, every time, and does it survive being killed?

    python -m benchmarks.sweep_soak --runs 5 --trials 12      # so many sweeps in a row: hangs, orphan processes, overhead
    python -m benchmarks.sweep_soak --kills 10 --trials 12    # one sweep whose driver is killed (SIGKILL) so many times at random moments

Each sweep is the command of a user, in a process of its own. Orphans are counted by a variable in the environment that everything a sweep
starts inherits. After the last kill: every trial is there once, none that had ended was touched again, its steps are taken once each, and
MLflow has one parent and one child a trial. Writes ``soak.json`` to `--work`; exits with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from didr_core.train.run_folder import read_lines
from pipelines.sweeps.folder import FINAL, SweepFolder

MARK = "DIDR_SOAK"
LEAVE_S = 90.0  # for processes to go after their driver has
POLL_S = 0.2


@dataclass
class Soaked:
    """One driver process, with all that it starts known by a mark."""

    command: list[str]
    log: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> Soaked:
        self.file = self.log.open("a")
        self.process = subprocess.Popen(
            self.command,
            env=os.environ | {MARK: self.mark},
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.family():  # ours alone, by their mark
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.file.close()

    def family(self) -> list[psutil.Process]:
        """All that lives and carries the mark, the driver among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait(self, seconds: float) -> int | None:
        """The exit code; None where it hangs."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def orphans(self) -> list[str]:
        """Names of processes that are still there :data:`LEAVE_S` after the driver went."""
        deadline = time.monotonic() + LEAVE_S
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return [_name(p) for p in left]


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:100] or process.name()
    return "gone"


def command(given: argparse.Namespace, name: str) -> list[str]:
    """`didr sweep` as a user types it."""
    words = [sys.executable, "-m", "pipelines.sweep", "--recipe", given.recipe, "--space", given.space]
    words += ["--trials", str(given.trials), "--name", name, "--output", str(given.work)]
    for item in given.overrides:
        words += ["--set", item]
    return words


def soak_runs(given: argparse.Namespace) -> list[dict[str, Any]]:
    """`--runs` sweeps in a row."""
    rows = []
    for i in range(given.runs):
        name = f"run-{i:02d}-{uuid.uuid4().hex[:6]}"
        began = time.monotonic()
        with Soaked(command(given, name), given.work / f"{name}.log") as driver:
            code = driver.wait(given.limit)
            wall = time.monotonic() - began
            orphans = driver.orphans() if code is not None else []
        row: dict[str, Any] = {
            "run": name,
            "code": code,
            "hang": code is None,
            "orphans": orphans,
            "wall": round(wall, 1),
        }
        front = given.work / name / "front.json"
        if front.is_file():
            row |= {k: v for k, v in json.loads(front.read_text())["seconds"].items() if k != "wall"}
            training = row["training"]
            row |= {
                "overhead": round(wall * 1.0 / (training / row["trials_at_once"]) - 1, 4),
                "wall_over_training": round(wall / training, 4),
            }
        row["faults"] = ["did not end"] if code is None else [f"exit code {code}"] if code else []
        row["faults"] += [f"orphan: {o}" for o in orphans] + _incomplete(SweepFolder(given.work / name), given.trials)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def soak_kills(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One sweep, killed `--kills` times, then let end."""
    rng = random.Random(given.seed)
    name = f"kills-{uuid.uuid4().hex[:6]}"
    folder = SweepFolder(given.work / name)
    begin = command(given, name)
    again = [sys.executable, "-m", "pipelines.sweep", "--resume", str(folder.path)]
    rows: list[dict[str, Any]] = []
    ended: dict[int, float] = {}  # number: when its result was written
    points: dict[int, Any] = {}
    for kill in range(given.kills + 1):
        last = kill == given.kills
        with Soaked(again if (folder.path / "sweep.json").is_file() else begin, given.work / f"{name}.log") as driver:
            row: dict[str, Any] = {"kill": kill, "faults": []}
            if last:
                code = driver.wait(given.limit)
                row["faults"] += ["did not end"] if code is None else [f"exit code {code}"] if code else []
            else:
                row["after"] = round(rng.uniform(given.earliest, given.latest), 1)
                if driver.wait(row["after"]) is None:
                    driver.process.kill()
                    driver.process.wait()
                else:
                    row["ended_before"] = True
            row["faults"] += [f"orphan: {o}" for o in driver.orphans()]
        now = folder.points() if folder.path.is_dir() else {}
        row["faults"] += [f"trial {n} changed its point" for n, p in points.items() if now.get(n) != p]
        points = now
        written = {n: (folder.trial(n).path / "result.json").stat().st_mtime for n in now if folder.result(n)}
        row["faults"] += [f"trial {n} was done again" for n, when in ended.items() if written.get(n) != when]
        ended = written
        rows.append(row | {"over": len(ended)})
        print(json.dumps(rows[-1]), flush=True)
    final = {
        "kill": "after the last",
        "faults": _incomplete(folder, given.trials) + _mlflow_faults(folder, given.trials),
    }
    print(json.dumps(final), flush=True)
    return [*rows, final]


def _incomplete(folder: SweepFolder, trials: int) -> list[str]:
    """What is wrong with a sweep that should be whole."""
    if not (folder.path / "sweep.json").is_file():
        return ["no sweep folder"]
    faults = [] if folder.info()["status"] == "finished" else [f"status {folder.info()['status']}"]
    numbers = sorted(folder.points())
    faults += [] if numbers == list(range(trials)) else [f"trials {numbers}"]
    for number in numbers:
        status = (folder.result(number) or {}).get("status")
        if status not in FINAL:
            faults.append(f"trial {number}: {status}")
        steps = [row["step"] for row in read_lines(folder.trial(number).metrics_path)]
        if status == "finished" and steps != list(range(1, folder.config_of(number).train.steps + 1)):
            faults.append(f"trial {number}: steps {steps[:3]}...{steps[-3:]}")
    return faults


def _mlflow_faults(folder: SweepFolder, trials: int) -> list[str]:
    """One parent, and one child a trial with its final score, and every step of its curve once."""
    from pipelines.tracking import tracker as tracking

    config = folder.config()
    uri = tracking.resolve(config.tracking, folder.path.parent)
    if uri == "none":
        return []
    client = tracking.connect(uri)
    home = client.get_experiment_by_name(config.tracking.experiment)
    tag = f"{folder.name}-{folder.info()['started']:.0f}"
    runs = client.search_runs([home.experiment_id], f"tags.`didr.sweep` = '{tag}'", max_results=5000)
    children = sorted(int(r.data.tags["didr.trial"]) for r in runs if "didr.trial" in r.data.tags)
    parents = [r.info.run_id for r in runs if "didr.trial" not in r.data.tags]
    faults = [] if len(parents) == 1 else [f"{len(parents)} MLflow parents"]
    faults += [] if children == list(range(trials)) else [f"MLflow children {children}"]
    for run in runs:
        result = folder.result(int(run.data.tags.get("didr.trial", -1))) or {}
        if result.get("status") == "finished":
            curve = sorted(point.step for point in client.get_metric_history(run.info.run_id, "time/step"))
            faults += (
                [] if curve == list(range(1, result["step"] + 1)) else [f"curve of trial {result['number']}: {curve}"]
            )
            faults += [] if run.data.metrics.get("final/score") == result["score"] else ["no final score"]
            faults += [] if run.info.status == "FINISHED" else [f"MLflow run {run.info.status}"]
    nested = {r.data.tags.get("mlflow.parentRunId") for r in runs if "didr.trial" in r.data.tags}
    return faults + ([] if nested == set(parents[:1]) else ["children are not nested under the parent"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_soak", description=about)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--space", default="tilt_by_drp")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--runs", type=int, default=0, help="sweeps in a row")
    parser.add_argument("--kills", type=int, default=0, help="kills of one sweep's driver")
    parser.add_argument("--earliest", type=float, default=1.0, help="seconds from a start to its kill, at least")
    parser.add_argument("--latest", type=float, default=240.0, help="at most")
    parser.add_argument("--limit", type=float, default=4 * 3600.0, help="seconds after which a sweep counts as hanging")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep_soak"))
    given = parser.parse_args(arguments)
    if not given.runs and not given.kills:
        parser.error("say --runs N or --kills N")
    given.work = given.work.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [*(soak_runs(given) if given.runs else []), *(soak_kills(given) if given.kills else [])]
    faults = [f for row in rows for f in row["faults"]]
    tree = {"rows": rows, "faults": faults, "arguments": {k: str(v) for k, v in vars(given).items()}}
    (given.work / "soak.json").write_text(json.dumps(tree, indent=1) + "\n")
    overheads = [row["overhead"] for row in rows if row.get("overhead") is not None]
    if overheads:
        print(f"overhead: {min(overheads):.1%} to {max(overheads):.1%} over {len(overheads)} runs")
    print(f"{len(faults)} faults" + "".join(f"\n  {f}" for f in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
