"""Do the rivals trade fidelity for reward better or worse than DIDR? Every method over a sweep of its reward weight, at equal wall-clock.

    python -m benchmarks.pareto --seconds 240 --seeds 0 1 2 --jobs 2

1. The seconds that a step takes are measured for all methods in turn, step by step, so that a change of the machine's load hits all alike;
   `--seconds` then buys each method its own number of generator steps. Loading, evaluation and the assistant's head start do not count.
2. Each (method, weight, seed) is one training of the recipe from the same start, in a process of its own (`didr_core.train.loop`).
3. Each is scored on the same held-out captions and noise: utility and held-out judge (gain) against strict accuracy, feature distance to
   the guided teacher's pictures and diversity across noise seeds (fidelity).
4. Fronts and hypervolumes per method, with 95 % intervals over captions and training seeds.

DMD2 without its GAN is not listed: where `diff_instruct` runs with five assistant updates and W on, as in `tiny`, they are one.
A weight is a multiple of the method's own unit (:data:`METHODS`): for DIDR it divides the recipe's `drp.beta`. `didr_blackbox` is trained
on the analytic checker, which has no gradient, with the importance estimator: it stands beside the fronts. Everything finished in
`--work` is kept: call again to go on. Writes ``pareto.json``, ``pareto.png`` and ``table.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import pareto_along
from benchmarks.pareto_figure import save_fronts
from benchmarks.trainings import train
from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.files import replace_text
from didr_core.config.registry import find
from didr_core.data.feed import LocalFeed
from didr_core.evaluate.contestants import fingerprint, one_step_contestant, teacher_contestant
from didr_core.evaluate.evaluator import Evaluator
from didr_core.evaluate.finish import heldout
from didr_core.evaluate.fronts import distances, front, hypervolumes
from didr_core.evaluate.paired import Array, Bootstrap, interval
from didr_core.evaluate.scores import describe, origin
from didr_core.export.card import markdown
from didr_core.export.folder import exported
from didr_core.train.learner import Learner
from didr_core.types import Batch, DIDRError

Overrides = list[str]


@dataclass(frozen=True)
class Method:
    """What a weight means for a method; without ``strength`` there is no reward and one training does for all weights."""

    overrides: tuple[str, ...]
    strength: Callable[[Config, float], str] | None = None
    weights: tuple[float, ...] = ()  # its own, where a sweep would say nothing
    apart: bool = False  # measured, but on no front: its reward is what the others are judged by

    def settings(self, base: Config, weight: float) -> Overrides:
        """Overrides of the training at ``weight``."""
        return [*self.overrides, *([self.strength(base, weight)] if self.strength else [])]


def _weight(name: str) -> Callable[[Config, float], str]:
    unit = find("algorithms", name).Config.model_fields["weight"].default
    return lambda _, weight: f"algorithm.weight={unit * weight:g}"


METHODS: dict[str, Method] = {
    "didr": Method(("algorithm=didr",), lambda base, weight: f"drp.beta={base.drp.beta / weight:g}"),
    "didr_hybrid": Method(
        ("algorithm=didr", "drp.estimator=hybrid", "drp.steps=2", "drp.particles=2", "drp.snr_gate=false"),
        lambda base, weight: f"drp.beta={base.drp.beta / weight:g}",
    ),
    "didr_blackbox": Method(
        (
            "algorithm=didr",
            "reward=didr_core.world.checker_reward:CheckerReward",
            *("drp.estimator=importance", "drp.steps=2", "drp.particles=8", "drp.snr_gate=false"),
        ),
        lambda base, weight: f"drp.beta={2 * base.drp.beta / weight:g}",
        weights=(1.5,),
        apart=True,
    ),
    "diff_instruct_pp": Method(("algorithm=diff_instruct_pp",), _weight("diff_instruct_pp")),
    "diff_instruct_star": Method(("algorithm=diff_instruct_star",), _weight("diff_instruct_star")),
    "dmdr": Method(("algorithm=dmdr", "train.assistant_updates=5"), _weight("dmdr")),
    "reward_only": Method(("algorithm=reward_only",), lambda _, weight: f"algorithm.margin={weight:g}", (1.0,)),
    "diff_instruct": Method(("algorithm=diff_instruct",)),
}
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
GAINS = ("utility", "judge")
FIDELITIES = ("strict", "feature_distance", "diversity")
SMALLER_IS_BETTER = {"feature_distance"}
SETTLE = 2  # first steps of a calibration, not counted


@dataclass(frozen=True)
class Point:
    """One training."""

    method: str
    weight: float | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.label}-{self.seed}"

    @property
    def label(self) -> str:
        """The point of the sweep that it belongs to."""
        return self.method if self.weight is None else f"{self.method}-{self.weight:g}"


def points(methods: Sequence[str], weights: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    """All trainings, seed by seed, so that an interrupted benchmark is a smaller benchmark."""
    return [
        Point(method, weight, seed)
        for seed in seeds
        for method in methods
        for weight in ((METHODS[method].weights or weights) if METHODS[method].strength else (None,))
    ]


def calibrate(
    recipe: str, overrides: Sequence[str], methods: Sequence[str], steps: int, file: Path
) -> dict[str, float]:
    """Median processor seconds a step of each method, at weight 1; what ``file`` holds is not measured again.

    A training has one thread, so that these are its wall-clock seconds on an idle machine, whatever else runs on this one.
    """
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    missing = [m for m in methods if m not in known]
    if not missing:
        return known
    base = configs.load(recipe, overrides)
    torch.set_num_threads(base.train.threads)
    runs: list[tuple[str, Learner, Iterator[Batch], list[float]]] = []
    for method in missing:
        plan = [*overrides, "workers.train=1", f"train.steps={SETTLE + steps}", "train.assistant_warmup=0"]
        plan += METHODS[method].settings(base, 1.0)
        config = configs.load(recipe, plan)
        runs.append((method, Learner(config), iter(LocalFeed(config)), []))
    for turn in range(SETTLE + steps):
        for _, learner, batches, seconds in runs:
            batch = next(batches)
            began = time.process_time()
            learner.step(batch)
            if turn >= SETTLE:
                seconds.append(time.process_time() - began)
    known |= {method: statistics.median(seconds) for method, _, _, seconds in runs}
    _write(file, known)
    return known


def head_start(point: Point, base: Config) -> int:
    """Steps before the generator's first update."""
    return base.train.assistant_warmup if point.method != "reward_only" else 0


