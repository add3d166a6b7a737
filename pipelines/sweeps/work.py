"""One trial, in this process: the loop of `didr_core.train.loop` in legs, then its worth, grid and scores. No Ray.

A trial is a run folder. Whatever it was doing when its process died, another process goes on from its newest checkpoint; a trial that
has a result.json is over: asking again costs milliseconds. One process keeps the judges from trial to trial.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from typing import Any

import torch

from didr_core.config import Config
from didr_core.data.cache import CachedFeed
from didr_core.data.prompts import open_prompts
from didr_core.evaluate import finish
from didr_core.evaluate.contestants import fingerprint
from didr_core.export.sample import trained_generator
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, Observer, loop
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError, NonFiniteError
from pipelines.report.figures import save_grid
from pipelines.sweeps.bench import Bench
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.space import corners

LOCK_S = 90.0
"""How long to wait for a process of an earlier driver that is still dying in the trial's folder."""
TIMED_STEPS = 2


@functools.lru_cache(1)
def bench_of(folder: SweepFolder) -> Bench:
    """This process's judges for a sweep, loaded once."""
    config = folder.config()
    torch.set_num_threads(config.train.threads)
    return Bench(config, folder.shared, config.torch_device)


def prepare(folder: SweepFolder) -> float:
    """Shared work: the start's and the reference's pictures and scores. Then seconds a step, of the trial in the middle of the space."""
    bench_of(folder)
    points = list(folder.points().values()) or corners(folder.space())  # Optuna's are not made yet
    config = folder.config_at(points[len(points) // 2])
    quick = config.train.model_copy(update={"assistant_warmup": 0})
    learner = Learner(config.model_copy(update={"train": quick}), device=config.torch_device)
    feed = iter(CachedFeed(config, folder.shared / "feed"))
    seconds = []
    for _ in range(min(TIMED_STEPS, config.train.steps)):
        began = time.perf_counter()
        with contextlib.suppress(NonFiniteError):  # a point that diverges is its trial's affair
            learner.step(next(feed))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def export(folder: SweepFolder, number: int) -> None:
    """The trained generator of a trial as the sweep's `export/`."""
    run, config = folder.trial(number), folder.config_of(number)
    backbone, network, _ = trained_generator(config, run)
    finish.export(config, run, backbone, network, folder.path / "export", overwrite=True)


class TrialWork:
    """One trial being done: :meth:`begin`, then :meth:`leg` until it has a result; :meth:`close` whatever happens."""

    def __init__(self, folder: SweepFolder, number: int) -> None:
        self.folder, self.number, self.began = folder, number, time.time()
        self.run, self.options = folder.trial(number), folder.options()
        self._stack = contextlib.ExitStack()
        self.learner: Learner | None = None

    def begin(self) -> None:
        """Take the run folder (waiting for a dying process in it), load networks, go to the newest checkpoint.

        Raises:
            DIDRError: see :class:`didr_core.train.loop.Journal`; or another process keeps the folder.
        """
        self.config = self.folder.config_of(self.number, self.options.workers)
        open_folder(self.run, self.config, self.options.command)
        self._lock()
        torch.set_num_threads(self.config.train.threads)
        self.run.update(status="running", message=None)
        self._load()
        self.setup_seconds = round(time.time() - self.began, 3)

    def _lock(self) -> None:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                self._stack.enter_context(self.run.lock())
                return
            except DIDRError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def _load(self) -> None:
        learner = Learner(self.config, device=self.config.torch_device)
        self.journal = Journal(self.run, self.config, learner, open_prompts(self.config).fingerprint)
        self.journal.restore()
        self.run.forget_after(learner.step_count)
        self.learner = learner
        done = learner.step_count * self.config.train.batch
        self.feed = iter(CachedFeed(self.config, self.folder.shared / "feed", done))

    @property
    def step(self) -> int:
        """Done so far."""
        return self.learner.step_count if self.learner else self.run.last_step()

    def leg(self) -> dict[str, Any] | None:
        """Train to the next checkpoint; the last leg judges and returns the trial's result.

        Raises:
            DIDRError: what ends the trial, among it a training that diverged.
        """
        train = self.config.train
        if self.step < train.steps:
            self.advance(min((self.step // train.checkpoint_every + 1) * train.checkpoint_every, train.steps))
        return self.finish() if self.step >= train.steps else None

    def advance(self, until: int) -> None:
        """Train to ``until``.

        Raises:
            NonFiniteError: the training diverged.
        """
        assert self.learner is not None
        loop(self.learner, self.feed, self.journal, Observer(), until=until)

    def glance(self) -> dict[str, Any]:
        """What it is worth now, roughly: for a scheduler that stops poor trials."""
        assert self.learner is not None
        return bench_of(self.folder).glance(self.learner.generator("ema"))

    def finish(self) -> dict[str, Any]:
        """Judge it, draw its grid, write result.json."""
        assert self.learner is not None
        began = time.time()
        gallery = finish.Gallery(self.learner, self.config, self.run, save_grid)
        gallery.show(self.run.path / "grid.png", f"trial {self.run.path.name}")
        network = self.learner.generator("ema")
        return conclude(self.folder, self.number, network, self.began, self.setup_seconds, began)

    def close(self, status: str = "interrupted", message: str | None = None) -> None:
        """Give the folder back."""
        if (self.run.path / "run.json").is_file():
            self.run.update(status=status, message=message, ended=time.time())
        self._stack.close()


def conclude(
    folder: SweepFolder,
    number: int,
    network: torch.nn.Module,
    started: float,
    setup_seconds: float,
    judging: float,
) -> dict[str, Any]:
    """Measure a trained generator, write scores.json and, last of all, result.json.

    Args:
        started, judging: when its process started on the trial and began to judge. setup_seconds: in between, but no training.
    """
    run, bench = folder.trial(number), bench_of(folder)
    worth, measured = bench.judge(network.to(bench.evaluator.device), run.path, fingerprint(network))
    scores = bench.scores(measured, folder.options().command)
    scores.write(run.path)
    rows = read_lines(run.metrics_path)
    last = rows[-1]["step"] if rows else 0
    return folder.end(
        number,
        status="finished",
        step=last,
        **worth,
        measures={k: v["mean"] for k, v in scores.tree["models"]["aligned"]["measures"].items()},
        alarms=sorted({r["alarm"] for r in read_lines(run.alarms_path) if r["step"] == last}),
        train_seconds=round(sum(row.get("time/step") or 0.0 for row in rows), 3),
        setup_seconds=setup_seconds,
        judge_seconds=round(time.time() - judging, 3),
        seconds=round(time.time() - started, 3),
    )


def open_folder(run: RunFolder, config: Config, command: str) -> None:
    """The trial's run folder; what a kill left of an attempt to make it is thrown away."""
    if not (run.path / "run.json").is_file():
        shutil.rmtree(run.path, ignore_errors=True)
        RunFolder.create(config, str(run.path), command)
