"""`didr align`: preflight, a run folder, Ray Data into a Ray Train worker group (or one process with `--local`), report, MLflow.

    python -m pipelines.align --recipe tiny          # also the entrypoint for `ray job submit`
    didr align --resume runs/tiny-20260101-120000    # goes on from the last checkpoint

The driver starts the group, follows what rank 0 writes (`cluster/watch.py`), and starts the group again from the last checkpoint when
workers die. A mistake of the user's (:class:`DIDRError`: a NaN reward, a full disk) is not retried.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data import scales
from didr_core.data.prompts import PromptIndex
from didr_core.evaluate.finish import train_and_finish
from didr_core.plan.preflight import preflight
from didr_core.train.loop import Observer, outcome
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError, StepReport
from pipelines.cluster.resources import ClusterView, Node, check, encoder_need, reward_need, run_plan, train_need
from pipelines.cluster.session import await_room, ray_session, where_to_run
from pipelines.report.console import Progress, print_summary
from pipelines.report.figures import save_grid
from pipelines.report.page import write_report
from pipelines.tracking import tracker as tracking

WAIT_FOR_NODES_S = 600.0
"""How long to wait for the nodes of a cluster that may still be starting."""


def align(
    recipe: str = "tiny",
    overrides: Sequence[str] = (),
    *,
    output: str | None = None,
    resume: str | None = None,
    local: bool = False,
    address: str | None = None,
    verbose: bool = False,
    command: str = "",
) -> RunFolder:
    """A whole run, new or resumed.

    Args:
        recipe: name or YAML file. overrides: ``a.b=c``.
        output: the run's folder itself; default ``<config.output>/<name>-<time>``.
        resume: folder or name of a run to go on with.
        local: one process, no Ray. address: a Ray cluster; see :func:`pipelines.cluster.session.ray_session`.
        command: what the user typed, kept in run.json.

    Raises:
        DIDRError: anything the user can mend. The run folder keeps its checkpoints.
    """
    began = time.monotonic()
    old = RunFolder.find(resume, output or "runs") if resume else None
    config = old.config(overrides) if old else configs.load(recipe, overrides)
    index = preflight(config, here=local)
    view = None if local else view_of_this_machine(config, address)
    if view:
        check(run_plan(config, view), view)
    run = old or RunFolder.create(config, output, command)
    run.write_config(config)
    with outcome(run), _board(config, run) as board:
        if local:
            train_and_finish(config, run, index, board, save_grid)
        else:
            _on_ray(config, run, index, board, address, verbose)
        board.stage("writing the report")
        write_report(run.path)
        board.keep("grid.png", "curves.png", "report.html", "scores.json", "config.yaml", "grids")
    scores = run.path / "scores.json"
    print_summary(
        json.loads(scores.read_text()) if scores.is_file() else None,
        run.path,
        alarms=board.rang,
        seconds=time.monotonic() - began,
    )
    return run


class Board(Observer):
    """Progress line and MLflow: what the driver does with a run's news."""

    def __init__(self, config: Config, run: RunFolder, progress: Progress, pool: ThreadPoolExecutor) -> None:
        self.run, self.progress = run, progress
        self.rang: tuple[str, ...] = ()
        self._ready: tracking.Tracker | None = None
        # Importing MLflow and making its database takes seconds: meanwhile Ray starts.
        self._opening = pool.submit(_open_tracker, config, run)

    @property
    def tracker(self) -> tracking.Tracker:
        """MLflow, once it is open.

        Raises:
            DIDRError: it cannot be used.
        """
        if self._ready is None:
            self._ready = self._opening.result()
        return self._ready

    def started(self, run: RunFolder, config: Config, step: int) -> None:
        """Fail now, not after the first step, if MLflow cannot be used."""
        _ = self.tracker

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Onto the progress line."""
        self.progress.phase(text, done, total)

    def step(self, report: StepReport) -> None:
        """Onto the progress line and to MLflow."""
        self.progress.update(report.step, report.metrics, report.alarms)
        self.tracker.metrics(report.step, report.metrics)
        if report.alarms:
            self.tracker.alarms(report.step, report.alarms)
            self.rang = tuple(dict.fromkeys([*self.rang, *report.alarms]))

    def keep(self, *names: str) -> None:
        """Hand files of the run folder to MLflow."""
        for name in names:
            path = self.run.path / name
            if path.exists():
                self.tracker.artifact(path, name if path.is_dir() else "")


@contextmanager
def _board(config: Config, run: RunFolder) -> Iterator[Board]:
    step = run.last_step()
    with (
        ThreadPoolExecutor(1) as pool,
        Progress(config.train.steps, title=config.name, start=step) as progress,
    ):
        progress.note(f"run {run.path}" + (f", going on from step {step}" if step else ""))
        board = Board(config, run, progress, pool)
        try:
            yield board
        except BaseException as error:
            _close(board, "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        board.tracker.close("FINISHED")


def _close(board: Board, status: tracking.Status) -> None:
    """End the MLflow run of a failed training, without hiding why it failed."""
    try:
        board.tracker.close(status)
    except Exception as error:
        warnings.warn(f"MLflow could not be told that the run {status.lower()}: {error}", stacklevel=2)


def _open_tracker(config: Config, run: RunFolder) -> tracking.Tracker:
    """MLflow, in the run that ``run.json`` names. A tracker that was asked first, so that a wrong address is an error."""
    uri = tracking.preflight(config.tracking, run.path.parent)
    tracker = tracking.open_tracker(config, run.path, run_id=run.info().get("mlflow_run_id"), uri=uri)
    if tracker.run_id:
        run.update(mlflow_run_id=tracker.run_id)
    return tracker


def _slots(config: Config) -> int:
    return max(config.workers.local_cpus, os.cpu_count() or 1)


def view_of_this_machine(config: Config, address: str | None) -> ClusterView | None:
    """What a Ray of our own will have, known before it starts; None where a cluster must be asked."""
    if where_to_run(address).kind != "here":
        return None
    import torch

    return ClusterView((Node("this machine", {"CPU": _slots(config), "GPU": torch.cuda.device_count()}),), local=True)


def _on_ray(
    config: Config, run: RunFolder, index: PromptIndex, board: Board, address: str | None, verbose: bool
) -> None:
    """Start or join Ray, train there, follow."""
    board.stage("starting Ray")
    with ray_session(address, _slots(config), verbose) as view:
        fit = await_room(lambda v: run_plan(config, v), view, WAIT_FOR_NODES_S)
        if verbose:
            board.progress.console.print(fit.table())
        board.started(run, config, run.last_step())
        if scales.missing(config):
            board.stage("measuring the scales of the reward's parts")
            config = measured_scales(config, fit.cluster)
            run.write_config(config)
        from pipelines.cluster.watch import Follower

        with Follower(run, board, run.last_step()):
            fit_until_done(config, run, index, board, fit.cluster)


def measured_scales(config: Config, view: ClusterView) -> Config:
    """:func:`didr_core.data.scales.resolve` where reward models run: this process may have no GPU."""
    import ray

    need = reward_need(config.workers, view)
    task = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus or None, resources=dict(need.custom) or None)
    try:
        resolved: Config = ray.get(task(scales.resolve).remote(config))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DIDRError):
            raise error.cause from None
        raise
    return resolved


def fit_until_done(config: Config, run: RunFolder, index: PromptIndex, board: Board, view: ClusterView) -> None:
    """Fit; after a worker's death again, from the last checkpoint, `workers.max_failures` times.

    Ray Train could restart the group itself, but it cannot tell a dead node from a NaN reward, and would train into the second one again.
    """
    from ray.train import TrainingFailedError

    from pipelines.cluster.scoring import start_scorers

    scorers = start_scorers(config, reward_need(config.workers, view)) if config.black_box else []
    for failures in range(config.workers.max_failures + 1):
        step = run.last_step()
        run.forget_after(step)
        _forget_reasons(run)
        board.stage("starting workers" if not failures else f"starting workers again from step {step}")
        try:
            _trainer(config, run, index, view, step, scorers).fit()
            return
        except TrainingFailedError as error:
            reasons = _reasons(run)
            if reasons:
                raise DIDRError("\n".join(reasons)) from error
            last = str(error).strip().splitlines()[-1].partition(". ")[0][:300]
            if failures == config.workers.max_failures:
                raise DIDRError(
                    f"training failed {failures + 1} times (workers.max_failures={config.workers.max_failures}), last at step "
                    f"{board.progress.step}; `didr align --resume {run.path}` goes on from step {run.last_step()}. Last: {last}"
                ) from error
            board.progress.note(f"a worker failed; going on from step {run.last_step()} ({last})", style="yellow")
        finally:
            shutil.rmtree(run.path / "ray", ignore_errors=True)


def _trainer(
    config: Config, run: RunFolder, index: PromptIndex, view: ClusterView, step: int, scorers: Sequence[Any]
) -> Any:
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.cluster.prompts import execution_options, prompt_stream
    from pipelines.cluster.worker import train_worker

    workers = config.workers
    need = train_need(workers, view)
    datasets = {}
    if step < config.train.steps:
        cursor = step * config.train.batch
        encoder, reward = encoder_need(workers, view), reward_need(workers, view)
        datasets["train"] = prompt_stream(config, index, cursor, encoder, reward)
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": configs.dump(config),
            "run": str(run.path),
            "corpus": index.fingerprint,
            "scorers": scorers,
        },
        scaling_config=ScalingConfig(
            num_workers=workers.train,
            use_gpu=need.gpus > 0,
            resources_per_worker={"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {}), **need.custom},
        ),
        # A new name each time: what we go on from is our own checkpoint, the same with and without Ray.
        run_config=RunConfig(
            name=f"from-step-{step}", storage_path=str(run.path / "ray"), failure_config=FailureConfig(max_failures=0)
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=execution_options()),
    )


def _reasons(run: RunFolder) -> list[str]:
    """What the workers said of a mistake that the user can mend; each thing once."""
    return list(dict.fromkeys(p.read_text().strip() for p in sorted(run.path.glob("failure-*.txt"))))


def _forget_reasons(run: RunFolder) -> None:
    for path in run.path.glob("failure-*.txt"):
        path.unlink()


if __name__ == "__main__":
    from pipelines.cli.main import main

    main(["align", *sys.argv[1:]], prog=f"python -m {Path(__file__).parent.name}.align")
