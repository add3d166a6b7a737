"""Which algorithm ends nearest the optimum that all of them ask for, where it is known? And what does each pay for its reward?

    python -m benchmarks.exact_rivals [--seconds 600]     # again and again until nothing is left: what is finished is kept

Every algorithm over ten weights, in 2 and 64 dimensions: Gaussian mixtures with quadratic rewards (`benchmarks.exactness`), all from the
same Diff-Instruct start, with the same teaching assistant and as many updates. The weight of DIDR is ``1 / beta``; rivals' weights are
multiples of a unit (1 / N, N the dimensions; for DI*, whose norm is a root mean square, 1 / sqrt(N)), and the margin of the reward alone
lies so far up the way from the reference's mean reward to that of p* at beta 0.1. The first seed is trained at all ten weights and, of
rivals, halfway from the weights nearest to some p* to their neighbours; the other seeds at those weights where the first came within a
quarter of the method's least distance to some p*: hardly another can be best.

Weights of a method and seed train at once (`benchmarks.replicas`), one file a training in ``--work``. Then, in ``--out``,
``exact_rivals.json``, a table (each algorithm's nearest weight to p* of each beta, by the median over seeds; "edge" where that is the first
or last weight, so that a wider sweep might do better) and a figure: reward against distance to the reference, with the exact front, on
which p* of every beta lies.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.exactness import World, distance, finished, measured, settings, sliced_wasserstein, start
from benchmarks.replicas import Replica
from benchmarks.tiny_world import markdown
from didr_core.config.files import replace_text
from pipelines.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION

BETAS = (3.0, 1.0, 0.3)
DIMENSIONS = {2: 1500, 64: 750}  # and updates
TEMPERATURES = (10.0, 5.0, 3.0, 2.0, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
MULTIPLES = tuple(round(0.02 * 10 ** (k / 3), 4) for k in range(10))  # 0.02 to 20
SHARES = tuple(k / 10 for k in range(1, 11))
INVERSE = tuple(1 / beta for beta in TEMPERATURES)
NEAR = 1.25
FRONT = tuple(10 ** (k / 5) for k in range(7, -7, -1))  # betas of the exact front, 25 to 0.06
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """How a method is trained at a weight, and its colour."""

    settings: tuple[str, ...]  # overrides at reward weight 1
    twin: Callable[[int, int, float], Replica]  # (seed, dim, weight) -> what is trained
    weights: tuple[float, ...]
    colour: str
    estimator: str = "default"


def _didr(estimator: str, colour: str) -> Method:
    return Method(("algorithm=didr",), lambda seed, _, weight: Replica(seed, weight), INVERSE, colour, estimator)


def _rival(name: str, unit: Callable[[int], float], colour: str, margin: float | None = None) -> Method:
    """``margin`` goes into the reward, where replicas differ; the algorithm's own is 0 then."""
    own = (f"algorithm={name}", "algorithm.weight=1", *(() if margin is None else ("algorithm.margin=0",)))
    return Method(own, lambda seed, dim, weight: Replica(seed, weight * unit(dim), margin or 0.0), MULTIPLES, colour)


def _up_to_margin(seed: int, dim: int, share: float) -> Replica:
    world = World(dim, 0.1)
    low, high = world.reference.expected(world.reward), world.optimum.expected(world.reward)
    return Replica(seed, 1.0, low + share * (high - low))


METHODS = {
    "didr default": _didr("default", BLUE),
    "diff_instruct_pp": _rival("diff_instruct_pp", lambda n: 1 / n, ORANGE),
    "diff_instruct_star": _rival("diff_instruct_star", lambda n: 1 / math.sqrt(n), GREEN),
    "dmdr": _rival("dmdr", lambda n: 1 / n, PURPLE, margin=2.0),
    "didr exact": _didr("exact", INK),
    "didr shift": _didr("shift", SKY),
    "reward_only": Method(("algorithm=reward_only", "algorithm.margin=0"), _up_to_margin, SHARES, VERMILION),
    "didr tweedie": _didr("tweedie", "#7f9cc0"),
    "didr ode": _didr("ode", GREY),
}


