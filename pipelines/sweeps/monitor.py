"""What the driver of a sweep does with its news: a live line a trial, MLflow's parent run and nested children, and a watchdog.

News come from files (a `Follower` on each running trial) and from Tune's callbacks. A child's MLflow run id is kept in
sweep.json; where a kill came between making the run and writing that down, the run is found again by its tags: no trial has two.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from ray import tune
from rich.live import Live
from rich.text import Text

from didr_core.train.alarms import explain
from didr_core.train.loop import Observer
from didr_core.types import DIDRError, StepReport
from pipelines.cluster.watch import Follower
from pipelines.report.console import clock, console
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.space import shown
from pipelines.tracking import tracker as tracking

EVERY_S = 10.0  # between lines of a running trial, where there is no terminal


class Curve(Observer):
    """Steps to an MLflow run."""

    def __init__(self, tracker: tracking.Tracker) -> None:
        self.tracker = tracker

    def step(self, report: StepReport) -> None:
        """Metrics, and alarms where any rang."""
        self.tracker.metrics(report.step, report.metrics)
        if report.alarms:
            self.tracker.alarms(report.step, report.alarms)


class TrialMonitor(Observer):
    """One running trial: its line, and its MLflow run."""

    def __init__(self, monitor: SweepMonitor, number: int, total: int) -> None:
        self.monitor, self.number, self.total = monitor, number, total
        self.step_done, self.text, self.values = 0, "starting", dict[str, float]()
        self.began, self.next_line = time.monotonic(), -math.inf

    def step(self, report: StepReport) -> None:
        """A step, from the follower's thread."""
        self.step_done, self.text = report.step, ""
        self.values |= report.metrics
        self.monitor.news()
        with self.monitor.guard:
            Curve(self.monitor.tracker(self.number)).step(report)
        self.monitor.show(self)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """What a worker group is doing outside of steps."""
        self.text = text
        self.monitor.news()
        self.monitor.show(self)

    def line(self) -> str:
        """``trial 3 (beta 0.21, steps 2)  40/60  reward +0.31 sd  2.1 s/step``."""
        parts = [self.monitor.name_of(self.number), self.text or f"{self.step_done}/{self.total}"]
        if "reward/gain" in self.values:
            parts.append(f"reward {self.values['reward/gain']:+.2f} sd")
        if "time/step" in self.values:
            parts.append(f"{self.values['time/step']:.2f} s/step")
        return "  ".join(parts)


