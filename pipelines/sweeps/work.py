"""One trial, in this process: the loop of `didr_core.train.loop` in legs, then its worth, grid and scores. No Ray.

A trial is a run folder. Whatever it was doing when its process died, another process goes on from its newest checkpoint; a trial that
has a result.json is over: asking again costs milliseconds. One process keeps the judges from trial to trial.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
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
from pipelines.sweeps.folder import SweepFolder, SweepOptions
from pipelines.sweeps.space import corners, read

LOCK_S = 90.0
"""How long to wait for a process of an earlier driver that is still dying in the trial's folder."""
TIMED_STEPS = 2

_benches: dict[str, Bench] = {}


def bench_of(folder: SweepFolder, config: Config | None = None) -> Bench:
    """This process's judges for a sweep, loaded once."""
    key = str(folder.path)
    if key not in _benches:
        config = config or folder.config()
        torch.set_num_threads(config.train.threads)
        _benches.clear()
        _benches[key] = Bench(config, folder.shared, config.torch_device)
    return _benches[key]


def prepare(path: str) -> float:
    """Shared work: the start's and the reference's pictures and scores. Then seconds a step, of the trial in the middle of the space."""
    folder = SweepFolder(Path(path))
    bench_of(folder)
    plan = folder.plan()
    points = list(folder.points().values()) or corners(read(plan.space, plan.tree))  # Optuna's are not made yet
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


def export(path: str, number: int) -> None:
    """The trained generator of a trial as the sweep's `export/`."""
    folder = SweepFolder(Path(path))
    run, config = folder.trial(number), folder.config_of(number)
    backbone, network, _ = trained_generator(config, run)
    finish.export(config, run, backbone, network, folder.path / "export", overwrite=True)


class TrialWork:
    """One trial being done. :meth:`advance` to a step, as often as wanted, then :meth:`finish`; :meth:`close` whatever happens."""

    def __init__(self, folder: SweepFolder, number: int) -> None:
        self.folder, self.number, self.began = folder, number, time.time()
        self.run = folder.trial(number)
        self.plan: SweepOptions = folder.plan()
        self._stack = contextlib.ExitStack()
        self.learner: Learner | None = None

    def begin(self) -> None:
        """Take the run folder (waiting for a dying process in it), load networks, go to the newest checkpoint.

        Raises:
            DIDRError: see :class:`didr_core.train.loop.Journal`; or another process keeps the folder.
        """
        self.config = self.folder.config_of(self.number, self.plan.workers)
        open_folder(self.run, self.config, self.plan.command)
        self._stack.enter_context(patient_lock(self.run))
        torch.set_num_threads(self.config.train.threads)
        self.run.update(status="running", message=None)
        self._load()
        self.setup_seconds = round(time.time() - self.began, 3)

    def _load(self) -> None:
        learner = Learner(self.config, device=self.config.torch_device)
        self.journal = Journal(self.run, self.config, learner, open_prompts(self.config).fingerprint)
        self.journal.restore()
        self.run.forget_after(learner.step_count)
        self.learner = learner
        self.feed = iter(
            CachedFeed(self.config, self.folder.shared / "feed", learner.step_count * self.config.train.batch)
        )

    @property
    def steps(self) -> int:
        """Of the whole trial."""
        return self.config.train.steps

    @property
    def step(self) -> int:
        """Done so far."""
        return self.learner.step_count if self.learner else self.run.last_step()

    def advance(self, until: int) -> int:
        """Train to ``until``; returns the step reached.

        Raises:
            NonFiniteError: the training diverged.
        """
        assert self.learner is not None
        loop(self.learner, self.feed, self.journal, Observer(), until=until)
        return self.step

    def glance(self) -> dict[str, Any]:
        """What it is worth now, roughly: for a scheduler that stops poor trials."""
        assert self.learner is not None
        return bench_of(self.folder).glance(self.learner.generator("ema")).flat()

    def finish(self) -> dict[str, Any]:
        """Judge it, draw its grid, write result.json."""
        assert self.learner is not None
        began = time.time()
        with torch.no_grad():
            finish.Gallery(self.learner, self.config, self.run, save_grid).show(
                self.run.path / "grid.png", f"trial {self.number}"
            )
        times = {"started": self.began, "judging": began, "setup_seconds": self.setup_seconds}
        return conclude(self.folder, self.number, self.learner.generator("ema"), times)

    def close(self, status: str = "interrupted", message: str | None = None) -> None:
        """Give the folder and the memory back."""
        if (self.run.path / "run.json").is_file():
            self.run.update(status=status, message=message, ended=time.time())
        self._stack.close()
        self.learner = None
        for name in ("journal", "feed"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def conclude(folder: SweepFolder, number: int, network: torch.nn.Module, times: Mapping[str, float]) -> dict[str, Any]:
    """Measure a trained generator, write scores.json and, last of all, result.json.

    ``times``: when its process ``started`` on the trial and began ``judging``, and the ``setup_seconds`` in between that were not training.
    """
    run = folder.trial(number)
    bench = bench_of(folder)
    worth, measured = bench.judge(network.to(bench.evaluator.device), run.path, fingerprint(network))
    scores = bench.scores(measured, folder.plan().command)
    scores.write(run.path)
    measures = {k: v["mean"] for k, v in scores.tree["models"]["aligned"]["measures"].items()}
    rows = read_lines(run.metrics_path)
    last = rows[-1]["step"] if rows else 0
    ringing = sorted({r["alarm"] for r in read_lines(run.alarms_path) if r["step"] == last})
    return folder.end(
        number,
        status="finished",
        step=last,
        **worth.flat(),
        measures=measures,
        alarms=ringing,
        train_seconds=round(sum(row.get("time/step") or 0.0 for row in rows), 3),
        setup_seconds=times["setup_seconds"],
        judge_seconds=round(time.time() - times["judging"], 3),
        seconds=round(time.time() - times["started"], 3),
    )


def open_folder(run: RunFolder, config: Config, command: str) -> None:
    """The trial's run folder; what a kill left of an attempt to make it is thrown away."""
    if not (run.path / "run.json").is_file():
        shutil.rmtree(run.path, ignore_errors=True)
        RunFolder.create(config, str(run.path), command)


@contextlib.contextmanager
def patient_lock(run: RunFolder) -> Any:
    """:meth:`RunFolder.lock`, waiting up to :data:`LOCK_S` seconds for who holds it."""
    deadline = time.monotonic() + LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run.lock())
                break
            except DIDRError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        yield
