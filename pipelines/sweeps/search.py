"""Which point comes next, and which trial is stopped early: Ray Tune's searcher and scheduler over what the sweep folder holds.

Tune's own state is a snapshot now and then, the sweep folder is exact, so each driver starts Tune anew over what is missing there. A point
is in points.jsonl before its trial starts: a resumed sweep gives the same number the same point, and fills the scheduler's rungs as before.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from didr_core.types import DIDRError
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.space import Domain, Point, Space, read

SEARCHES = ("random", "grid", "optuna")
SCHEDULERS = ("none", "asha")
REDUCTION = 2  # ASHA: the better half goes on at each rung
FIRST_RUNG = 1 / 4  # of the steps after the assistant's head start


class Points(Searcher):
    """Gives the trials ``numbers`` of a sweep, one after the other; with Optuna, points are made when they are asked for."""

    def __init__(self, sweep: str, numbers: list[int], resources: dict[str, float]) -> None:
        super().__init__()
        self.sweep, self.numbers, self.resources, self.given = sweep, numbers, resources, 0

    def suggest(self, trial_id: str) -> Any:
        """The next trial's settings; FINISHED when all were given."""
        if self.given >= len(self.numbers):
            return Searcher.FINISHED
        number = self.numbers[self.given]
        folder = SweepFolder(Path(self.sweep))
        if number not in folder.points():
            folder.give(number, ask(folder, number))
        self.given += 1
        return {"sweep": self.sweep, "number": number, "resources": self.resources}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to learn here: result.json says it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the folder knows."""


def need_optuna() -> None:
    """Raises DIDRError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise DIDRError(
            "--search optuna: the package optuna is not installed (`pip install optuna`). random and grid need nothing more."
        )


def ask(folder: SweepFolder, number: int) -> Point:
    """Optuna's next point: a multi-objective TPE (more gain, less distance) over all trials that have ended.

    The study is built anew from the folder each time, so that a resumed sweep asks exactly as an uninterrupted one.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    plan = folder.plan()
    space = read(plan.space, plan.tree)
    kinds = {key: _distribution(optuna, domain) for key, domain in space.domains.items()}
    sampler = optuna.samplers.TPESampler(seed=plan.seed + number, n_startup_trials=max(4, plan.trials // 3))
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for result in folder.results():
        done = result["status"] == "finished"
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
                params=_encoded(space, result["set"]),
                distributions=kinds,
                values=[result["gain"], result["distance"]] if done else None,
            )
        )
    params = study.ask(fixed_distributions=kinds).params
    return {key: _decoded(domain, params[key]) for key, domain in space.domains.items()}


def _distribution(optuna: Any, domain: Domain) -> Any:
    if domain.kind in ("choice", "grid"):
        return optuna.distributions.CategoricalDistribution(list(range(len(domain.values))))
    low, high = domain.values
    return optuna.distributions.FloatDistribution(low, high, log=domain.kind == "loguniform")


def _encoded(space: Space, point: Point) -> dict[str, Any]:
    """Values of a list travel as their places: Optuna takes only plain ones."""
    listed = ("choice", "grid")
    return {k: list(d.values).index(point[k]) if d.kind in listed else point[k] for k, d in space.domains.items()}


def _decoded(domain: Domain, value: Any) -> Any:
    return domain.values[value] if domain.kind in ("choice", "grid") else float(f"{value:.4g}")


class Asha(AsyncHyperBandScheduler):
    """ASHA on the scalarised score, which counts distance to the reference against gain: a trial that hacks its reward is not favoured.

    What it sees of a trial is in the trial's folder before it decides, and is seen again by the scheduler of a resumed sweep.
    """

    folder: SweepFolder

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """It takes the places on the rungs that it had under an earlier driver."""
        super().on_trial_add(tune_controller, trial)
        number = int(trial.config["number"])
        for seen in (*self.folder.glances(number), self.folder.result(number) or {}):
            super().on_trial_result(tune_controller, trial, seen)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop, or go on; a stopped trial is over for good, and its folder says so."""
        keep = {k: result[k] for k in ("step", "gain", "distance", "score") if k in result}
        self.folder.add_glance(int(result["number"]), **keep)
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            reason = f"ASHA: its score {result['score']:.3g} at step {result['step']} is in the lower half of its rung"
            self.folder.end(int(result["number"]), status="stopped", reason=reason, **keep)
        return str(decision)


def scheduler_of(folder: SweepFolder) -> Any:
    """The plan's scheduler; None runs every trial to its end, which a front needs: what is poor by one measure may be best by the other."""
    plan = folder.plan()
    if plan.scheduler == "none":
        return None
    train = folder.config().train
    grace = train.assistant_warmup + max(1, int((train.steps - train.assistant_warmup) * FIRST_RUNG))
    made = Asha(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=train.steps + 1,  # the last step is no rung: whoever comes so far is judged
        grace_period=min(grace, train.steps),
        reduction_factor=REDUCTION,
    )
    made.folder = folder
    for result in folder.results():
        number = result["number"]
        made.on_trial_add(None, SimpleNamespace(trial_id=f"earlier-{number}", config={"number": number}))
    return made