def train(name: str, dim: int, weights: Sequence[float], seed: int, updates: int) -> Rows:
    """Trainings at some weights: distances to p* of every beta, and to the reference; reward, share off support, seconds."""
    method = METHODS[name]
    twins = [method.twin(seed, dim, weight) for weight in weights]
    worlds = [World(dim, 1 / twin.weight) for twin in twins]  # told to `exact` alone
    common = [f"backbone.generator={start(worlds[0])}", f"train.steps={updates}"]
    config = World(dim, 1.0).config([*common, *method.settings])
    config = config.model_copy(update={"drp": settings(method.estimator, 1.0)})
    made, half, calls, seconds = finished(worlds, config, twins, updates)
    return [
        {
            "method": name,
            "dim": dim,
            "weight": weight,
            "seed": seed,
            "updates": updates,
            **measured(World(dim, 1.0), own),
            "distance": {f"{beta:g}": distance(own, World(dim, beta)) for beta in BETAS},
            "halfway": {f"{beta:g}": distance(before, World(dim, beta)) for beta in BETAS},
            "evaluations": calls,
            "seconds": seconds,
        }
        for weight, own, before in zip(weights, made, half, strict=True)
    ]


def coarse(name: str, _: Rows) -> list[float]:
    """The first seed's sweep."""
    return list(METHODS[name].weights)


def finer(name: str, first: Rows) -> list[float]:
    """Then, of rivals, halfway from each beta's nearest weight to its neighbours; DIDR's own weight is known, ``1 / beta``."""
    weights, out = sorted({r["weight"] for r in first} & set(METHODS[name].weights)), set()
    if name.startswith("didr") or len(weights) < len(METHODS[name].weights):
        return []
    for beta in BETAS:
        best = weights.index(nearest([r for r in first if r["weight"] in weights], beta)[0])
        out |= {math.sqrt(a * b) for a, b in itertools.pairwise(weights[max(0, best - 1) : best + 2])}
    return sorted(float(f"{w:.4g}") for w in out)


def worth_repeating(_: str, first: Rows) -> list[float]:
    """Weights at which the first seed came within ``NEAR`` of its least distance to the p* of some beta."""
    if not first:
        return []
    least = {beta: min(r["distance"][f"{beta:g}"] for r in first) for beta in BETAS}
    return [r["weight"] for r in first if any(r["distance"][f"{b:g}"] <= NEAR * least[b] for b in BETAS)]


@functools.cache
def exact_front(dim: int) -> list[tuple[float, float]]:
    """(distance to the reference, mean reward) of p* at every beta of ``FRONT``."""
    generator, out = torch.Generator().manual_seed(7), []
    plain = World(dim, 1.0).reference.sample(20_000, generator)
    for beta in FRONT:
        world = World(dim, beta)
        made = world.optimum.sample(20_000, generator)
        out.append((sliced_wasserstein(made, plain), world.optimum.expected(world.reward)))
    return out


def nearest(rows: Rows, beta: float) -> tuple[float, Rows]:
    """The weight whose median distance to p* of ``beta`` is least, among those with the most seeds; and its trainings."""
    of = {w: [r for r in rows if r["weight"] == w] for w in sorted({r["weight"] for r in rows})}
    most = max(map(len, of.values()))
    weights = [w for w, mine in of.items() if len(mine) == most]
    best = min(weights, key=lambda w: statistics.median(r["distance"][f"{beta:g}"] for r in of[w]))
    return best, of[best]


