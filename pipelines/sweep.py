"""`didr sweep`: trials over a space with Ray Tune, one MLflow run with a child a trial, and at the end a front and a recommendation.

    python -m pipelines.sweep --recipe tiny --space tilt_by_drp          # also the entrypoint for `ray job submit`
    didr sweep --resume NAME                                             # finished trials stay, the others go on

The sweep folder is the truth (:mod:`pipelines.sweeps.folder`), Tune schedules, the driver follows files. See README.md.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from didr_core.config import Config
from didr_core.data import scales
from didr_core.plan.preflight import preflight
from didr_core.types import DIDRError
from pipelines.cluster.resources import ClusterView, NoRoom
from pipelines.cluster.session import (
    WAIT_FOR_NODES_S,
    await_room,
    prepare_environment,
    ray_session,
    view_of_this_machine,
)
from pipelines.report.console import clock, console, rich_table
from pipelines.sweeps import bench, results, space
from pipelines.sweeps.budget import estimate, plan_table, slots, sweep_demands, trial_need, trials_at_once
from pipelines.sweeps.folder import SweepFolder, SweepOptions
from pipelines.sweeps.space import DEFAULT_TRIALS
from pipelines.tracking import tracker as tracking

TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # we write our own files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once: everything worth keeping is on disk already
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def sweep(
    options: SweepOptions,
    *,
    output: str | None = None,
    resume: str | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> SweepFolder:
    """A whole sweep, new or resumed.

    Args:
        output: where sweeps lie (default: the recipe's). resume: a sweep to go on with, as it began: of ``options`` nothing counts.

    Raises:
        DIDRError: anything the user can mend. The folder keeps all that is done.
    """
    began = time.monotonic()
    if resume:
        folder = SweepFolder.find(resume, output or "runs")
        if options.overrides:
            raise DIDRError(
                f"--set {options.overrides[0]!r}: a resumed sweep goes on as it began. Start another one for other settings."
            )
    else:
        folder = _new(options, output)
    with folder.lock():
        try:
            _run(folder, address, verbose, began)
        except KeyboardInterrupt:
            folder.update(status="interrupted")
            raise
        except NoRoom:
            if not resume:  # nothing was begun: the name is free again
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        except BaseException:
            folder.update(status="failed")
            raise
    return folder


def _new(options: SweepOptions, output: str | None) -> SweepFolder:
    """Check everything that can be checked, then make the folder."""
    prepare_environment()
    from pipelines.sweeps.search import SCHEDULERS, SEARCHES, need_optuna

    found = space.find(options.space)
    search = options.search or ("grid" if found.is_grid else "random")
    for key, value, known in (("--search", search, SEARCHES), ("--scheduler", options.scheduler, SCHEDULERS)):
        if value not in known:
            raise DIDRError(f"{key} {value!r}: expected one of {', '.join(known)}")
    if search == "optuna":
        need_optuna()
    points = [] if search == "optuna" else space.draw(found, search, options.trials or None, options.seed)
    overrides = [*options.overrides, *([f"output={output}"] if output else [])]
    config = space.check(found, points or space.corners(found), options.recipe, overrides)
    bench.check(config)
    if not config.workers.train_gpus and config.device == "cuda":
        raise DIDRError(
            "workers.train_gpus=0 with device=cuda: a trial reserves no GPU. Say --set workers.train_gpus=1, or a fraction."
        )
    preflight(config, here=False)
    options = replace(
        options,
        name=options.name or f"sweep-{found.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        overrides=[o for o in options.overrides if not o.startswith("output=")],
        space=found.name,
        about=found.about,
        tree=found.tree(),
        search=search,
        trials=len(points) or options.trials or DEFAULT_TRIALS,
    )
    return SweepFolder.create(options, config, points)


def _run(folder: SweepFolder, address: str | None, verbose: bool, began: float) -> None:
    for key, value in TUNE_ENV.items():
        os.environ.setdefault(key, value)
    prepare_environment(verbose)
    config, options = folder.config(), folder.plan()
    out = console()
    if folder.info()["status"] == "finished":
        _say(folder, out, began)  # nothing to go on with
        return
    folder.update(status="running")
    folder.forget_lost()
    view = view_of_this_machine(config, address)
    if view:
        view = _with_slots(view, config, options)
        options = _decide(folder, config, view, out)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(tracking.preflight, config.tracking, folder.path.parent)
        with ray_session(
            address, slots(config, options.workers, options.concurrent or 1) if view else None, verbose
        ) as cluster:
            if view is None:
                await_room(
                    lambda v: sweep_demands(config, v, options.workers, options.concurrent or 1),
                    cluster,
                    WAIT_FOR_NODES_S,
                )
                _decide(folder, config, cluster, out)
            _on_ray(folder, cluster, opening, began)
    _say(folder, out, began)


def _with_slots(view: ClusterView, config: Config, options: SweepOptions) -> ClusterView:
    """A Ray of our own has as many CPU slots as the trials asked for need."""
    node = view.nodes[0]
    cpus = slots(config, options.workers, options.concurrent or 1)
    return replace(view, nodes=(replace(node, resources={**node.resources, "CPU": cpus}),))


def _decide(folder: SweepFolder, config: Config, view: ClusterView, out: Any) -> SweepOptions:
    """How many trials at once; print the plan."""
    options = folder.plan()
    asked = folder.info().get("asked", options.concurrent)
    at_once, found = trials_at_once(config, view, options.workers, options.trials, asked or None)
    options = replace(options, concurrent=at_once)
    folder.update(plan=asdict(options), asked=asked)
    out.print(plan_table(config, space.read(options.space, options.tree, options.about), options, found, folder.path))
    done = len(folder.results())
    if done:
        out.print(f"going on: {done} of {options.trials} trials are over")
    return options


def _on_ray(folder: SweepFolder, cluster: ClusterView, opening: Future[str], began: float) -> None:
    from pipelines.sweeps.monitor import SweepMonitor

    config, options = folder.config(), folder.plan()
    if scales.missing(config):
        from pipelines.cluster.group import measured_scales

        config = measured_scales(config, cluster)
        folder.set_config(config)
    need = trial_need(config, cluster, 1)
    with SweepMonitor(folder, opening.result()) as monitor:
        if missing := _missing(folder):
            monitor.note("shared work: prompts, the start's and the reference's scores")
            step_seconds = _elsewhere(monitor, need, "prepare", str(folder.path))
            monitor.note(f"time: {estimate(config, options, step_seconds)}")
            _tune(folder, monitor, missing, trial_need(config, cluster, options.workers).amounts())
        for number in folder.points():
            monitor.settle(number)
        if missing := _missing(folder):
            raise DIDRError(
                f"{len(missing)} trial(s) did not end; `didr sweep --resume {folder.name}` tries them again: {missing}"
            )
        _conclude(folder, monitor, need, began)


def _missing(folder: SweepFolder) -> list[int]:
    return [number for number in range(folder.plan().trials) if folder.result(number) is None]


def _elsewhere(monitor: Any, need: Any, function: str, *arguments: Any) -> Any:
    """A function of :mod:`pipelines.sweeps.work` in a process with a trial's resources; drawing a large reference may take its time."""
    from pipelines.cluster.remote import elsewhere
    from pipelines.sweeps import work

    return elsewhere(need, getattr(work, function), *arguments, meanwhile=monitor.news)


def _tune(folder: SweepFolder, monitor: Any, missing: list[int], resources: dict[str, float]) -> None:
    """Tune over the trials that are missing; nothing of what an earlier driver's Tune has kept is read."""
    from ray import tune

    from pipelines.sweeps.search import Points, scheduler_of
    from pipelines.sweeps.trial import Trial

    options, config = folder.plan(), folder.config()
    tune.Tuner(
        Trial,
        tune_config=tune.TuneConfig(
            search_alg=Points(str(folder.path), missing, resources),
            scheduler=scheduler_of(folder),
            num_samples=len(missing),
            max_concurrent_trials=options.concurrent,
            reuse_actors=options.workers == 1,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(folder.path / "tune"),
            callbacks=[monitor],
            failure_config=tune.FailureConfig(max_failures=config.workers.max_failures),
            verbose=0,
        ),
    ).fit()


def _conclude(folder: SweepFolder, monitor: Any, need: Any, began: float) -> None:
    """Table, front, figures, export of the recommended trial."""
    from pipelines.report.page import write_report
    from pipelines.sweeps import figures

    found = folder.results()
    chosen, why = results.recommend(found)
    results.write_table(folder, found, chosen)
    if chosen is not None:
        tree = results.front_tree(folder, found, chosen, why)
        judge = "held-out judge" if folder.config().judge else "training reward on held-out prompts"
        figures.save_front(
            found,
            chosen,
            folder.path / "front.png",
            gain=f"gain of the {judge} (sd of the start's scores)",
            distance="distance to the reference's pictures\n(sd of its picture features)",
        )
        figures.save_heat(found, folder.path / "heat.png")
        _elsewhere(monitor, need, "export", str(folder.path), chosen)
        write_report(folder.trial(chosen).path)
        monitor.final(
            {f"recommended/{k}": float(tree["recommended"][k]) for k in results.PARTS},
            {"didr.recommended": str(chosen)},
        )
    folder.update(wall=[*folder.info().get("wall", []), round(time.monotonic() - began, 3)])
    results.write_front(folder, results.front_tree(folder, found, chosen, why))
    monitor.keep("front.png", "heat.png", "trials.parquet", "front.json", "config.yaml")
    folder.update(status="finished", ended=time.time(), recommended=chosen)


def _say(folder: SweepFolder, out: Any, began: float) -> None:
    found = folder.results()
    chosen, why = results.recommend(found)
    header, rows = results.table(folder, found, chosen)
    out.print(rich_table(header, rows, bold="" if chosen is None else str(chosen + 1)))
    for line in results.summary(folder, chosen, why):
        out.print(line, soft_wrap=True)
    out.print(f"\ntook {clock(time.monotonic() - began)}")
    for name in ("front.png", "heat.png", "trials.parquet", "front.json", "export"):
        if (folder.path / name).exists():
            out.print(f"{Path(name).stem:<9}{folder.path / name}", soft_wrap=True)
    if chosen is None:
        reasons = [f"trial {r['number'] + 1}: {r.get('reason', r['status'])}" for r in found]
        raise DIDRError("no trial ran to its end. " + "; ".join(reasons[:3]))


if __name__ == "__main__":
    from pipelines.cli.main import main

    main(["sweep", *sys.argv[1:]], prog=f"python -m {Path(__file__).parent.name}.sweep")
