"""What the driver of a sweep does with its news: a live line a trial, MLflow's parent run and nested children, and a watchdog.

It is Tune's callback, in the driver's own loop: some times a second it looks into the files of the running trials.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray import tune
from rich.live import Live
from rich.text import Text

from didr_core.train.alarms import explain
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError, StepReport
from pipelines.cluster.watch import Follower
from pipelines.report.console import clock, console
from pipelines.sweeps.folder import SweepFolder, trial_name
from pipelines.sweeps.space import shown
from pipelines.tracking import tracker as tracking

EVERY_S = 10.0  # between lines of a running trial, where there is no terminal
LOOK_S = 0.3  # between looks into the trials' files


class FollowedTrial(Observer):
    """One trial as its files tell it: a line for people, steps and alarms for its MLflow run."""

    def __init__(
        self, run: RunFolder, name: str, total: int, tracker: tracking.Tracker, news: Callable[[], None]
    ) -> None:
        self.run, self.name, self.total, self.tracker, self.news = run, name, total, tracker, news
        self.text, self.values, self.next_line = "starting", dict[str, float](), -math.inf
        self._follower = Follower(run, self)

    def look(self) -> None:
        """Take in what is new: all from the first step on, of which the MLflow run takes what it does not have."""
        self._follower.look()

    def end(self, status: tracking.Status) -> None:
        """The last news, and no more."""
        self.run.stage_path.unlink(missing_ok=True)
        self.tracker.close(status)

    def step(self, report: StepReport) -> None:
        """Metrics, and alarms where any rang."""
        self.text = f"{report.step}/{self.total}"
        self.values |= report.metrics
        self.tracker.metrics(report.step, report.metrics)
        if report.alarms:
            self.tracker.alarms(report.step, report.alarms)
        self.news()

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """What a worker group is doing outside of steps."""
        self.text = text
        self.news()

    def line(self) -> str:
        """``trial 0003 (beta 0.21, steps 2)  40/60  reward +0.31 sd  2.1 s/step``."""
        parts = [self.name, self.text]
        if "reward/gain" in self.values:
            parts.append(f"reward {self.values['reward/gain']:+.2f} sd")
        if "time/step" in self.values:
            parts.append(f"{self.values['time/step']:.2f} s/step")
        return "  ".join(parts)


class SweepMonitor(tune.Callback):
    """Lines, MLflow and the watchdog of one sweep."""

    def __init__(self, folder: SweepFolder, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.options, self.config = folder.options(), folder.config()
        self.console = console()
        self.running: dict[int, FollowedTrial] = {}
        self.parent: tracking.Tracker = tracking.Tracker()
        self._live: Live | None = None
        self._heard, self._next_look = time.monotonic(), -math.inf
        self._done = len(folder.results())
        self._worked: list[float] = []  # seconds of trials that ended under this driver

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks for a restore, which no sweep asks for: what it gets does nothing."""
        return tune.Callback, ()

    def __enter__(self) -> Self:
        self.parent = self._open(None)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for trial in self.running.values():  # those that did not end
            trial.look()
            trial.end("KILLED")
        self.parent.__exit__(kind, error, trace)
        if self._live:
            self._live.stop()

    # -- lines

    def note(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def name_of(self, number: int) -> str:
        """``trial 0003 (beta 0.21, steps 2)``."""
        return f"{trial_name(number)} ({shown(self.folder.points().get(number, {}))})"

    def _show(self) -> None:
        """Refresh the live lines; without a terminal, a line of each trial now and then."""
        if self._live:
            self._live.update(Text("\n".join([*(trial.line() for trial in self.running.values()), self._eta()])))
            return
        for trial in self.running.values():
            if time.monotonic() >= trial.next_line:
                trial.next_line = time.monotonic() + EVERY_S
                self.note(trial.line())

    def _eta(self) -> str:
        said = f"{self._done}/{self.options.trials} trials done"
        if not self._worked:
            return said
        left = (self.options.trials - self._done) * statistics.mean(self._worked) / self.options.concurrent
        return f"{said}, about {clock(left)} left"

    # -- trials

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial is starting, or going on in another process."""
        self.news()
        number = int(trial.config["number"])
        if self.folder.result(number) is None:
            self.follow(number)

    def follow(self, number: int) -> FollowedTrial:
        """The trial, followed from now on."""
        if number not in self.running:
            name, steps = self.name_of(number), self.folder.config_of(number).train.steps
            self.running[number] = FollowedTrial(self.folder.trial(number), name, steps, self._open(number), self.news)
        return self.running[number]

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """A sign of life."""
        self.news()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """It is over, for whatever reason: last line, final scores, its MLflow run closed."""
        self.news()
        number = int(trial.config["number"])
        result = self.folder.result(number)
        if result is None:  # an interrupted sweep
            return
        if result.get("seconds"):
            self._worked.append(float(result["seconds"]))
        self._done = len(self.folder.results())
        self.note(f"{self.name_of(number)} {outcome_line(result)}", "" if result["status"] == "finished" else "yellow")
        if not self._live:
            self.note(self._eta())
        self.settle(number)

    def settle(self, number: int) -> None:
        """Make MLflow's run of a trial that is over say so; once. An earlier driver may have died with the last steps in its hands."""
        result, closed = self.folder.result(number), self._noted.get("closed", [])
        if result is None or number in closed:
            return
        self.follow(number).look()
        trial = self.running.pop(number)
        values = (result.get("measures") or {}) | {k: result.get(k) for k in ("gain", "distance", "score")}
        trial.tracker.final({f"final/{k}": float(v) for k, v in values.items() if v is not None})
        trial.tracker.tags({f"didr.{k}": result[k] for k in ("status", "reason") if result.get(k)})
        keep_files(trial.tracker, trial.run.path, "grid.png", "scores.json", "config.yaml")
        trial.end("FAILED" if result["status"] in ("failed", "lost") else "FINISHED")
        if result["status"] != "lost":  # a resumed sweep tries it again
            self._note(closed=sorted({*closed, number}))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Its process died too often, or said something that no user could mend."""
        number = int(trial.config["number"])
        if self.folder.result(number) is None:
            file = Path(getattr(trial, "error_file", None) or "")
            lines = file.read_text().strip().splitlines() if file.is_file() else ["its process died"]
            step = self.folder.trial(number).last_step()
            self.folder.end(number, status="lost", reason=lines[-1][:300], step=step)
        self.on_trial_complete(iteration, trials, trial)

    # -- MLflow

    def _open(self, number: int | None) -> tracking.Tracker:
        """The MLflow run of a trial, or of the whole sweep: the one that is noted, or has its tags, or else a new one."""
        tags = {"didr.sweep": f"{self.folder.name}-{self.folder.info()['started']:.0f}"}
        if number is None:
            config, path, known = self.config, self.folder.path, self._noted.get("parent")
            tags["didr.space"] = self.options.space
        else:
            config, path = self.folder.config_of(number, self.options.workers), self.folder.trial(number).path
            known, tags["didr.trial"] = self._noted.get("trials", {}).get(str(number)), str(number)
        known = known or tracking.find_run(config.tracking, self.uri, tags)
        tracker = tracking.open_tracker(config, path, run_id=known, tags=tags, parent=self.parent.run_id, uri=self.uri)
        if number is None:
            self._note(parent=tracker.run_id)
        else:
            self._note(trials=self._noted.get("trials", {}) | {str(number): tracker.run_id})
        return tracker

    @property
    def _noted(self) -> dict[str, Any]:
        """What sweep.json knows of MLflow: run ids of the ``parent`` and the ``trials``, numbers of those ``closed``."""
        return dict(self.folder.info().get("mlflow", {}))

    def _note(self, **values: Any) -> None:
        self.folder.update(mlflow=self._noted | values)

    # -- watchdog

    def news(self) -> None:
        """Something moved."""
        self._heard = time.monotonic()

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """A turn of Tune's loop.

        Raises:
            DIDRError: nothing new for `patience` minutes.
        """
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            for trial in self.running.values():
                trial.look()
            self._show()
        if time.monotonic() - self._heard > self.options.patience * 60:
            raise DIDRError(
                f"no trial moved for {self.options.patience:g} minutes. Look at `ray status` and the trials' folders; "
                f"`didr sweep --resume {self.folder.name}` goes on from the last checkpoints, --patience sets another limit."
            )


def keep_files(tracker: tracking.Tracker, folder: Path, *names: str) -> None:
    """Those of the files that are there, to an MLflow run."""
    for name in names:
        if (folder / name).exists():
            tracker.artifact(folder / name)


def outcome_line(result: Mapping[str, Any]) -> str:
    """How a trial ended, in a line."""
    if result["status"] != "finished":
        return f"{result['status']}: {str(result.get('reason', '')).splitlines()[0][:300]}"
    alarms = f"  alarms: {', '.join(result['alarms'])} ({explain(result['alarms'][0])})" if result.get("alarms") else ""
    distance = f"{result['distance']:.3g} (start {result['start_distance']:.2g})"
    worth = f"gain {result['gain']:+.3f} sd, distance {distance}, score {result['score']:+.3f}"
    return f"done in {clock(result['seconds'])}: {worth}{alarms}"
