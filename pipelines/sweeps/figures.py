"""Pictures of a sweep: the front (gain against distance), and beta x K. Readable at half size, safe for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report.figures import FAINT, GREY, INK, VERMILION, plain_ticks
from pipelines.sweeps.folder import trial_name
from pipelines.sweeps.results import Results, front_of, judged

BETA, STEPS = "drp.beta", "drp.steps"
WORDS = {BETA: "beta", STEPS: "K"}
UNITS = {
    BETA: "beta, reward tilt (sd of the start's reward)",
    STEPS: "K, DRP steps",
    "guidance.reference": "guidance scale of the reference (no unit)",
}
MARKS = ("o", "s", "^", "D", "P", "v", "X", "*")
BINS = 5  # of a continuous value, in the heat map
WIDE = 5  # times the lowest value: from here on a scale is logarithmic
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 13,
    "axes.labelsize": 14,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "image.cmap": "viridis",  # perceptually even, told apart without colour too
}


def axes_of(results: Results) -> tuple[str | None, str | None]:
    """Which swept key is the colour (or the heat map's x) and which the marker (its y): beta and K where they are swept."""
    keys = list(results[0]["set"]) if results else []
    numeric = [k for k in keys if all(_is_number(r["set"].get(k)) for r in results)]
    colour = BETA if BETA in numeric else next((k for k in numeric if k != STEPS), None)
    few = (k for k in keys if k != colour and len(_values(results, k)) <= len(MARKS))
    return colour, STEPS if STEPS in keys else next(few, None)


def save_front(results: Results, chosen: int | None, path: Path, *, gain: str, distance: str) -> Path:
    """Each point a trial with its 95 % interval; the front joined; the start and the recommended trial marked. Up and left is better.

    Raises:
        ValueError: no judged trial.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    known = judged(results)
    if not known:
        raise ValueError("save_front: no judged trial")
    colour, marker = axes_of(known)
    members = {r["number"]: r for r in known}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 6.4))
        axes = figure.add_subplot()
        line = [members[n] for n in front_of(known)]
        dashed = {"color": FAINT, "linewidth": 2, "linestyle": (0, (4, 2))}
        axes.plot([r["distance"] for r in line], [r["gain"] for r in line], **dashed, zorder=1)
        (x, x_reach), (y, y_reach) = _interval(known, "distance"), _interval(known, "gain")
        axes.errorbar(x, y, y_reach, x_reach, fmt="none", color=GREY, alpha=0.5, linewidth=1.2, zorder=2)
        handles = []
        norm, drawn = _norm(known, colour), None
        kinds = _values(known, marker) if marker else [None]
        for kind, mark in zip(kinds, MARKS, strict=False):
            rows = [r for r in known if marker is None or r["set"].get(marker) == kind]
            values = [r["set"][colour] for r in rows] if colour else [0.0] * len(rows)
            places = [[r[axis] for r in rows] for axis in ("distance", "gain")]
            looks = {"norm": norm, "s": 130, "edgecolors": INK, "linewidths": 1.0, "zorder": 3}
            drawn = axes.scatter(*places, c=values, marker=mark, **looks)
            if marker:
                name = f"{WORDS.get(marker, marker.rpartition('.')[2])} = {kind}"
                looks = {"markerfacecolor": GREY, "markeredgecolor": INK, "markersize": 11}
                handles.append(Line2D([], [], marker=mark, color="none", label=name, **looks))
        handles.append(Line2D([], [], **dashed, label="Pareto front"))
        start = {"color": INK, "markersize": 13, "zorder": 2, "linestyle": "none", "label": "start"}
        handles += axes.plot(known[0].get("start_distance", 1.0), 0.0, "P", **start)
        if chosen is not None and chosen in members:
            place = (members[chosen]["distance"], members[chosen]["gain"])
            ring = {"markerfacecolor": "none", "markeredgecolor": VERMILION, "markeredgewidth": 2.6, "zorder": 4}
            name = f"recommended ({trial_name(chosen)})"
            handles += axes.plot(*place, "o", markersize=24, linestyle="none", label=name, **ring)
        if colour:
            bar = figure.colorbar(drawn, ax=axes, pad=0.02, label=UNITS.get(colour, colour))
            if isinstance(norm, LogNorm):
                plain_ticks(bar.ax.yaxis)
        axes.set(xlabel=distance, ylabel=gain)
        axes.grid(alpha=0.25)
        axes.margins(0.08)
        axes.spines[["top", "right"]].set_visible(False)
        columns = min(4, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path)
    return path


def save_heat(results: Results, path: Path) -> Path | None:
    """Mean score by beta (in bins) and K; empty cells are left white. None where fewer than two keys are swept."""
    import matplotlib
    from matplotlib.figure import Figure

    known = judged(results)
    x, y = axes_of(known)
    if x is None or y is None:
        return None
    edges, labels = _bins([float(r["set"][x]) for r in known])
    rows = _values(known, y)
    cells: dict[tuple[int, int], list[float]] = {}
    for r in known:
        column = min(int(np.searchsorted(edges, float(r["set"][x]), side="right")), len(labels)) - 1
        cells.setdefault((rows.index(r["set"][y]), column), []).append(float(r["score"]))
    grid = np.full((len(rows), len(labels)), np.nan)
    for cell, scores in cells.items():
        grid[cell] = np.mean(scores)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 1.55 * len(labels), 2.4 + 1.0 * len(rows)))
        axes = figure.add_subplot()
        drawn = axes.imshow(grid, aspect="auto", origin="lower")
        for (i, j), scores in cells.items():
            colour = "white" if grid[i, j] < drawn.norm.vmax and drawn.norm(grid[i, j]) < 0.6 else INK
            text = f"{grid[i, j]:+.2f}" + (f"\n{len(scores)} trials" if len(scores) > 1 else "")
            axes.text(j, i, text, ha="center", va="center", fontsize=14, color=colour)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(rows)), [str(v) for v in rows])
        axes.set(xlabel=UNITS.get(x, x), ylabel=UNITS.get(y, y))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(drawn, ax=axes, pad=0.02, label="score: gain minus added distance")
        figure.savefig(path)
    return path


def _values(results: Results, key: str) -> list[Any]:
    found = {repr(r["set"].get(key)): r["set"].get(key) for r in results}.values()
    return sorted(found, key=lambda v: (not _is_number(v), v if _is_number(v) else 0, str(v)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _norm(results: Results, key: str | None) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    values = [float(r["set"][key]) for r in results] if key else [0.0]
    low, high = min(values), max(values)
    return LogNorm(low, high) if _is_wide(low, high) else Normalize(low - (low == high), high + (low == high))


def _is_wide(low: float, high: float) -> bool:
    return low > 0 and high / low > WIDE


def _bins(values: Sequence[float]) -> tuple[Any, list[str]]:
    """Edges ``[n + 1]`` and labels ``[n]``: the values themselves where they are few, else bins, even in logarithm over wide ranges."""
    different = sorted(set(values))
    if len(different) <= BINS + 1:
        return np.array([*different, math.inf]), [f"{v:.3g}" for v in different]
    make = np.geomspace if _is_wide(different[0], different[-1]) else np.linspace
    edges = make(different[0], different[-1], BINS + 1)
    return edges, [f"{a:.2g} to {b:.2g}" for a, b in pairwise(edges)]


def _interval(results: Results, key: str) -> tuple[Any, Any]:
    """Means ``[n]``, and how far their intervals reach ``[2, n]`` below and above; NaN where there is none."""
    mean, low, high = (np.array([r.get(key + end) for r in results], np.float64) for end in ("", "_low", "_high"))
    return mean, np.clip([mean - low, high - mean], 0, None)
