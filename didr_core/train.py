"""The training loop: batches in, steps, checkpoints and metrics out. One process of it; no Ray, no MLflow.

    python -m didr_core.train --recipe tiny [--set drp.beta=0.5] [--output DIR] [--resume RUN]

`pipelines/align.py` runs the same :func:`loop` in each Ray Train worker. What else wants to hear of progress (console, MLflow, a report at
checkpoints) is an :class:`Observer`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from didr_core import config as configs
from didr_core import state
from didr_core.alarms import Alarms
from didr_core.config import Config
from didr_core.contracts import Batch, DIDRError, StepReport
from didr_core.data import PromptIndex
from didr_core.feed import LocalFeed, device_of
from didr_core.finish import finish
from didr_core.learner import Learner
from didr_core.preflight import preflight
from didr_core.runs import RunFolder


class Observer:
    """Hears of a run's progress; every method may be left as it is."""

    def started(self, run: RunFolder, config: Config, step: int) -> None:
        """The networks are loaded; ``step`` steps are done already (resume)."""

    def step(self, report: StepReport) -> None:
        """One iteration is done. Metrics are global means, plus ``time/step`` and ``time/data`` in seconds."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint after ``step`` is on disk (rank 0), or this rank has reached the step (other ranks)."""

    def stage(self, text: str) -> None:
        """What is being done outside of steps: loading, exporting, scoring."""


class Journal:
    """What rank 0 writes during a run, and what all ranks restore from it: checkpoints, metrics, alarms."""

    def __init__(self, run: RunFolder, config: Config, learner: Learner, corpus: str) -> None:
        self.run, self.config, self.learner, self.corpus = run, config, learner, corpus
        self.alarms = Alarms()

    def restore(self) -> None:
        """Go to the newest complete checkpoint, if there is one.

        Raises:
            DIDRError: a damaged checkpoint, or prompts that are not those the run began with.
        """
        step = self.run.last_step()
        if not step:
            return
        extra = state.load(self.run.checkpoint(step), self.learner)
        if extra["corpus"] != self.corpus:
            raise DIDRError(
                f"data.prompts={self.config.data.prompts!r}: shards or row counts are not those this run began with, so it cannot go on "
                "where it stopped. Restore the shards, or start a new run."
            )
        self.alarms.load_state_dict(extra["alarms"])

    def save(self) -> None:
        """Write a checkpoint of now, then remove the oldest ones."""
        step = self.learner.step_count
        extra = {"corpus": self.corpus, "alarms": self.alarms.state_dict(), "cursor": step * self.config.train.batch}
        state.save(self.run.checkpoint(step), self.learner, extra)
        self.run.prune(self.config.train.keep_checkpoints)

    def judge(self, report: StepReport, seconds: float, waited: float) -> StepReport:
        """``report`` with times and alarms."""
        metrics = report.metrics | {"time/step": seconds, "time/data": waited}
        return replace(report, metrics=metrics, alarms=self.alarms.update(report.metrics))


def loop(
    learner: Learner, batches: Iterable[Batch], journal: Journal, observer: Observer, *, writes: bool = True
) -> None:
    """Steps until ``config.train.steps`` are done. Every rank calls it with its share of each batch.

    Args:
        batches: one a step, from the step that the learner is at.
        writes: this rank writes metrics and checkpoints (rank 0).

    Raises:
        NonFiniteError: see :meth:`Learner.step`; checkpoints stay as they are.
        DIDRError: the stream ended early or out of order, or the disk is full.
    """
    train = journal.config.train
    stream = iter(batches)
    while learner.step_count < train.steps:
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is None or bool((batch.index // train.batch != learner.step_count).any()):
            got = "nothing" if batch is None else f"samples {batch.index.tolist()[:4]}..."
            raise DIDRError(
                f"step {learner.step_count + 1}: the prompt stream gave {got}, expected samples from {learner.step_count * train.batch}"
            )
        waited = time.perf_counter() - began
        report = learner.step(batch)
        report = journal.judge(report, time.perf_counter() - began, waited)
        if writes:
            journal.run.log(report)
        observer.step(report)
        if report.step % train.checkpoint_every == 0 or report.step == train.steps:
            if writes:
                journal.save()
            observer.checkpoint(report.step)


def train(config: Config, run: RunFolder, index: PromptIndex, observer: Observer | None = None) -> None:
    """The whole run in this process: restore, loop, export and scores. Marks ``run.json`` whatever happens.

    Raises:
        DIDRError: anything a user can mend; the run folder says "failed" and keeps its checkpoints.
    """
    observer = observer or Observer()
    torch.set_num_threads(max(config.train.threads, config.workers.train))
    with outcome(run):
        observer.stage("loading networks")
        learner = Learner(config, device=device_of(config))
        journal = Journal(run, config, learner, index.fingerprint)
        journal.restore()
        run.forget_after(learner.step_count)
        observer.started(run, config, learner.step_count)
        loop(learner, LocalFeed(config, learner.step_count * config.train.batch), journal, observer)
        finish(learner, config, run, observer.stage)


class outcome:
    """Keeps ``run.json``'s status true: running inside the block, then finished, failed or interrupted."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def __enter__(self) -> None:
        self.run.update(status="running", message=None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.run.update(status="finished", ended=time.time())
            return
        status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        with contextlib.suppress(DIDRError):  # a full disk may be why we are here; the reason is on its way to the user
            self.run.update(status=status, ended=time.time(), message=str(error) or kind.__name__)


class _Lines(Observer):
    """A plain line a step."""

    def stage(self, text: str) -> None:
        print(text, flush=True)

    def step(self, report: StepReport) -> None:
        shown = ("loss/generator", "reward/gain", "drs/ratio", "time/step")
        values = " ".join(f"{k}={report.metrics[k]:.4g}" for k in shown if k in report.metrics)
        print(f"step {report.step} {values} {' '.join(report.alarms)}".rstrip(), flush=True)


def prepare(recipe: str, overrides: Sequence[str], output: str | None, resume: str | None) -> tuple[Config, RunFolder]:
    """The configuration and the folder of a new run, or of the one to be resumed. Nothing is written before preflight has passed."""
    if resume:
        run = RunFolder.find(resume, output or "runs")
        return run.config(overrides), run
    config = configs.load(recipe, overrides)
    preflight(config)
    return config, RunFolder.create(config, output)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m didr_core.train", description="Align in one process, without Ray.")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--output", help="this run's folder (default: runs/<name>-<time>)")
    parser.add_argument("--resume", metavar="RUN", help="continue a run: its folder or name")
    given = parser.parse_args(arguments)
    try:
        config, run = prepare(given.recipe, given.overrides, given.output, given.resume)
        index = preflight(config)
        train(config, run, index, _Lines())
    except DIDRError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done: {Path(run.path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
