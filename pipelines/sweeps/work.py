"""One trial, in this process: the loop of `didr_core.train.loop` in legs, then its worth, grid and scores. No Ray.

A trial is a run folder. Whatever it was doing when its process died, another process goes on from its newest checkpoint; a trial that
has a result.json is over: asking again costs milliseconds. One process keeps the judges from trial to trial.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch

from didr_core.config import Config
from didr_core.data.feed import LocalFeed
from didr_core.data.precompute import precompute
from didr_core.data.prompts import open_prompts
from didr_core.evaluate import finish
from didr_core.evaluate.contestants import fingerprint
from didr_core.export.sample import trained_generator
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, loop, outcome
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError, NonFiniteError
from pipelines.report.figures import save_grid
from pipelines.sweeps.bench import Bench
from pipelines.sweeps.folder import SweepFolder, trial_name
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
    batches = list(itertools.islice(LocalFeed(config), TIMED_STEPS))  # what makes them is gone when the learner comes
    learner = Learner(config.model_copy(update={"train": quick}), device=config.torch_device)
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        with contextlib.suppress(NonFiniteError):  # a point that diverges is its trial's affair
            learner.step(batch)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def export(folder: SweepFolder, number: int) -> None:
    """The trained generator of a trial as the sweep's `export/`."""
    run, config = folder.trial(number), folder.config_of(number)
    backbone, network, _ = trained_generator(config, run)
    finish.export(config, run, backbone, network, folder.path / "export", overwrite=True)


@contextlib.contextmanager
def opened(folder: SweepFolder, number: int) -> Iterator[tuple[Config, RunFolder]]:
    """A trial's configuration and its run folder, for this process alone; run.json says how it ends.

    A process of an earlier driver may still be dying in the folder: it is waited for.

    Raises:
        DIDRError: another process keeps the folder.
    """
    options, run = folder.options(), folder.trial(number)
    config = folder.config_of(number, options.workers)
    if not (run.path / "run.json").is_file():  # what a kill left of an attempt to make it is thrown away
        shutil.rmtree(run.path, ignore_errors=True)
        RunFolder.create(config, str(run.path), options.command)
    torch.set_num_threads(config.train.threads)
    deadline = time.monotonic() + LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(outcome(run))
                break
            except DIDRError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        yield config, run


def checkpoints(config: Config, done: int) -> Iterator[int]:
    """Steps after ``done`` at which a trial stops to be looked at; the last one is its end."""
    every, end = config.train.checkpoint_every, config.train.steps
    yield from range((done // every + 1) * every, end, every)
    yield end


def legs(folder: SweepFolder, number: int) -> Iterator[dict[str, Any]]:
    """A trial, from its newest checkpoint on: where it stands at each further one (and its worth, for a scheduler), then its result.

    Raises:
        DIDRError: what ends the trial, among it a training that diverged.
    """
    began, looks = time.time(), folder.options().scheduler != "none"
    with opened(folder, number) as (config, run):
        index = open_prompts(config)
        if config.precomputed:  # by the first trial: the others find it
            precompute(config, index, run.last_step() * config.train.batch, lambda *_: None)
        learner = Learner(config, device=config.torch_device)
        journal = Journal(run, config, learner, index.fingerprint)
        journal.restore()
        run.forget_after(learner.step_count)
        feed = iter(LocalFeed(config, learner.step_count * config.train.batch))
        setup_seconds = round(time.time() - began, 3)
        for step in checkpoints(config, learner.step_count):
            loop(learner, feed, journal, Observer(), until=step)
            if step < config.train.steps:
                yield {"step": step, **(bench_of(folder).glance(learner.generator("ema")) if looks else {})}
        judging = time.time()
        gallery = finish.Gallery(learner, config, run, save_grid)
        gallery.show(run.path / "grid.png", trial_name(number))
        result = conclude(folder, number, learner.generator("ema"), began, setup_seconds, judging)
    yield result


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
