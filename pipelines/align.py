"""`didr align`: preflight, a run folder, Ray Data into a Ray Train worker group (or one process with `--local`), report, MLflow.

    python -m pipelines.align --recipe tiny          # also the entrypoint for `ray job submit`
    didr align --resume runs/tiny-20260101-120000    # goes on from the last checkpoint

The driver starts the group, follows what rank 0 writes (`cluster/watch.py`), and starts the group again from the last checkpoint when
workers die. Ctrl-C and SIGTERM let the step end and keep a checkpoint of it.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data import scales
from didr_core.data.prompts import PromptIndex
from didr_core.data.storage import Store
from didr_core.evaluate.finish import train_and_finish
from didr_core.evaluate.scores import numbers
from didr_core.plan import fit
from didr_core.plan.preflight import preflight
from didr_core.train.ending import stoppable
from didr_core.train.loop import outcome
from didr_core.train.mirror import Mirror
from didr_core.train.observer import Observer
from didr_core.train.patience import Patience
from didr_core.train.run_folder import AUTO, RunFolder, may_change, settings
from didr_core.types import DIDRError, StepReport
from pipelines.cluster.disks import check_disks
from pipelines.cluster.leftovers import looked_after
from pipelines.cluster.resources import ClusterView, check, demands_of
from pipelines.cluster.session import await_room, pulse, ray_session, slots, view_of_this_machine, where_to_run
from pipelines.report.console import Progress, print_summary, warn
from pipelines.report.figures import save_grid
from pipelines.report.page import read_history, steps_told, write_report
from pipelines.tracking import tracker as tracking
from pipelines.tracking.address import look


def align(
    recipe: str = "tiny",
    overrides: Sequence[str] = (),
    *,
    output: str | None = None,
    resume: str | None = None,
    local: bool = False,
    address: str | None = None,
    verbose: bool = False,
    profile: bool = False,
    command: str = "",
) -> RunFolder:
    """A whole run, new or resumed.

    Args:
        recipe: name or YAML file. overrides: ``a.b=c``.
        output: the run's folder itself; default ``<config.output>/<name>-<time>``.
        resume: folder or name of a run to go on with, `latest` or `auto` (:data:`didr_core.train.run_folder.AUTO`); ``output`` is then
            where runs lie.
        local: one process, no Ray. address: a Ray cluster; see :func:`pipelines.cluster.session.ray_session`.
        profile: print where the time of a step went, by part of the step (rank 0's), and keep it in the run folder.
        command: what the user typed, kept in run.json.

    Raises:
        DIDRError: anything the user can mend. The run folder keeps its checkpoints.
        SystemExit: Ctrl-C or SIGTERM; see :func:`didr_core.train.ending.stoppable`.
    """
    began = time.monotonic()
    old, config = _begun(recipe, overrides, output, resume)
    asked, output = settings(config), None if resume else output
    place = old or RunFolder.at("--output" if output else "output", output or config.output)
    if place.address:
        Store(place.address).probe()
    own_ray = not local and where_to_run(address).kind == "here"
    found = place.path if old or output else None
    index = preflight(config, here=local, gpus=local or own_ray, output=found, note=warn)
    runs = place.path.parent if old or output else place.path
    check_disks(config.tracking, runs, ray=own_ray)
    view = None if local else view_of_this_machine(config, address)
    if view:
        check(demands_of(config, view), view)
    told = ""
    if local or view:  # a cluster's GPUs are asked when it is there
        config, told = fit.here(config)
    look(config.tracking, runs)
    run = old or RunFolder.create(config, output, command)
    if not old:
        run.update(settings=asked)
    if config.cache:  # an absolute path, the same in all processes
        cache = config.cache if config.data.cache else run.path.parent / "cache"
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache": str(cache)})})
    # Ray ends last: what run.json and MLflow say of a failure must not depend on how a broken Ray takes it
    with (
        stoppable(),  # of every moment in which run.json says "running"
        ExitStack() as session,
        run.mirrored(config.train.keep_checkpoints, warn) as mirror,
        outcome(run),
        _observer(config, run, mirror) as observer,
        stoppable(observer.ask_to_stop),
    ):
        record = looked_after(run.path)
        shutil.rmtree(run.path / "ray", ignore_errors=True)
        if changed := run.same_start(index.digest):
            warn(changed)
        run.write_config(config)
        run.profile_path.unlink(missing_ok=True)  # of an earlier part of the run
        observer.note(told)
        observer.note(index.overlap)
        if old and overrides and resume != AUTO:
            run.update(resumed=[*run.info().get("resumed", []), command])
        if local:
            train_and_finish(config, run, index, observer, save_grid, profile)
        else:
            patience = Patience(observer, config.workers.patience_s)
            patience.stage("starting Ray")
            with patience.watching():  # Ray may wait inside of its C++ for ever, for processes that came too late
                view = session.enter_context(ray_session(address, slots(config), verbose))
            _on_ray(config, run, index, observer, view, verbose, profile, record, mirror.flush)
            session.close()
        observer.stage("writing the report")
        write_report(run.path)
        if run.address:
            observer.stage(f"bringing all of it to {run.place}")
            mirror.flush()
        observer.keep("grid.png", "curves.png", "report.html", "scores.json", "config.yaml", "grids")
        file = run.path / "scores.json"
        scores = json.loads(file.read_text()) if file.is_file() else None
        if scores:
            observer.tracker.final({f"score/{name}": value for name, value in numbers(scores, "aligned").items()})
        if (run.path / "export").is_dir():
            observer.tracker.model(run.path / "export", config.tracking.weights)
    print_summary(
        scores,
        run.path,
        alarms=observer.rang,
        limits=config.alarms,
        steps=steps_told(read_history(run.path)),
        seconds=time.monotonic() - began,
        tracked=observer.tracker.page,
        profile=json.loads(run.profile_path.read_text()) if run.profile_path.is_file() else None,
    )
    return run


def _begun(
    recipe: str, overrides: Sequence[str], output: str | None, resume: str | None
) -> tuple[RunFolder | None, Config]:
    """The run to go on with, None for a new one, and its settings."""
    if resume and resume != AUTO:
        old = RunFolder.find(resume, output or "runs")
        return old, old.config(overrides)
    config = configs.load(recipe, [*overrides, *([f"output={output}"] if output and resume else [])])
    if resume and (left := RunFolder.unfinished(config)):
        return left, left.config([item for item in overrides if may_change(item)])
    return None, config


class RunObserver(Observer):
    """Progress line and MLflow: what the driver does with a run's news."""

    def __init__(self, config: Config, run: RunFolder, progress: Progress, pool: ThreadPoolExecutor) -> None:
        self.run, self.progress = run, progress
        self.rang: tuple[str, ...] = ()
        self._stepping = False
        # Importing MLflow and making its database takes seconds: meanwhile Ray starts.
        self._opening = pool.submit(_open_tracker, config, run)

    @property
    def tracker(self) -> tracking.Tracker:
        """MLflow, once it is open.

        Raises:
            DIDRError: it cannot be used.
        """
        return self._opening.result()

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Onto the progress line. Fails now, not after the first step, if MLflow cannot be used."""
        self._stepping = False
        if self._opening.done():
            self._opening.result()
        self.progress.phase(text, done, total)

    def note(self, text: str, style: str = "") -> None:
        """A line above the progress line, where there is something to say."""
        if text:
            self.progress.note(text, style=style)

    def step(self, report: StepReport) -> None:
        """Onto the progress line and to MLflow."""
        self._stepping = True
        self.progress.update(report.step, report.metrics, report.alarms)
        self.tracker.metrics(report.step, report.metrics)
        if report.alarms:
            self.tracker.alarms(report.step, report.alarms)
            self.rang = tuple(dict.fromkeys([*self.rang, *report.alarms]))

    def ask_to_stop(self) -> bool:
        """Let the step end and be kept; False where there is none: everything is on disk. Says so now, a second kill may be near."""
        if self._stepping:
            self.run.stop_path.touch()
            self.run.update(status="interrupted")
            threading.Thread(target=self._stopping).start()  # a signal may come while this thread writes
        return self._stepping

    def _stopping(self) -> None:
        self.note("stopping after this step, with a checkpoint; once more ends it at once", "yellow")
        self.tracker.status("KILLED")

    def stuck(self, error: DIDRError) -> None:
        """What the end of the process would leave unsaid."""
        self.run.update(status="failed", message=str(error), ended=time.time())
        self.progress.note(f"error: {error}", style="red")
        self.tracker.close("FAILED")

    def keep(self, *names: str) -> None:
        """Hand files of the run folder to MLflow."""
        for name in names:
            path = self.run.path / name
            if path.exists():
                self.tracker.artifact(path, name if path.is_dir() else "")


@contextmanager
def _observer(config: Config, run: RunFolder, mirror: Mirror) -> Iterator[RunObserver]:
    step = run.last_step()
    with (
        ThreadPoolExecutor(1) as pool,
        Progress(config.train.steps, title=config.name, start=step, limits=config.alarms) as progress,
    ):
        progress.note(f"run {run.place}" + (f", going on from step {step}" if step else ""))
        observer = RunObserver(config, run, progress, pool)
        mirror.say = observer.note
        try:
            yield observer
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt | SystemExit)
            with suppress(Exception):  # where MLflow could not be opened, that is the error
                observer.tracker.close("KILLED" if killed else "FAILED")
            if killed:
                progress.note(f"`didr align --resume {run.place}` goes on from step {run.last_step()}")
            raise
        finally:
            mirror.say = warn
        observer.tracker.close("FINISHED")


def _open_tracker(config: Config, run: RunFolder) -> tracking.Tracker:
    """MLflow, in the run that ``run.json`` names. A tracker that was asked first, so that a wrong address is an error."""
    uri = tracking.preflight(config.tracking, run.path.parent)
    tracker = tracking.open_tracker(config, run.path, run_id=run.info().get("mlflow_run_id"), uri=uri)
    if tracker.run_id:
        run.update(mlflow_run_id=tracker.run_id)
    return tracker


def _on_ray(
    config: Config,
    run: RunFolder,
    index: PromptIndex,
    observer: RunObserver,
    view: ClusterView,
    verbose: bool,
    profile: bool,
    record: Callable[[], None],
    settle: Callable[[], None],
) -> None:
    """Wait for room, train there, follow; ``record`` what was started; after ``settle`` the folder has what the workers wrote."""
    record()
    room = await_room(lambda v: demands_of(config, v), view, observer.stage)
    if verbose:
        observer.progress.console.print(room.table())
    # Ray's libraries read their environment when they are imported: the session has set it
    from pipelines.cluster.group import fit_until_done, fitted, measured_scales
    from pipelines.cluster.members import Members
    from pipelines.cluster.remote import in_thread
    from pipelines.cluster.watch import POLL_S, Follower

    shutil.rmtree(run.calls_path, ignore_errors=True)
    patience = Patience(observer, config.workers.patience_s, run.calls_path)
    if fit.undecided(config):
        config, told = fitted(config, room.cluster)
        run.write_config(config)
        observer.note(told)
    if scales.missing(config):
        observer.stage("measuring the scales of the reward's parts")
        config = measured_scales(config, room.cluster, patience.look)
        run.write_config(config)
    follower, check_alive = Follower(run, patience, run.last_step()), pulse()
    members = Members(config, run, room.cluster, observer.stage)
    training = in_thread(fit_until_done, members, run, index, patience, profile, settle)
    try:
        while wait([training], POLL_S).not_done:
            follower.look()
            check_alive()
            patience.look()
            members.look()
            record()
        training.result()
    finally:
        follower.look()
        run.stage_path.unlink(missing_ok=True)
        shutil.rmtree(run.calls_path, ignore_errors=True)


if __name__ == "__main__":
    from pipelines.cli.main import main

    main(["align", *sys.argv[1:]], prog=f"python -m {Path(__file__).parent.name}.align")
