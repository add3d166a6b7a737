"""The training loop: batches in, steps, checkpoints and metrics out. One process of it; no Ray, no MLflow.

`python -m didr_core.train` runs it in this process, `pipelines/align.py` in each Ray Train worker. What else wants to hear of progress
(console, MLflow, a report at checkpoints) is an :class:`didr_core.train.observer.Observer`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from didr_core.config import Config
from didr_core.config.files import clear_partials
from didr_core.data import scales
from didr_core.data.feed import LocalFeed, ahead
from didr_core.data.precompute import precompute
from didr_core.data.prompts import PromptIndex
from didr_core.networks import optim
from didr_core.train import checkpoint
from didr_core.train.alarms import DAMAGE, NAMES, Alarms, explain
from didr_core.train.ending import in_words
from didr_core.train.learner import Learner
from didr_core.train.observer import Observer
from didr_core.train.profile import Profile
from didr_core.train.run_folder import RunFolder
from didr_core.types import Batch, DIDRError, NonFiniteError, StepReport

Look = Callable[[int, nn.Module], Mapping[str, float]]
"""Draws and measures pictures of the step and network that it is given; what it finds stands beside the step's metrics."""

SETTLE_S = 120.0
"""How long a rank waits for another one's checkpoint when both end; that one's own error ends the group sooner."""


class Journal:
    """Checkpoints, metrics and alarms: written by rank 0 (split networks: by all ranks), restored by all ranks."""

    def __init__(self, run: RunFolder, config: Config, learner: Learner, corpus: str) -> None:
        self.run, self.config, self.learner, self.corpus = run, config, learner, corpus
        self.alarms = Alarms(config.alarms)
        self.saver = checkpoint.Saver(learner, run.apart)
        self.newest = 0  # step of the last checkpoint that was begun, by whomever

    def restore(self, step: int | None = None) -> None:
        """Go to the checkpoint of ``step`` (0: to the start); by default to the newest, if there is one.

        Raises:
            DIDRError: a damaged checkpoint, or prompts that are not those the run began with.
        """
        step = self.run.last_step() if step is None else step
        if not step:
            return
        self.run.fetch(f"checkpoints/{self.run.checkpoint(step).name}")
        extra = checkpoint.load(self.run.checkpoint(step), self.learner)
        if extra["corpus"] != self.corpus:
            raise DIDRError(
                f"data.prompts={self.config.data.prompts!r}: shards, row counts or the order of samples are not those this run began "
                "with, so it cannot go on where it stopped. Restore the shards, or start a new run (over 65,536 prompts the order "
                "changed with version 0.2: go on with the version in run.json)."
            )
        self.alarms.load_state_dict(extra["alarms"])

    def save(self) -> None:
        """Begin to write a checkpoint of now; the oldest ones go after it. Where networks are split, every rank calls it."""
        step = self.learner.step_count
        extra = {"corpus": self.corpus, "alarms": self.alarms.state_dict(), "cursor": step * self.config.train.batch}
        self.saver.save(
            self.run.checkpoint(step), extra, then=lambda: self.run.prune(self.config.train.keep_checkpoints)
        )

    def settle(self) -> None:
        """Until the newest checkpoint is whole, on ranks that do not write it too: the first one that ends, ends the group."""
        self.saver.wait()
        late = time.monotonic() + SETTLE_S * (not self.run.apart)
        while self.newest and not self.run.checkpoint(self.newest).is_dir() and time.monotonic() < late:
            time.sleep(0.05)

    def asked_to_stop(self, ringing: Iterable[str] = ()) -> tuple[bool, tuple[str, ...]]:
        """Whether somebody asked the run to stop, and which alarms stop it; every rank asks, and all get the same answer."""
        heard = DAMAGE.intersection(ringing) if self.config.alarms.on_alarm == "stop" else ()
        said = [float(self.run.stop_path.exists()), *(float(name in heard) for name in NAMES)]
        votes = torch.tensor(said, device=self.learner.device)
        self.learner.parallel.mean_([votes])
        asked, *rang = (votes > 0).tolist()
        return asked, tuple(name for name, rings in zip(NAMES, rang, strict=True) if rings)

    def with_alarms(
        self, report: StepReport, seconds: float, waited: float, looked: Mapping[str, float] | None = None
    ) -> StepReport:
        """``report`` with times, what a look found, and alarms."""
        seen = {**report.metrics, **(looked or {})}
        metrics = seen | {"time/step": seconds, "time/data": waited}
        return replace(report, metrics=metrics, alarms=self.alarms.update(seen))