def settings_of(point: Point, overrides: Sequence[str], steps: int, base: Config, along: int = 0) -> list[str]:
    """`key=value` of a point's training; with ``along`` it keeps a checkpoint every so many steps."""
    method = METHODS[point.method].settings(base, point.weight or 1.0)
    plan = [*overrides, *method, f"seed={point.seed}", f"train.steps={head_start(point, base) + steps}"]
    return [*plan, f"train.checkpoint_every={along}", "train.keep_checkpoints=1000"] if along else plan


def summarise(
    arrays: dict[str, dict[str, NDArray[Any]]], reference: NDArray[Any], trainings: int, resamples: int
) -> dict[str, dict[str, Array]]:
    """``{label: {measure: [R + 1]}}`` from ``{label: {measure: [T, S, N], "features": [T, S, N, D]}}``."""
    draws = Bootstrap(reference.shape[2], trainings, resamples)
    summary = {}
    for label, values in arrays.items():
        summary[label] = {name: draws.means(values[name]) for name in (*GAINS, *FIDELITIES, "reward") if name in values}
        summary[label]["feature_distance"] = distances(
            draws, values["features"].astype(np.float64), reference.astype(np.float64)
        )
    return summary


def fronts(summary: dict[str, dict[str, Array]], methods: dict[str, list[str]]) -> list[dict[str, Any]]:
    """One entry per (gain, fidelity): each method's front and its hypervolume, in the box that all points together span."""
    out = []
    for gain, fidelity in itertools.product(GAINS, FIDELITIES):
        sign = -1.0 if fidelity in SMALLER_IS_BETTER else 1.0
        of = {label: (values[gain], sign * values[fidelity]) for label, values in summary.items()}
        corner = np.array([[x[0], y[0]] for x, y in of.values()])
        worst, best = corner.min(0), corner.max(0)
        entry: dict[str, Any] = {"gain": gain, "fidelity": fidelity, "worst": worst.tolist(), "best": best.tolist()}
        entry["methods"] = {}
        for method, labels in methods.items():
            x, y = (np.stack([of[label][axis] for label in labels]) for axis in (0, 1))
            on_front = [labels[i] for i in front(np.stack([x[:, 0], y[:, 0]], 1))]
            at = {label: (value[0][0], value[1][0]) for label, value in of.items()}
            entry["methods"][method] = {
                "front": on_front,
                "beaten_by": [
                    other
                    for other in at
                    if other not in labels
                    and any(at[other][0] > at[m][0] and at[other][1] > at[m][1] for m in on_front)
                ],
                "hypervolume": interval(hypervolumes(x, y, worst, best)).tree(),
            }
        out.append(entry)
    return out