def table(rows: Rows) -> str:
    """Each method's nearest weight to p* of each beta: medians over seeds (lowest to highest)."""
    header = ["dimensions", "beta", "method", "weight", "distance to p*", "off support, %", "reward (optimum)", "seeds"]
    out = []
    for dim in sorted({r["dim"] for r in rows}):
        for beta in BETAS:
            star = World(dim, beta)
            for name in METHODS:
                mine = [r for r in rows if (r["dim"], r["method"]) == (dim, name)]
                if not mine:
                    continue
                weight, best = nearest(mine, beta)
                tried = sorted({r["weight"] for r in mine})
                d = [r["distance"][f"{beta:g}"] for r in best]
                off, reward = (statistics.median(r[key] for r in best) for key in ("off_support", "reward"))
                cells = [
                    str(dim),
                    f"{beta:g}",
                    name,
                    f"{weight:.3g}" + (" (edge)" if weight in (tried[0], tried[-1]) else ""),
                ]
                cells += [f"{statistics.median(d):.3f} ({min(d):.3f} to {max(d):.3f})", f"{100 * off:.1f}"]
                out.append([*cells, f"{reward:.2f} ({star.optimum.expected(star.reward):.2f})", str(len(best))])
    return markdown(header, out)


def save(rows: Rows, path: Path) -> None:
    """A panel a number of dimensions: every training a mark, medians joined by weight, the exact front behind them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dims = sorted({r["dim"] for r in rows})
    figure = Figure(figsize=(6.2 * len(dims), 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, dim in zip(figure.subplots(1, len(dims), squeeze=False)[0], dims, strict=True):
        front = exact_front(dim)
        axes.plot(*zip(*front, strict=True), color=INK, linewidth=5, alpha=0.25, label="exact front (p* by beta)")
        for name, method in METHODS.items():
            mine = [r for r in rows if (r["dim"], r["method"]) == (dim, name)]
            middle = [[r for r in mine if r["weight"] == w] for w in method.weights]
            ways = [
                [statistics.median(r[k] for r in m) for k in ("distance_to_reference", "reward")] for m in middle if m
            ]
            if ways:
                axes.plot(*zip(*ways, strict=True), "o-", color=method.colour, markersize=5, label=name)
            axes.plot(
                [r["distance_to_reference"] for r in mine],
                [r["reward"] for r in mine],
                ".",
                color=method.colour,
                alpha=0.4,
            )
        axes.set_xscale("log")
        axes.set_xlabel("distance to the reference (sliced Wasserstein-2; less is better)", fontsize=11)
        axes.set_ylabel("mean reward", fontsize=11)
        axes.set_title(f"{dim} dimensions", fontsize=12, color=INK)
        low, high = min(r for _, r in front), max(r for _, r in front)
        axes.set_ylim(low - 0.6 * (high - low), high + 0.6 * (high - low))
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=10, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exact_rivals", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--dim", type=int, nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, help="of all; by default 1,500 in 2 dimensions, 750 in 64")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these, no further training is begun")
    parser.add_argument("--work", type=Path, default=Path("runs/exact_rivals"), help="one file a training")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    until = time.monotonic() + given.seconds
    rows: Rows = []
    for seed, dim, name in itertools.product(range(given.seeds), given.dim, given.methods):
        # seed by seed, so that an interrupted benchmark is a smaller benchmark
        updates = given.updates or DIMENSIONS[dim]
        for sweep in (coarse, finer) if seed == 0 else (worth_repeating,):
            weights = sweep(name, [r for r in rows if (r["seed"], r["dim"], r["method"]) == (0, dim, name)])
            files = {w: given.work / f"{dim}-{name.replace(' ', '_')}-{w:.4g}-{seed}-{updates}.json" for w in weights}
            missing = [w for w, file in files.items() if not file.is_file()]
            if missing and time.monotonic() < until:
                for row in train(name, dim, missing, seed, updates):
                    replace_text(files[row["weight"]], json.dumps(row) + "\n")
                    near = ", ".join(f"{d:.3f}" for d in row["distance"].values())
                    stem = files[row["weight"]].stem
                    print(f"{stem}: {near}; reward {row['reward']:.2f}, {row['seconds']:.0f} s", flush=True)
            rows += [json.loads(file.read_text()) for file in files.values() if file.is_file()]
    print(f"{len(rows)} trainings are there", flush=True)
    if rows:
        replace_text(given.out / "exact_rivals.json", json.dumps(rows, indent=1) + "\n")
        save(rows, given.out / "exact_rivals.png")
        text = table(rows)
        replace_text(given.out / "exact_rivals.md", text + "\n")
        print(text)


if __name__ == "__main__":
    main()
