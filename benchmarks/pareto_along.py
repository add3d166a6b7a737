"""Along the trainings of `benchmarks.pareto`: the running average at every checkpoint, scored. What breaks on the way is seen there.

A training's own way through reward and fidelity is a front, too: it is where stopping earlier would have led.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pareto_figure import COLOURS
from didr_core.evaluate.contestants import fingerprint, one_step_contestant
from didr_core.evaluate.evaluator import Evaluator
from didr_core.evaluate.fronts import distances
from didr_core.evaluate.paired import Bootstrap
from didr_core.evaluate.scores import Arrays, describe, entropies
from didr_core.export.card import markdown
from didr_core.train import checkpoint
from didr_core.train.run_folder import RunFolder
from pipelines.report.figures import INK

MEASURES = ("utility", "judge", "reward", "strict", "diversity")
SHOWN = ("utility", "judge", "strict", "feature_distance", "background_entropy")
Rows = list[dict[str, Any]]


def means(values: Arrays, reference: NDArray[Any]) -> dict[str, float]:
    """Of the measures ``[1, S, N]`` of one network; ``reference`` are the teacher's features ``[1, S, N, D]``."""
    one = Bootstrap(reference.shape[2], 1, 0)
    found = {name: one.means(values[name])[0] for name in MEASURES if name in values}
    found |= {f"{what}_entropy": bits[0] for what, bits in entropies(one, values)}
    apart = distances(one, values["features"].astype(np.float64), reference.astype(np.float64))[0]
    return {name: float(f"{value:.6g}") for name, value in (found | {"feature_distance": apart}).items()}


def scored(evaluator: Evaluator, run: Path, head_start: int, reference: NDArray[Any], kept: Path) -> Rows:
    """A row a checkpoint of ``run`` after the assistant's head start, by updates of the generator; scores are kept in ``kept``."""
    rows = []
    for step in (s for s in RunFolder(run).checkpoints() if s > head_start):
        folder = RunFolder(run).checkpoint(step)
        network = evaluator.backbone.load_network("generator")
        with checkpoint.fits(folder):
            network.load_state_dict(checkpoint.read(folder, "ema"))
        contestant = one_step_contestant(f"{run.name}-{step}", evaluator.backbone, network)
        found = evaluator.measured(contestant, fingerprint(network), kept)
        rows.append({"updates": step - head_start, **means(found, reference)})
    return rows


def beaten_by(rows: Rows, row: dict[str, Any]) -> list[str]:
    """Points of other methods with the same seed, any update, that are better in true utility and in feature distance."""
    return [
        f"{r['label']} at {r['updates']}"
        for r in rows
        if r["seed"] == row["seed"]
        and r["method"] != row["method"]
        and r["utility"] > row["utility"]
        and r["feature_distance"] < row["feature_distance"]
    ]


def table(rows: Rows, every: Sequence[int]) -> str:
    """Markdown: medians over seeds at equal updates; then, of every training's last point, which points of others are better in both."""
    labels = list(dict.fromkeys(r["label"] for r in rows))
    lines, last = [], []
    for label in labels:
        mine = [r for r in rows if r["label"] == label]
        for updates in every:
            here = [r for r in mine if r["updates"] == updates]
            if here:
                cells = (f"{statistics.median(r[name] for r in here):.4g}" for name in SHOWN)
                lines.append([label, str(updates), str(len(here)), *cells])
        for seed in sorted({r["seed"] for r in mine}):
            end = max((r for r in mine if r["seed"] == seed), key=lambda r: r["updates"])
            better = beaten_by(rows, end)
            last.append([label, str(seed), str(end["updates"]), str(len(better)), ", ".join(better[:3]) or "none"])
    return "\n\n".join(
        [
            markdown(["point", "updates", "seeds", *(describe(name).title for name in SHOWN)], lines),
            "Last points, and the points of other methods with the same seed that are better in true utility and in feature distance:",
            markdown(["point", "seed", "updates", "better in both", "of them"], last),
        ]
    )


def save(rows: Rows, path: Path) -> None:
    """Utility and judge against feature distance: a line a training, a dot a checkpoint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 5.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, gain in zip(figure.subplots(1, 2), ("utility", "judge"), strict=True):
        seen: set[str] = set()
        for label, seed in dict.fromkeys((r["label"], r["seed"]) for r in rows):
            mine = sorted(
                (r for r in rows if (r["label"], r["seed"]) == (label, seed)), key=lambda r: int(r["updates"])
            )
            method = mine[0]["method"]
            axes.plot(
                [r["feature_distance"] for r in mine],
                [r[gain] for r in mine],
                ".-",
                color=COLOURS.get(method, INK),
                linewidth=1.5,
                label=None if method in seen else method,
            )
            seen.add(method)
        axes.set_xlabel(f"{describe('feature_distance').title} (less is better)", fontsize=12, color=INK)
        axes.set_ylabel(describe(gain).title, fontsize=12, color=INK)
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
