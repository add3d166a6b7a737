"""Pictures of a sweep: the front (gain against distance), and beta x K. Readable at half size, safe for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.report.figures import FAINT, GREY, INK, VERMILION
from pipelines.sweeps.results import front_of, judged

BETA, STEPS = "drp.beta", "drp.steps"
MARKS = ("o", "s", "^", "D", "P", "v", "X", "*")
BINS = 5  # of a continuous value, in the heat map
COLOURS = "viridis"  # perceptually even, told apart without colour too


def axes_of(results: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """Which swept key is the colour (or the heat map's x) and which the marker (its y): beta and K where they are swept."""
    keys = list(results[0]["set"]) if results else []
    numeric = [k for k in keys if all(_is_number(r["set"].get(k)) for r in results)]
    colour = BETA if BETA in numeric else next((k for k in numeric if k != STEPS), None)
    marker = (
        STEPS
        if STEPS in keys
        else next((k for k in keys if k != colour and len(_values(results, k)) <= len(MARKS)), None)
    )
    return colour, marker


def save_front(
    results: Sequence[Mapping[str, Any]], chosen: int | None, path: Path, *, gain: str, distance: str
) -> Path:
    """Each point a trial with its 95 % interval; the front joined; the start and the recommended trial marked. Up and left is better.

    Raises:
        ValueError: no judged trial.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    known = judged(results)
    if not known:
        raise ValueError("save_front: no judged trial")
    colour, marker = axes_of(known)
    figure = Figure(figsize=(9.2, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    members = {r["number"]: r for r in known}
    line = [members[n] for n in front_of(known)]
    dashed = {"color": FAINT, "linewidth": 2, "linestyle": (0, (4, 2))}
    axes.plot([r["distance"] for r in line], [r["gain"] for r in line], **dashed, zorder=1)
    for r in known:
        spread = {"xerr": _half(r, "distance"), "yerr": _half(r, "gain")}
        axes.errorbar(r["distance"], r["gain"], **spread, color=GREY, alpha=0.5, linewidth=1.2, zorder=2)
    handles = []
    norm, drawn = _norm(known, colour), None
    kinds = _values(known, marker) if marker else [None]
    for kind, mark in zip(kinds, MARKS, strict=False):
        rows = [r for r in known if marker is None or r["set"].get(marker) == kind]
        values = [r["set"][colour] for r in rows] if colour else [0.0] * len(rows)
        places = [[r[axis] for r in rows] for axis in ("distance", "gain")]
        looks = {"cmap": COLOURS, "norm": norm, "s": 130, "edgecolors": INK, "linewidths": 1.0, "zorder": 3}
        drawn = axes.scatter(*places, c=values, marker=mark, **looks)
        if marker:
            name = f"{_word(marker)} = {kind}"
            looks = {"markerfacecolor": GREY, "markeredgecolor": INK, "markersize": 11}
            handles.append(Line2D([], [], marker=mark, color="none", label=name, **looks))
    handles.append(Line2D([], [], **dashed, label="Pareto front"))
    handles += axes.plot(
        known[0].get("start_distance", 1.0),
        0.0,
        "P",
        color=INK,
        markersize=13,
        zorder=2,
        linestyle="none",
        label="start",
    )
    if chosen is not None and chosen in members:
        place = (members[chosen]["distance"], members[chosen]["gain"])
        ring = {"markerfacecolor": "none", "markeredgecolor": VERMILION, "markeredgewidth": 2.6, "zorder": 4}
        name = f"recommended (trial {chosen + 1})"
        handles += axes.plot(*place, "o", markersize=24, linestyle="none", label=name, **ring)
    if colour:
        bar = figure.colorbar(drawn, ax=axes, pad=0.02)
        bar.set_label(_unit(colour), fontsize=14, color=INK)
        bar.ax.tick_params(labelsize=13, colors=INK)
        _plain_ticks(bar.ax.yaxis, sorted({r["set"][colour] for r in known}), norm)
    axes.set_xlabel(distance, fontsize=14, color=INK)
    axes.set_ylabel(gain, fontsize=14, color=INK)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=13, frameon=False)
    _dress(axes)
    figure.savefig(path, facecolor="white")
    return path


def save_heat(results: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Mean score by beta (in bins) and K; empty cells are left white. None where fewer than two keys are swept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = judged(results)
    x, y = axes_of(known)
    if x is None or y is None or not known:
        return None
    edges, labels = _bins([float(r["set"][x]) for r in known])
    rows = _values(known, y)
    cells: dict[tuple[int, int], list[float]] = {}
    for r in known:
        column = int(np.clip(np.searchsorted(edges, float(r["set"][x]), side="right") - 1, 0, len(labels) - 1))
        cells.setdefault((rows.index(r["set"][y]), column), []).append(float(r["score"]))
    grid = np.full((len(rows), len(labels)), np.nan)
    for (i, j), scores in cells.items():
        grid[i, j] = np.mean(scores)
    figure = Figure(figsize=(2.6 + 1.55 * len(labels), 2.4 + 1.0 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(grid, cmap=COLOURS, aspect="auto", origin="lower")
    low, high = np.nanmin(grid), np.nanmax(grid)
    for (i, j), scores in cells.items():
        dark = high > low and (grid[i, j] - low) / (high - low) < 0.6
        text = f"{grid[i, j]:+.2f}" + (f"\n{len(scores)} trials" if len(scores) > 1 else "")
        axes.text(j, i, text, ha="center", va="center", fontsize=14, color="white" if dark else INK)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(rows)), [str(v) for v in rows])
    axes.set_xlabel(_unit(x), fontsize=14, color=INK)
    axes.set_ylabel(_unit(y), fontsize=14, color=INK)
    axes.tick_params(labelsize=13, colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label("score: gain minus added distance", fontsize=14, color=INK)
    bar.ax.tick_params(labelsize=13, colors=INK)
    figure.savefig(path, facecolor="white")
    return path


def _values(results: Sequence[Mapping[str, Any]], key: str | None) -> list[Any]:
    found = {repr(r["set"].get(key)): r["set"].get(key) for r in results}.values()
    return sorted(found, key=lambda v: (not _is_number(v), v if _is_number(v) else 0, str(v)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _norm(results: Sequence[Mapping[str, Any]], key: str | None) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    values = [float(r["set"][key]) for r in results] if key else [0.0]
    low, high = min(values), max(values)
    if low > 0 and high / low > 5:
        return LogNorm(low, high)
    return Normalize(low - (low == high), high + (low == high))


def _bins(values: Sequence[float]) -> tuple[Any, list[str]]:
    """Edges ``[n + 1]`` and labels ``[n]``: the values themselves where they are few, else bins, even in logarithm over wide ranges."""
    different = sorted(set(values))
    if len(different) <= BINS + 1:
        return np.array([*different, math.inf]), [f"{v:.3g}" for v in different]
    log = different[0] > 0 and different[-1] / different[0] > 5
    make = np.geomspace if log else np.linspace
    edges = make(different[0], different[-1], BINS + 1)
    return edges, [f"{a:.2g} to {b:.2g}" for a, b in pairwise(edges)]


def _half(result: Mapping[str, Any], key: str) -> Any:
    low, high, mean = (result.get(k) for k in (f"{key}_low", f"{key}_high", key))
    if low is None or high is None or mean is None:
        return None
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]


def _word(key: str | None) -> str:
    return {"drp.steps": "K", "drp.beta": "beta"}.get(key or "", (key or "").rpartition(".")[2])


def _unit(key: str) -> str:
    named = {
        BETA: "beta, reward tilt (sd of the start's reward)",
        STEPS: "K, DRP steps",
        "guidance.reference": "guidance scale of the reference (no unit)",
    }
    return named.get(key, key)


def _plain_ticks(axis: Any, values: Sequence[float], norm: Any) -> None:
    """A few round numbers rather than powers of ten with one label."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    if type(norm).__name__ != "LogNorm":
        return
    low, high = values[0], values[-1]
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high] or [low, high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _dress(axes: Any) -> None:
    axes.tick_params(labelsize=13, colors=INK)
    axes.grid(alpha=0.25)
    axes.margins(0.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