def by_seed(
    arrays: dict[str, dict[str, NDArray[Any]]], reference: NDArray[Any], methods: dict[str, list[str]]
) -> list[list[dict[str, float]]]:
    """Hypervolumes of each training seed alone, ``{method: value}`` a panel; what was trained once serves every seed."""
    trainings = max(len(values["features"]) for values in arrays.values())
    out = []
    for seed in range(trainings):
        alone = {
            label: {name: value[seed : seed + 1] if len(value) > 1 else value for name, value in values.items()}
            for label, values in arrays.items()
        }
        panels = fronts(summarise(alone, reference, 1, 0), methods)
        out.append([{m: found["hypervolume"]["mean"] for m, found in p["methods"].items()} for p in panels])
    return out


def tables(tree: dict[str, Any]) -> str:
    """Markdown: hypervolumes by method, in how many seeds it is the largest, who beats it; then every point."""
    header = ["method", *(f"{describe(p['gain']).title} / {describe(p['fidelity']).title}" for p in tree["fronts"])]
    rows = []
    for method in tree["methods"]:
        found = [p["methods"][method]["hypervolume"] for p in tree["fronts"]]
        rows.append([method, *(f"{v['mean']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for v in found)])
    seeds = tree["by_seed"]
    won, beaten = [], []
    for method in tree["methods"]:
        largest = [sum(one[i][method] == max(one[i].values()) for one in seeds) for i in range(len(header) - 1)]
        won.append([method, *(f"{count} of {len(seeds)}" for count in largest)])
        beaten.append([method, *(", ".join(p["methods"][method]["beaten_by"]) or "none" for p in tree["fronts"])])
    names = [*GAINS, *FIDELITIES, "reward"]
    lines = []
    for label, point in tree["points"].items():
        shown = [point["measures"].get(name) for name in names]
        cells = [f"{v['mean']:.4g} ({v['low']:.4g} to {v['high']:.4g})" if v else "" for v in shown]
        lines.append([label, str(point["steps"] or ""), *cells])
    return "\n\n".join(
        [
            "Hypervolume as a share of the box that all points span, with 95 % intervals over captions and training seeds:",
            markdown(header, rows),
            "Training seeds, each by itself, in which the method's hypervolume is the largest:",
            markdown(header, won),
            "Points that are better in both measures than some point of the method's own front:",
            markdown(header, beaten),
            "Every point (a weight is a multiple of the method's unit):",
            markdown(["point", "steps", *(n.replace("_", " ") for n in names)], lines),
        ]
    )


def _write(file: Path, tree: Any) -> None:
    replace_text(file, json.dumps(tree, indent=1) + "\n")


def _one_benchmark_a_folder(given: argparse.Namespace) -> None:
    """Trainings in ``--work`` are reused by name, so they must have been made with the same settings."""
    file = given.work / "settings.json"
    settings = {"recipe": given.recipe, "overrides": given.overrides, "seconds": given.seconds}
    if file.is_file() and (before := json.loads(file.read_text())) != settings:
        raise DIDRError(f"--work {given.work}: holds trainings made with {before}, now {settings}; give another folder")
    _write(file, settings)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description=about)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS), help="multiples of a method's unit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--seconds", type=float, default=240.0, help="training time of every point")
    parser.add_argument("--calibrate", type=int, default=10, help="counted steps of each method when timing it")
    parser.add_argument("--noise-seeds", type=int, nargs="+", default=[1000, 1001], help="pictures a caption (>= 2)")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument(
        "--along", type=int, default=0, metavar="STEPS", help="keep and score a checkpoint every so many steps, too"
    )
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pareto"))
    parser.add_argument("--json", type=Path, help="default: pareto.json in --out")
    given = parser.parse_args(arguments)
    if min(given.weights) <= 0 or given.seconds <= 0 or given.calibrate < 1 or given.resamples < 2:
        parser.error("--weights and --seconds must be above 0, --calibrate at least 1, --resamples at least 2")
    if len(set(given.noise_seeds)) < 2:
        parser.error("--noise-seeds: diversity needs two different ones at least")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    given = _arguments(arguments)
    base = configs.load(given.recipe, given.overrides)
    if base.reward is None or base.judge is None or base.data.heldout is None or base.evaluation.world != "tiny":
        raise DIDRError(
            f"recipe {given.recipe!r}: the benchmark needs reward, judge, data.heldout and evaluation.world=tiny (its utility)"
        )
    prompts = heldout(base, given.prompts)
    _one_benchmark_a_folder(given)
    seconds = calibrate(given.recipe, given.overrides, given.methods, given.calibrate, given.work / "seconds.json")
    budget = {method: max(1, round(given.seconds / seconds[method])) for method in given.methods}
    print("steps bought: " + ", ".join(f"{m} {budget[m]} ({seconds[m]:.2f} s each)" for m in given.methods), flush=True)
    todo = points(given.methods, given.weights, given.seeds)
    with ThreadPoolExecutor(given.jobs) as pool:
        settings = {p: settings_of(p, given.overrides, budget[p.method], base, given.along) for p in todo}
        jobs = {p: pool.submit(train, given.recipe, settings[p], given.work, p.name) for p in todo}
        exports = {point: job.result() for point, job in jobs.items()}
    torch.set_num_threads(given.jobs)
    evaluator = Evaluator.of(base, prompts, given.noise_seeds, features=True, cache=given.work / "teacher")
    kept = given.work / "scores"
    teacher_net = evaluator.backbone.load_network("reference")
    teacher = teacher_contestant(evaluator.backbone, teacher_net, given.teacher_steps, base.guidance.reference)
    start_net = evaluator.backbone.load_network("generator")
    start = one_step_contestant("start", evaluator.backbone, start_net)
    measured: dict[str, list[dict[str, NDArray[Any]]]] = {
        "teacher": [evaluator.measured(teacher, teacher.fingerprint or "", kept)],
        "start": [evaluator.measured(start, fingerprint(start_net), kept)],
    }
    for point in todo:
        network = exported(base, exports[point])
        contestant = one_step_contestant(point.name, evaluator.backbone, network)
        row = evaluator.measured(contestant, fingerprint(network), kept)
        measured.setdefault(point.label, []).append(row)
    arrays = {
        label: {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        for label, rows in measured.items()
    }
    summary = summarise(arrays, arrays["teacher"]["features"], len(given.seeds), given.resamples)
    sweeps = {
        m: list(dict.fromkeys(p.label for p in todo if p.method == m)) for m in given.methods if not METHODS[m].apart
    }
    on_fronts = {"start", *itertools.chain(*sweeps.values())}
    competing = {label: values for label, values in summary.items() if label in on_fronts}
    command = "python -m benchmarks.pareto " + " ".join(arguments if arguments is not None else sys.argv[1:])
    of_label = {p.label: p for p in todo}
    tree = {
        "methods": sweeps,
        "seconds": given.seconds,
        "seconds_a_step": {m: float(f"{seconds[m]:.4g}") for m in given.methods},
        "points": {
            label: {
                "weight": of_label[label].weight if label in of_label else None,
                "steps": budget[of_label[label].method] if label in of_label else None,
                "measures": {name: interval(value).tree() for name, value in values.items()},
            }
            for label, values in summary.items()
        },
        "fronts": fronts(competing, sweeps),
        "by_seed": by_seed({k: v for k, v in arrays.items() if k in on_fronts}, arrays["teacher"]["features"], sweeps),
        "intervals": f"95 %, bootstrap over captions and training seeds, {given.resamples} resamples",
        "along": [
            {"label": p.label, "method": p.method, "weight": p.weight, "seed": p.seed, **row}
            for p in (todo if given.along else ())
            for row in pareto_along.scored(
                evaluator, given.work / p.name, head_start(p, base), arrays["teacher"]["features"], kept
            )
        ],
        "facts": origin(base.data.heldout, [command.strip()]),
    }
    _write(given.json or given.out / "pareto.json", tree)
    save_fronts(tree, given.out / "pareto.png")
    text = tables(tree)
    if given.along:
        pareto_along.save(tree["along"], given.out / "pareto_along.png")
        text += f"\n\nAlong the trainings:\n\n{pareto_along.table(tree['along'], range(0, max(budget.values()) + 1, given.along))}"
    text += f"\n\n`{command.strip()}`, {tree['facts']['date'][:10]}\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