class SweepMonitor(tune.Callback):
    """Lines, MLflow and the watchdog of one sweep: Tune's callback, in the driver's process."""

    def __init__(self, folder: SweepFolder, uri: str, stream: TextIO | None = None) -> None:
        self.folder, self.uri = folder, uri
        self.options, self.config = folder.plan(), folder.config()
        self.console = console(stream)
        self.guard = threading.RLock()
        self.running: dict[int, tuple[TrialMonitor, Follower]] = {}
        self._trackers: dict[int, tracking.Tracker] = {}
        self._parent: tracking.Tracker = tracking.Tracker()
        self._live: Live | None = None
        self._heard = time.monotonic()
        self.worked: list[float] = []  # seconds of trials that ended under this driver

    def __reduce__(self) -> Any:
        """Tune pickles its callbacks for a restore, which no sweep asks for: what it gets does nothing."""
        return tune.Callback, ()

    def __enter__(self) -> Self:
        ids = self.folder.info().get("mlflow", {})
        tags = {"didr.sweep": self._tag, "didr.space": self.options.space}
        self._parent = self._open(ids.get("parent"), tags, None, self.folder.path)
        self._remember("parent", self._parent.run_id)
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in list(self.running):
            self._unfollow(number)
        for tracker in self._trackers.values():  # those of trials that did not end
            tracker.close("KILLED")
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self._parent.close("KILLED" if killed else "FAILED" if kind else "FINISHED")
        if self._live:
            self._live.stop()

    # -- lines

    def note(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def name_of(self, number: int) -> str:
        """A trial for people; they count from 1."""
        return f"trial {number + 1}/{self.options.trials} ({shown(self.folder.points().get(number, {}))})"

    def show(self, trial: TrialMonitor) -> None:
        """Refresh the live lines; without a terminal, a line of this trial now and then."""
        if self._live:
            lines = [monitor.line() for monitor, _ in self.running.values()]
            self._live.update(Text("\n".join([*lines, self._eta()])))
        elif time.monotonic() >= trial.next_line:
            trial.next_line = time.monotonic() + EVERY_S
            self.note(trial.line())

    def _eta(self) -> str:
        done = len(self.folder.results())
        left = self.options.trials - done
        if not self.worked:
            return f"{done}/{self.options.trials} trials done"
        mean = sum(self.worked) / len(self.worked)
        return f"{done}/{self.options.trials} trials done, about {clock(mean * left / self.options.concurrent)} left"

    # -- trials

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial is starting, or going on in another process."""
        self.news()
        number = int(trial.config["number"])
        if number in self.running or self.folder.result(number):
            return
        run = self.folder.trial(number)
        with self.guard:
            self.tracker(number)
        monitor = TrialMonitor(self, number, self.folder.config_of(number).train.steps)
        follower = Follower(run, monitor, 0)
        follower.__enter__()
        self.running[number] = (monitor, follower)
        self.show(monitor)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """A sign of life."""
        self.news()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """It is over, for whatever reason: last line, final scores, its MLflow run closed."""
        self.news()
        number = int(trial.config["number"])
        self._unfollow(number)
        result = self.folder.result(number)
        if result is None:  # an interrupted sweep
            return
        if result.get("seconds"):
            self.worked.append(float(result["seconds"]))
        self.note(f"{self.name_of(number)} {outcome_line(result)}", "" if result["status"] == "finished" else "yellow")
        if not self._live:
            self.note(self._eta())
        self.settle(number)

    def settle(self, number: int) -> None:
        """Make MLflow's run of a trial that is over say so; once."""
        result, closed = self.folder.result(number), self.folder.info().get("mlflow", {}).get("closed", [])
        if result is None or number in closed:
            return
        with self.guard:
            followed = number in self._trackers
            tracker = self.tracker(number)
            if not followed:  # by an earlier driver, which may have died with the last steps in its hands
                Follower(self.folder.trial(number), Curve(tracker)).look()
            finals = {k: result[k] for k in ("gain", "distance", "score") if result.get(k) is not None}
            measured = {k: v for k, v in (result.get("measures") or {}).items() if v is not None}
            tracker.final({f"final/{k}": float(v) for k, v in (measured | finals).items()})
            tracker.tags(
                {"didr.status": result["status"]} | ({"didr.reason": result["reason"]} if result.get("reason") else {})
            )
            for name in ("grid.png", "scores.json", "config.yaml"):
                if (self.folder.trial(number).path / name).is_file():
                    tracker.artifact(self.folder.trial(number).path / name)
            tracker.close("FAILED" if result["status"] in ("failed", "lost") else "FINISHED")
            self._trackers.pop(number, None)
        self._remember("closed", sorted({*closed, number}))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Its process died too often, or said something that no user could mend."""
        number = int(trial.config["number"])
        if self.folder.result(number) is None:
            lines = str(getattr(trial, "error_file", "") and _tail(trial.error_file)).strip().splitlines()
            reason = lines[-1][:300] if lines else "its process died"
            self.folder.end(number, status="lost", reason=reason, step=self.folder.trial(number).last_step())
        self.on_trial_complete(iteration, trials, trial)

    def _unfollow(self, number: int) -> None:
        _, follower = self.running.pop(number, (None, None))
        if follower:
            follower.__exit__(None, None, None)

    # -- MLflow

    def tracker(self, number: int) -> tracking.Tracker:
        """The trial's child run, opened when it is first needed. Hold :attr:`guard`."""
        if number not in self._trackers:
            known = self.folder.info().get("mlflow", {}).get("trials", {}).get(str(number))
            tags = {"didr.sweep": self._tag, "didr.trial": str(number)}
            tracker = self._open(known, tags, self._parent.run_id, self.folder.trial(number).path)
            self._trackers[number] = tracker
            trials = self.folder.info().get("mlflow", {}).get("trials", {})
            self._remember("trials", trials | {str(number): tracker.run_id})
        return self._trackers[number]

    def _open(self, known: str | None, tags: Mapping[str, str], parent: str | None, path: Any) -> tracking.Tracker:
        number = tags.get("didr.trial")
        config = self.config if number is None else self.folder.config_of(int(number), self.options.workers)
        known = known or tracking.find_run(config.tracking, self.uri, tags)
        return tracking.open_tracker(config, path, run_id=known, tags=tags, parent=parent, uri=self.uri)

    @property
    def _tag(self) -> str:
        return f"{self.folder.name}-{self.folder.info()['started']:.0f}"

    def _remember(self, key: str, value: Any) -> None:
        if value is not None:
            self.folder.update(mlflow=self.folder.info().get("mlflow", {}) | {key: value})

    def keep(self, *names: str) -> None:
        """Files of the sweep to its parent run."""
        for name in names:
            if (self.folder.path / name).exists():
                self._parent.artifact(self.folder.path / name)

    def final(self, values: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """The recommended trial's numbers on the parent run."""
        self._parent.final(values)
        self._parent.tags(tags)

    # -- watchdog

    def news(self) -> None:
        """Something moved."""
        self._heard = time.monotonic()

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """A turn of Tune's loop, in the driver's own thread, some times a second.

        Raises:
            DIDRError: nothing new for `patience` minutes.
        """
        if time.monotonic() - self._heard > self.options.patience * 60:
            raise DIDRError(self.silence())

    def silence(self) -> str:
        """What the watchdog says."""
        return (
            f"no trial moved for {self.options.patience:g} minutes. Look at `ray status` and the trials' folders; "
            f"`didr sweep --resume {self.folder.name}` goes on from the last checkpoints, --patience sets another limit."
        )


def outcome_line(result: Mapping[str, Any]) -> str:
    """How a trial ended, in a line."""
    if result["status"] != "finished":
        return f"{result['status']}: {str(result.get('reason', '')).splitlines()[0][:300]}"
    alarms = f"  alarms: {', '.join(result['alarms'])} ({explain(result['alarms'][0])})" if result.get("alarms") else ""
    distance = f"{result['distance']:.3g} (start {result['start_distance']:.2g})"
    worth = f"gain {result['gain']:+.3f} sd, distance {distance}, score {result['score']:+.3f}"
    return f"done in {clock(result['seconds'])}: {worth}{alarms}"


def _tail(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()[-4000:]
    except OSError:
        return ""
