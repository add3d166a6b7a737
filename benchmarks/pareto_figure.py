"""The picture of `benchmarks.pareto`: a panel a pair of measures, a line a method, in the style of `pipelines.report.figures`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from didr_core.evaluate.scores import describe
from pipelines.report.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION

COLOURS = {
    "didr": BLUE,
    "diff_instruct_pp": ORANGE,
    "diff_instruct_star": GREEN,
    "dmdr": PURPLE,
    "reward_only": GREY,
    "diff_instruct": SKY,
    "didr_hybrid": VERMILION,
}
MARKS = {"start": ("s", GREY), "teacher": ("*", INK)}
SMALLER = {"feature_distance"}


def save_fronts(tree: Mapping[str, Any], path: Path) -> Path:
    """Points with their intervals, joined along each method's front; up and right is better, whatever the measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = tree["fronts"]
    columns = len({p["fidelity"] for p in panels})
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, panel, tree)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=11, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def _panel(axes: Any, panel: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    gain, fidelity = panel["gain"], panel["fidelity"]
    for method, labels in tree["methods"].items():
        colour = COLOURS.get(method, INK)
        for label in labels:
            _point(axes, tree["points"][label]["measures"], gain, fidelity, "o", colour)
        best = [tree["points"][label]["measures"] for label in panel["methods"][method]["front"]]
        axes.plot(
            [m[fidelity]["mean"] for m in best],
            [m[gain]["mean"] for m in best],
            color=colour,
            linewidth=2,
            marker="o",
            label=method,
        )
    for label, (mark, colour) in MARKS.items():
        if label in tree["points"]:
            measures = tree["points"][label]["measures"]
            _point(axes, measures, gain, fidelity, mark, colour)
            axes.plot([], [], mark, color=colour, markersize=9, label=label)
    if fidelity in SMALLER:
        axes.invert_xaxis()
    axes.set_xlabel(
        describe(fidelity).title + (" (less is better)" if fidelity in SMALLER else ""), fontsize=12, color=INK
    )
    axes.set_ylabel(describe(gain).title, fontsize=12, color=INK)
    axes.tick_params(labelsize=11, colors=INK)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _point(axes: Any, measures: Mapping[str, Any], gain: str, fidelity: str, mark: str, colour: str) -> None:
    x, y = measures[fidelity], measures[gain]
    across = [[max(0.0, x["mean"] - x["low"])], [max(0.0, x["high"] - x["mean"])]]
    along = [[max(0.0, y["mean"] - y["low"])], [max(0.0, y["high"] - y["mean"])]]
    size = 9 if mark in "s*" else 6
    axes.errorbar(
        x["mean"], y["mean"], along, across, mark, color=colour, ecolor=colour, elinewidth=0.8, markersize=size
    )
