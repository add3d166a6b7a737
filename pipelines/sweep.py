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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from didr_core.config.files import claimed, clear_partials
from didr_core.data import scales
from didr_core.data.storage import local_folder
from didr_core.plan import fit
from didr_core.plan.preflight import preflight
from didr_core.train.ending import stoppable
from didr_core.train.run_folder import AUTO, compared
from didr_core.types import DIDRError
from pipelines.cluster.disks import check_disks
from pipelines.cluster.leftovers import looked_after
from pipelines.cluster.resources import ClusterView, Need, NoRoom
from pipelines.cluster.session import await_room, prepare_environment, ray_session, view_of_this_machine, where_to_run
from pipelines.report.console import clock, console, rich_table, warn
from pipelines.sweeps import bench, results, space
from pipelines.sweeps.budget import estimate, plan_table, slots, sweep_demands, trial_need, trials_at_once
from pipelines.sweeps.folder import SweepFolder, SweepOptions, drives_group, trial_name
from pipelines.sweeps.space import DEFAULT_TRIALS
from pipelines.tracking import tracker as tracking

if TYPE_CHECKING:  # Ray reads its environment when it is imported: the session sets it first
    from pipelines.sweeps.monitor import SweepMonitor

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
        output: where sweeps lie (default: the recipe's). resume: a sweep to go on with, as it began: of ``options`` nothing counts; `auto`
            is the newest unfinished one with the same ``options``, else a new one.

    Raises:
        DIDRError: anything the user can mend. The folder keeps all that is done.
    """
    began = time.monotonic()
    if resume and resume != AUTO:
        folder = SweepFolder.find(resume, output or "runs")
        if options.overrides:
            raise DIDRError(
                f"--set {options.overrides[0]!r}: a resumed sweep goes on as it began. Start another one for other settings."
            )
    else:
        folder = _new(options, output, address, resume)
    with folder.lock():
        record = looked_after(folder.path)
        clear_partials(folder.path)
        try:
            with stoppable():
                _run(folder, address, verbose, began, record)
        except (KeyboardInterrupt, SystemExit):
            folder.update(status="interrupted")
            raise
        except NoRoom:
            if resume:
                folder.update(status="failed")
            else:  # nothing was begun: the name is free again
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        except BaseException:
            folder.update(status="failed")
            raise
    return folder


def _new(
    options: SweepOptions, output: str | None, address: str | None = None, resume: str | None = None
) -> SweepFolder:
    """Check everything that can be checked, then make the folder; with ``resume``, find it first."""
    prepare_environment(here=where_to_run(address).kind == "here")
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
    sweeps = local_folder("output", config.output)
    bench.check(config)
    if not config.workers.train_gpus and config.device == "cuda":
        raise DIDRError(
            "workers.train_gpus=0 with device=cuda: a trial reserves no GPU. Say --set workers.train_gpus=1, or a fraction."
        )
    own_ray = where_to_run(address).kind == "here"
    preflight(config, here=False, gpus=own_ray, note=warn)
    check_disks(config.tracking, sweeps / options.name, ray=own_ray)
    options = replace(
        options,
        overrides=[o for o in options.overrides if not o.startswith("output=")],
        space=found.name,
        about=found.about,
        tree=found.tree(),
        search=search,
        trials=len(points) or options.trials or DEFAULT_TRIALS,
    )
    if resume and (old := SweepFolder.unfinished(options, config.output)):
        return old
    name = options.name or claimed(sweeps, f"sweep-{found.name}")
    return SweepFolder.create(replace(options, name=name), config, points)


def _run(folder: SweepFolder, address: str | None, verbose: bool, began: float, record: Callable[[], None]) -> None:
    for key, value in TUNE_ENV.items():
        os.environ.setdefault(key, value)
    own_ray = where_to_run(address).kind == "here"
    prepare_environment(verbose, here=own_ray)
    config, options = folder.config(), folder.options()
    if folder.info()["status"] == "finished":
        _say(folder, began)  # nothing to go on with
        return
    digest = preflight(config, here=False, gpus=own_ray, output=folder.path).digest
    if told := compared({**folder.info(), **options.facts}, digest, f"sweep {folder.path}"):
        warn(told)
    folder.update(status="running", prompts=digest)
    folder.forget_lost()
    at_once = options.concurrent or 1
    view = view_of_this_machine(config, address, slots(config, options.workers, at_once))
    if view:  # a Ray of our own: what does not fit is said before it starts
        at_once = _decide(folder, view)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(tracking.preflight, config.tracking, folder.path.parent)
        with ray_session(address, slots(config, options.workers, at_once), verbose) as cluster:
            record()
            if not view:
                await_room(lambda v: sweep_demands(config, v, options.workers, at_once), cluster, console().print)
                _decide(folder, cluster)
            _on_ray(folder, cluster, opening, began)
    _say(folder, began)


def _decide(folder: SweepFolder, view: ClusterView) -> int:
    """How many trials run at once; prints the plan."""
    config, options = folder.config(), folder.options()
    asked = folder.info().get("asked", options.concurrent)
    at_once, found = trials_at_once(config, view, options.workers, options.trials, asked or None)
    options = replace(options, concurrent=at_once)
    folder.update(plan=asdict(options), asked=asked)
    out = console()
    out.print(plan_table(config, folder.space(), options, found, folder.path))
    if done := len(folder.results()):
        out.print(f"going on: {done} of {options.trials} trials are over")
    return at_once


def _on_ray(folder: SweepFolder, cluster: ClusterView, opening: Future[str], began: float) -> None:
    from pipelines.cluster.remote import elsewhere
    from pipelines.sweeps import work
    from pipelines.sweeps.monitor import SweepMonitor

    config, options = folder.config(), folder.options()
    if fit.undecided(config):
        from pipelines.cluster.group import fitted

        gpus = config.workers.train_gpus
        config, told = fitted(config, cluster, max(1, int(1 / gpus)) if gpus else 1)
        folder.set_config(config)
        console().print(told)
    if scales.missing(config):
        from pipelines.cluster.group import measured_scales

        config = measured_scales(config, cluster)
        folder.set_config(config)
    need = trial_need(config, cluster, 1)
    with SweepMonitor(folder, opening.result()) as monitor:
        if folder.missing():
            monitor.note("shared work: prompts, the start's and the reference's scores")
            # drawing a large reference may take its time
            step_seconds = elsewhere(need, work.prepare, folder, meanwhile=monitor.news)
            monitor.note(f"time: {estimate(config, options, step_seconds)}")
            _tune(folder, monitor, trial_need(config, cluster, options.workers).amounts())
        for number in folder.points():
            monitor.settle(number)
        if missing := folder.missing():
            raise DIDRError(
                f"{len(missing)} trial(s) did not end; `didr sweep --resume {folder.name}` tries them again: {missing}"
            )
        _conclude(folder, monitor, need, began)


def _tune(folder: SweepFolder, monitor: SweepMonitor, resources: dict[str, float]) -> None:
    """Tune over the trials that are missing; nothing of what an earlier driver's Tune has kept is read."""
    from ray import tune

    from pipelines.sweeps.search import Asha, Points
    from pipelines.sweeps.trial import Trial

    options, missing = folder.options(), folder.missing()
    tune.Tuner(
        tune.with_resources(Trial, tune.PlacementGroupFactory([resources])),
        tune_config=tune.TuneConfig(
            search_alg=Points(folder, missing),
            scheduler=Asha(folder) if options.scheduler == "asha" else None,
            num_samples=len(missing),
            max_concurrent_trials=options.concurrent,
            reuse_actors=not drives_group(folder.config(), options.workers),
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(folder.path / "tune"),
            callbacks=[monitor],
            failure_config=tune.FailureConfig(max_failures=folder.config().workers.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # they are the run folders' own
            verbose=0,
        ),
    ).fit()


def _conclude(folder: SweepFolder, monitor: SweepMonitor, need: Need, began: float) -> None:
    """Table, front, figures, export of the recommended trial, and what MLflow keeps of them."""
    from pipelines.cluster.remote import elsewhere
    from pipelines.report.page import write_report
    from pipelines.sweeps import figures, work
    from pipelines.sweeps.monitor import keep_files

    found = folder.results()
    chosen, why = results.recommend(found)
    results.write_table(folder, found, chosen)
    if chosen is not None:
        judge = "held-out judge" if folder.config().judge else "training reward on held-out prompts"
        figures.save_front(
            found,
            chosen,
            folder.path / "front.png",
            gain=f"gain of the {judge} (sd of the start's scores)",
            distance="distance to the reference's pictures\n(sd of its picture features)",
        )
        figures.save_heat(found, folder.path / "heat.png")
        elsewhere(need, work.export, folder, chosen)
        write_report(folder.trial(chosen).path)
        best = next(r for r in found if r["number"] == chosen)
        monitor.parent.final({f"recommended/{k}": float(best[k]) for k in results.PARTS})
        monitor.parent.tags({"didr.recommended": str(chosen)})
    folder.update(wall=[*folder.info().get("wall", []), round(time.monotonic() - began, 3)])
    folder.write("front.json", results.front_tree(folder, found, chosen, why))
    keep_files(monitor.parent, folder.path, "front.png", "heat.png", "trials.parquet", "front.json", "config.yaml")
    folder.update(status="finished", ended=time.time(), recommended=chosen)


def _say(folder: SweepFolder, began: float) -> None:
    out, found = console(), folder.results()
    chosen, why = results.recommend(found)
    bold = "" if chosen is None else f"{chosen:04d}"
    whole, narrow = (rich_table(*results.table(folder, found, chosen, n), bold=bold) for n in (False, True))
    wanted = out.measure(whole, options=out.options.update(width=10 * out.width)).maximum
    out.print(whole if wanted <= out.width else narrow)
    for line in results.summary(folder, chosen, why):
        out.print(line, soft_wrap=True)
    out.print(f"\ntook {clock(time.monotonic() - began)}")
    for name in ("front.png", "heat.png", "trials.parquet", "front.json", "export"):
        if (folder.path / name).exists():
            out.print(f"{Path(name).stem:<9}{folder.path / name}", soft_wrap=True)
    if chosen is None:
        reasons = [f"{trial_name(r['number'])}: {r.get('reason', r['status'])}" for r in found]
        raise DIDRError("no trial ran to its end. " + "; ".join(reasons[:3]))


if __name__ == "__main__":
    from pipelines.cli.main import main

    main(["sweep", *sys.argv[1:]], prog=f"python -m {Path(__file__).parent.name}.sweep")
