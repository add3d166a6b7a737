"""Which point comes next, and which trial is stopped early: Ray Tune's searcher and scheduler over what the sweep folder holds.

Each driver starts Tune anew over what is missing there: a resumed sweep gives a number the same point and fills the scheduler's rungs anew.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from didr_core.types import DIDRError
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.space import Domain, Point

SEARCHES = ("random", "grid", "optuna")
SCHEDULERS = ("none", "asha")
REDUCTION = 2  # ASHA: the better half goes on at each rung
FIRST_RUNG = 1 / 4  # of the steps after the assistant's head start


class Points(Searcher):
    """Gives the trials ``numbers`` of a sweep, one after the other; with Optuna, points are made when they are asked for."""

    def __init__(self, folder: SweepFolder, numbers: Sequence[int]) -> None:
        super().__init__()
        self.folder, self.left = folder, list(numbers)

    def suggest(self, trial_id: str) -> Any:
        """The next trial's settings; FINISHED when all were given."""
        if not self.left:
            return Searcher.FINISHED
        number = self.left.pop(0)
        if number not in self.folder.points():
            self.folder.give(number, ask(self.folder, number))
        return {"sweep": str(self.folder.path), "number": number}

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
    options, domains = folder.options(), folder.space().domains
    kinds = {key: _distribution(optuna, domain) for key, domain in domains.items()}
    sampler = optuna.samplers.TPESampler(seed=options.seed + number, n_startup_trials=max(4, options.trials // 3))
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for result in folder.results():
        done = result["status"] == "finished"
        point = result["set"]
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
                params={k: d.values.index(point[k]) if d.listed else point[k] for k, d in domains.items()},
                distributions=kinds,
                values=[result["gain"], result["distance"]] if done else None,
            )
        )
    asked = study.ask(fixed_distributions=kinds).params
    return {k: d.values[asked[k]] if d.listed else d.rounded(asked[k]) for k, d in domains.items()}


def _distribution(optuna: Any, domain: Domain) -> Any:
    """Values of a list travel as their places: Optuna takes only plain ones."""
    if domain.listed:
        return optuna.distributions.CategoricalDistribution(list(range(len(domain.values))))
    return optuna.distributions.FloatDistribution(*domain.values, log=domain.kind == "loguniform")


class Asha(AsyncHyperBandScheduler):
    """ASHA on the scalarised score, which counts distance to the reference against gain: a trial that hacks its reward is not favoured.

    What it sees of a trial is in the trial's folder before it decides, and is seen again by the scheduler of a resumed sweep.
    """

    def __init__(self, folder: SweepFolder) -> None:
        train = folder.config().train
        grace = train.assistant_warmup + max(1, int((train.steps - train.assistant_warmup) * FIRST_RUNG))
        super().__init__(
            time_attr="step",
            metric="score",
            mode="max",
            max_t=train.steps + 1,  # the last step is no rung: whoever comes so far is judged
            grace_period=min(grace, train.steps),
            reduction_factor=REDUCTION,
        )
        self.folder = folder
        for result in folder.results():
            number = result["number"]
            self.on_trial_add(None, SimpleNamespace(trial_id=f"earlier-{number}", config={"number": number}))

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