def loop(
    learner: Learner,
    batches: Iterable[Batch],
    journal: Journal,
    observer: Observer,
    *,
    writes: bool = True,
    look: Look | None = None,
    until: int | None = None,
    profile: bool = False,
) -> None:
    """Steps until ``config.train.steps`` (or ``until`` of them) are done. Every rank calls it with its share of each batch.

    Args:
        batches: one a step, from the step that the learner is at.
        writes: this rank writes metrics and checkpoints (rank 0). look: given the running average every `evaluation.every` steps.
        profile: keep where the time of the steps went in ``profile.json`` (:mod:`didr_core.train.profile`).

    Raises:
        NonFiniteError: see :meth:`Learner.step`; checkpoints stay as they are.
        DIDRError: the stream ended early or out of order, the disk is full, or an alarm stopped the run; there is a checkpoint then.
            Of a checkpoint, the next step or the end says so.
        KeyboardInterrupt: the run was asked to stop; there is a checkpoint of the step that it was at.
    """
    train, every = journal.config.train, journal.config.evaluation.every
    stream = iter(batches)
    measured = Profile(learner.device)
    if profile:
        learner.phase = measured
    end = train.steps if until is None else min(until, train.steps)
    with journal.saver:  # however it ends, what is being written is whole then
        while learner.step_count < end:
            with learner.phase("step"):
                began = time.perf_counter()
                journal.saver.wait(block=False)
                with learner.phase("data wait"):
                    batch = next(stream, None)
                if batch is None or bool((batch.index // train.batch != learner.step_count).any()):
                    got = "nothing" if batch is None else f"samples {batch.index.tolist()[:4]}..."
                    raise DIDRError(
                        f"step {learner.step_count + 1}: the prompt stream gave {got}, expected samples from "
                        f"{learner.step_count * train.batch}"
                    )
                waited = time.perf_counter() - began
                try:
                    report = learner.step(batch)
                except NonFiniteError:
                    journal.settle()
                    raise
                seconds = time.perf_counter() - began
                looked = _looked(learner, look, report.step) if every and report.step % every == 0 else {}
                with learner.phase("report"):
                    report = journal.with_alarms(report, seconds, waited, looked)
                    if writes:
                        journal.run.log(report)
                    observer.step(report)
                with learner.phase("averaging"):
                    stop, rang = journal.asked_to_stop(report.alarms)
                if stop or rang or report.step % train.checkpoint_every == 0 or report.step == train.steps:
                    with learner.phase("checkpoint"):
                        journal.newest = report.step
                        if writes or learner.fsdp:
                            journal.save()
                        observer.checkpoint(report.step)
            if stop:
                journal.settle()
                raise KeyboardInterrupt(f"stopped after step {report.step}")
            if rang and report.step < train.steps:  # else there is nothing left to stop
                journal.settle()
                raise DIDRError(
                    f"stopped after step {report.step}, with a checkpoint, by alarms.on_alarm=stop. "
                    + " ".join(f"{name}: {explain(name, journal.config.alarms)}" for name in rang)
                    + f" To go on all the same: `didr align --resume {journal.run.place} --set alarms.on_alarm=warn`."
                )
    if writes and measured.steps:
        journal.run.write_profile(measured.summary())


def _looked(learner: Learner, look: Look | None, step: int) -> Mapping[str, float]:
    network = learner.whole_average()  # for now only: it may be a whole network beside the split ones
    if not (look and network):
        return {}
    with learner.phase("held-out look"):
        return {**look(step, network), "adam/below_eps": optim.below_eps(learner.generator_opt)}


def train(
    config: Config,
    run: RunFolder,
    index: PromptIndex,
    observer: Observer | None = None,
    look_of: Callable[[Learner], Look] | None = None,
    profile: bool = False,
) -> Learner:
    """All steps in this process, from the newest checkpoint on; call it inside :func:`outcome`. Returns the trained networks.

    Args:
        look_of: makes what `evaluation.every` asks for, once the networks are loaded.
        profile: see :func:`loop`.

    Raises:
        DIDRError: anything a user can mend; the run folder keeps its checkpoints.
    """
    observer = observer or Observer()
    torch.set_num_threads(config.train.threads)
    if scales.missing(config):
        observer.stage("measuring the scales of the reward's parts")
        config = scales.resolve(config)
        run.write_config(config)
    if config.precomputed:
        precompute(config, index, run.last_step() * config.train.batch, observer.stage)
    observer.stage("loading networks")
    learner = Learner(config, device=config.torch_device)
    journal = Journal(run, config, learner, index.fingerprint)
    journal.restore()
    run.forget_after(learner.step_count)
    look = look_of(learner) if look_of and config.evaluation.every else None
    feed: Iterable[Batch] = LocalFeed(config, learner.step_count * config.train.batch)
    if (
        config.precomputed or learner.device.type == "cpu"
    ):  # a GPU that trains has nothing to spare for making the next batch
        feed = ahead(feed)
    loop(learner, feed, journal, observer, look=look, profile=profile)
    return learner


@contextlib.contextmanager
def outcome(run: RunFolder) -> Iterator[None]:
    """Keeps ``run.json``'s status true: running inside the block, then finished, failed or interrupted. One process at a time.

    What a killed process left half-written in the folder is removed first.
    ``seconds`` adds up how long all such blocks of the run took; those that were killed are not in it.

    Raises:
        DIDRError: another process is at work in this run folder.
    """
    with run.lock():
        run.stop_path.unlink(missing_ok=True)
        for folder in (run.path, run.path / "grids"):
            clear_partials(folder)
        since, before = time.time(), float(run.info().get("seconds", 0.0))
        try:  # a signal may come at any moment, GeneratorExit where it came before the block
            run.update(status="running", message=None, since=since)
            yield
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            # a full disk may be why we are here; the reason is on its way to the user
            with contextlib.suppress(DIDRError):
                _ended(run, since, before, status=status, message=in_words(error))
            raise
        _ended(run, since, before, status="finished")


def _ended(run: RunFolder, since: float, before: float, **values: Any) -> None:
    run.stop_path.unlink(missing_ok=True)
    now = time.time()
    run.update(ended=now, seconds=round(before + now - since, 1), **values)
