"""The figure and the tables of `benchmarks.exactness`, from its JSON files.

    python -m benchmarks.exactness_figure [--trained FILE ...] [--pointwise FILE] [--out FOLDER]

Writes ``exactness.png`` and ``exactness.md``. Left: how far trained generators end from the exact optimum p*. Right: bias by noise level.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tiny_world import markdown
from pipelines.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION

RESULTS = Path("benchmarks/results")
COLOURS = {
    "exact": INK,
    "hybrid": BLUE,
    "shift": GREY,
    "importance": GREEN,
    "stochastic": ORANGE,
    "truncated": SKY,
    "tweedie": PURPLE,
    "ode": VERMILION,
}
NAMES = {"exact": "exact (closed form)", "ode": "ode (the paper's proxy)", "hybrid": "hybrid (default)"}
MARKS = {3.0: "o", 1.0: "s", 0.3: "^"}
BOUND = 0.35
Rows = list[dict[str, Any]]


def save(trained: Rows, pointwise: Rows, path: Path) -> Path:
    """Both panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    names = [name for name in COLOURS if any(r["estimator"] == name for r in trained)]
    betas = [b for b in MARKS if any(r["beta"] == b for r in trained)]
    for row, name in enumerate(reversed(names)):
        for lane, beta in enumerate(betas):
            values = [r["distance"] for r in trained if r["estimator"] == name and r["beta"] == beta]
            height = [row + 0.2 * (lane - (len(betas) - 1) / 2)] * len(values)
            left.plot(values, height, MARKS[beta], color=COLOURS[name], markersize=8, alpha=0.8)
    for beta in betas:
        left.plot([], [], MARKS[beta], color=GREY, markersize=8, label=f"beta {beta:g}")
    left.set_yticks(range(len(names)), [NAMES.get(n, n) for n in reversed(names)], fontsize=12)
    left.set_xscale("log")
    left.set_xlabel("distance of the trained generator to p* (sliced Wasserstein-2; less is better)", fontsize=11)
    left.set_title("2 dimensions, 1,500 updates, one mark a seed", fontsize=12, color=INK)
    left.legend(fontsize=11, frameon=False, loc="upper right")
    pointwise = [r for r in pointwise if _schedule(r) == "vp"]
    dim = max(r["dim"] for r in pointwise if r["dim"] <= 64)
    for name in [n for n in COLOURS if n in {r["estimator"] for r in pointwise}]:
        rows = sorted(
            (r for r in pointwise if r["estimator"] == name and (r["dim"], r["beta"]) == (dim, 1.0)), key=_time
        )
        right.plot(
            [r["t"] for r in rows],
            [max(r["bias"], 3e-3) for r in rows],
            color=COLOURS[name],
            marker="o",
            linewidth=3 if name == "hybrid" else 1.6,
            label=NAMES.get(name, name),
        )
    right.axhline(BOUND, color=GREY, linestyle="--", linewidth=1)
    right.set_yscale("log")
    right.set_xlabel("time t (0 clean, 1 noise)", fontsize=11)
    right.set_ylabel("bias over the size of the exact score", fontsize=11)
    right.set_title(f"{dim} dimensions, beta 1, mean of 64 draws", fontsize=12, color=INK)
    right.legend(fontsize=10, frameon=False, ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def trained_table(rows: Rows) -> str:
    """Median over seeds (lowest to highest): distance to p*, its ratio to the exact score's, samples off support."""
    header = [
        "dimensions",
        "beta",
        "estimator",
        "calls",
        "distance to p*",
        "x exact",
        "off support, %",
        "reward (optimum)",
    ]
    out = []
    for dim, beta in sorted({(r["dim"], r["beta"]) for r in rows}, key=lambda k: (k[0], -k[1])):
        here = [r for r in rows if (r["dim"], r["beta"]) == (dim, beta)]
        best = _median([r for r in here if r["estimator"] == "exact"], "distance")
        for name in _names(here):
            mine = [r for r in here if r["estimator"] == name]
            distance = _median(mine, "distance")
            out.append(
                [
                    str(dim),
                    f"{beta:g}",
                    f"`{name}`",
                    f"{_median(mine, 'evaluations'):.2g}",
                    f"{distance:.3f}" + _range(mine, "distance", lambda v: f"{v:.3f}"),
                    f"{distance / best:.2f}",
                    f"{100 * _median(mine, 'off_support'):.1f}",
                    f"{_median(mine, 'reward'):.2f} ({mine[0]['reward_star']:.2f})",
                ]
            )
    return markdown(header, out)


def pointwise_table(rows: Rows) -> str:
    """Bias (standard deviation of one draw) by time."""
    times = sorted({r["t"] for r in rows})
    out = []
    for dim, beta in sorted({(r["dim"], r["beta"]) for r in rows}, key=lambda k: (k[0], -k[1])):
        for schedule, name in itertools.product(_schedules(rows), _names(rows)):
            which = dim, beta, schedule, name
            mine = {r["t"]: r for r in rows if (r["dim"], r["beta"], _schedule(r), r["estimator"]) == which}
            if mine:
                cells, last = [f"{mine[t]['bias']:.2f} ({mine[t]['spread']:.2f})" for t in times], mine[times[-1]]
                cost = [
                    f"{last['calls']:.0f}",
                    *(f"{last[key]:.3g}" if key in last else "" for key in ("seconds", "bytes")),
                ]
                out.append([str(dim), f"{beta:g}", schedule, f"`{name}`", *cost, *cells])
    header = ["dimensions", "beta", "schedule", "estimator", "calls", "s a 1,000", "bytes a sample"]
    return markdown([*header, *(f"t = {t:g}" for t in times)], out)


def _schedule(row: dict[str, Any]) -> str:
    return str(row.get("schedule", "vp"))


def _schedules(rows: Rows) -> list[str]:
    return sorted({_schedule(r) for r in rows}, reverse=True)


def _names(rows: Rows) -> list[str]:
    """Estimators in the figure's order, then those with numbers of their own (NAME:K:M)."""
    there = dict.fromkeys(r["estimator"] for r in rows)
    return [n for n in COLOURS if n in there] + [n for n in there if n not in COLOURS]


def _time(row: dict[str, Any]) -> float:
    return float(row["t"])


def _median(rows: Rows, key: str) -> float:
    return statistics.median(r[key] for r in rows) if rows else float("nan")


def _range(rows: Rows, key: str, write: Callable[[float], str]) -> str:
    values = [r[key] for r in rows]
    return f" ({write(min(values))} to {write(max(values))})" if len(values) > 1 else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness_figure", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--trained", type=Path, nargs="+", default=[RESULTS / "exactness_2d.json", RESULTS / "exactness_64d.json"]
    )
    parser.add_argument("--pointwise", type=Path, default=RESULTS / "exactness-pointwise.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    trained: Rows = [row for file in given.trained for row in json.loads(file.read_text())]
    pointwise: Rows = json.loads(given.pointwise.read_text())
    save([r for r in trained if r["dim"] == 2], pointwise, given.out / "exactness.png")
    text = f"{trained_table(trained)}\n\nBias (spread of one draw), over the size of the exact score:\n\n{pointwise_table(pointwise)}\n"
    (given.out / "exactness.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
