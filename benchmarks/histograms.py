"""Does a generator follow the tilted law of pictures? Histograms against the exact answer, which the reference's own samples give.

    python -m benchmarks.histograms --beta 1 --estimator default tweedie ode --also runs/pareto --seeds 0

For every caption the law that DIDR aims at is ``p_ref(x | c) exp(r / beta) / Z``. Samples of the guided reference, weighted with
``exp(r / beta)`` within their caption, have that law, and so have their utility, object size or reward: no estimator enters. What is
reported is the Wasserstein-1 distance between that histogram and a generator's own, over the standard deviation of the reference's,
with the effective sample size of the weights. Rows that say how to read it:

- `floor`: two halves of the reference's samples, both weighted: what sampling alone leaves;
- `reference`: its samples without weights: what no alignment leaves.

Trains one generator per estimator (NAME or NAME:K:M) and seed at this beta, by `benchmarks.trainings`; ``--also`` adds the trainings of
a `benchmarks.pareto` work folder: rivals have no beta, so all their weights are listed. Finished trainings and scores are kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.trainings import train
from didr_core import config as configs
from didr_core.config import registry
from didr_core.evaluate.contestants import Contestant, fingerprint, one_step_contestant, teacher_contestant
from didr_core.evaluate.evaluator import Evaluator
from didr_core.evaluate.finish import heldout
from didr_core.evaluate.paired import Array
from didr_core.evaluate.scores import origin
from didr_core.export.card import markdown
from didr_core.export.folder import exported

QUANTITIES = ("reward", "utility", "size")


def distance(a: Array, weights_a: Array, b: Array, weights_b: Array) -> float:
    """Wasserstein-1 between weighted samples ``[P]`` and ``[Q]`` of one quantity: the area between their distribution functions."""
    order = np.argsort(np.concatenate([a, b]), kind="stable")
    values = np.concatenate([a, b])[order]
    steps = np.concatenate([weights_a / weights_a.sum(), -weights_b / weights_b.sum()])[order]
    return float(np.sum(np.abs(np.cumsum(steps)[:-1]) * np.diff(values)))


def tilt(rewards: Array, beta: float) -> Array:
    """``exp(r / beta)``, normalised over the samples of each caption: ``[S, N] -> [S, N]``, columns sum to 1."""
    logits = (rewards - rewards.max(0)) / beta
    weights: Array = np.exp(logits)
    return weights / weights.sum(0)


def effective_size(weights: Array) -> float:
    """Mean over captions of ``1 / sum w^2``, for ``[S, N]`` with columns that sum to 1."""
    return float((1 / np.square(weights).sum(0)).mean())


def spread(rewards: Array) -> float:
    """Pooled within-caption standard deviation of ``[S, N]``: what one unit of beta means, as in training."""
    return float(np.sqrt(rewards.var(0, ddof=1).mean()))


def compare(samples: dict[str, Array], reference: dict[str, Array], weights: Array) -> dict[str, float]:
    """Distance of each quantity ``[S', N]`` to the weighted reference ``[S, N]``, in standard deviations of the reference."""
    return {
        name: distance(samples[name].ravel(), np.ones(samples[name].size), reference[name].ravel(), weights.ravel())
        / float(reference[name].std())
        for name in QUANTITIES
    }


def floor(reference: dict[str, Array], beta: float, scale: float) -> dict[str, float]:
    """Distance between the weighted halves of the reference's samples, which share nothing but captions."""
    halves = [{name: value[part::2] for name, value in reference.items()} for part in (0, 1)]
    weights = [tilt(half["reward"], beta * scale) for half in halves]
    return {
        name: distance(halves[0][name].ravel(), weights[0].ravel(), halves[1][name].ravel(), weights[1].ravel())
        / float(reference[name].std())
        for name in QUANTITIES
    }


def overrides(estimator: str) -> list[str]:
    """`key=value` of NAME or NAME:K:M, ungated: what is asked is where the estimator itself leads."""
    name, *numbers = estimator.split(":")
    key = configs.DRP.model_validate({}).estimator if name == "default" else name
    method = registry.find("drs", key)
    steps, particles = map(int, numbers) if numbers else (method.steps, method.particles)
    return [f"drp.estimator={key}", f"drp.steps={steps}", f"drp.particles={particles}", "drp.snr_gate=false"]


def table(tree: dict[str, Any]) -> str:
    """Markdown, nearest in reward first; several trainings of one kind are a median with the lowest and highest."""
    rows = []
    for label, row in sorted(tree["rows"].items(), key=lambda item: statistics.median(item[1]["reward"])):
        cells = []
        for name in QUANTITIES:
            values = row[name]
            whole = f"{statistics.median(values):.2f}"
            cells.append(whole if len(values) == 1 else f"{whole} ({min(values):.2f} to {max(values):.2f})")
        rows.append([label, *cells])
    return markdown(["law of", *(f"{name}: distance to the tilted law" for name in QUANTITIES)], rows)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.histograms", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--estimator", nargs="*", default=["default"], metavar="NAME[:K:M]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--also", type=Path, help="work folder of benchmarks.pareto, whose trainings are compared too")
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--samples", type=int, default=32, help="reference pictures a caption")
    parser.add_argument("--pictures", type=int, default=8, help="pictures a caption of every generator")
    parser.add_argument("--teacher-steps", type=int, default=25)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/histograms"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/histograms.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    given = _arguments(arguments)
    base = configs.load(given.recipe, given.overrides)
    given.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = {}
        for seed in given.seeds:
            for estimator in given.estimator:
                label = f"didr {estimator}"
                settings = [*given.overrides, f"drp.beta={given.beta:g}", *overrides(estimator), f"seed={seed}"]
                name = f"{label.replace(' ', '-').replace(':', '-')}-{given.beta:g}-{seed}"
                jobs[label, name] = pool.submit(train, given.recipe, settings, given.work, name)
        exports = {key: job.result() for key, job in jobs.items()}
    for folder in sorted(given.also.glob("*/export")) if given.also else ():
        name = folder.parent.name
        exports[name.rpartition("-")[0], name] = folder

    torch.set_num_threads(given.jobs)
    evaluator = Evaluator.of(
        base.model_copy(update={"judge": None}),
        heldout(base, given.captions),
        range(max(given.samples, given.pictures)),
        cache=given.work / "teacher",
    )

    def score(contestant: Contestant, key: str, seeds: int) -> dict[str, Array]:
        """``{quantity: [S, N]}``; what was scored is kept."""
        found = evaluator.first(given.captions, seeds).measured(contestant, key, given.work / "scores")
        return {name: found[name][0].astype(np.float64) for name in QUANTITIES}

    teacher_net = evaluator.backbone.load_network("reference")
    teacher = teacher_contestant(evaluator.backbone, teacher_net, given.teacher_steps, base.guidance.reference)
    reference = score(teacher, teacher.fingerprint or "", given.samples)
    start_net = evaluator.backbone.load_network("generator")
    start = score(one_step_contestant("start", evaluator.backbone, start_net), fingerprint(start_net), given.pictures)
    scale = spread(start["reward"])
    weights = tilt(reference["reward"], given.beta * scale)
    even = np.full_like(weights, 1 / len(weights))
    rows: dict[str, dict[str, list[float]]] = {
        "floor": {name: [value] for name, value in floor(reference, given.beta, scale).items()},
        "reference": {
            name: [distance(v.ravel(), even.ravel(), v.ravel(), weights.ravel()) / float(v.std())]
            for name, v in reference.items()
        },
        "start": {name: [value] for name, value in compare(start, reference, weights).items()},
    }
    for (label, name), folder in exports.items():
        network = exported(base, folder)
        found = score(one_step_contestant(name, evaluator.backbone, network), fingerprint(network), given.pictures)
        for quantity, value in compare(found, reference, weights).items():
            rows.setdefault(label, {}).setdefault(quantity, []).append(value)
    command = "python -m benchmarks.histograms " + " ".join(arguments if arguments is not None else sys.argv[1:])
    tree = {
        "beta": given.beta,
        "samples": given.samples,
        "effective_samples": effective_size(weights),
        "unit": "standard deviations of the quantity under the reference",
        "rows": rows,
        "facts": origin(base.data.heldout or base.data.prompts, [command.strip()]),
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(tree, indent=1) + "\n")
    print(f"effective samples a caption: {tree['effective_samples']:.1f} of {given.samples}\n")
    print(table(tree))


if __name__ == "__main__":
    main()
