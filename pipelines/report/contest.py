"""``report.html`` of an evaluation: tables, who wins, pictures side by side, the best and worst prompts, and where rewards disagree.

What is shown is gathered here from the contest's files, how it looks is `contest.html.j2`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from didr_core.config.files import replace_text
from didr_core.evaluate.contest import Contest
from didr_core.evaluate.scores import Scores, describe, laws_table, win_matrix
from pipelines.report.page import hardware_of, render, score_tables
from pipelines.report.pictures import card_size, inlined

FIRST, EXTREME = 12, 4  # prompts side by side; at each end of a ranking


def write_contest_report(contest: Contest, scores: Scores, focus: str) -> Path:
    """Write ``report.html`` into the contest's folder; returns its path.

    Args:
        focus: the model whose best and worst prompts are shown.
    """
    tree, facts = scores.tree, scores.tree["facts"]
    judged = [n for n in tree["measures"] if n in ("judge", "utility") or n.startswith("reward")]
    places = {name: _values(scores, focus, name) for name in judged}
    groups = list(_extremes(places, focus))
    wanted = {place for _, _, parts in groups for _, rows in parts for place in rows}
    drawn = contest.shown(sorted(wanted | set(range(min(FIRST, len(contest.prompts))))))

    def card(place: int, name: str = "", told: str = "") -> dict[str, Any]:
        pictures = []
        for model in drawn:
            value = f"{_values(scores, model, name)[place]:.3f}" if name else ""
            pictures.append({"model": model, "value": value, "data": inlined(drawn[model][place])})
        return {"prompt": contest.prompts[place], "told": told, "pictures": pictures}

    def cards(rows: Ranked) -> list[dict[str, Any]]:
        return [card(place, name, told) for place, (name, told) in rows.items()]

    some = Image.open(io.BytesIO(next(iter(drawn[focus].values()))))
    columns = ["source", "steps", "guidance", "timesteps", "scheduler", "dtype", "calls", "seconds"]
    rows = [[name, *(_told(row.get(key)) for key in columns)] for name, row in tree["models"].items()]
    commit = facts.get("commit")
    when = facts.get("date", "")[:16].replace("T", " ")
    page = render(
        "contest.html.j2",
        name=contest.folder.name,
        facts=[f for f in (when and f"{when} UTC", commit and f"commit {commit}", hardware_of(facts)) if f],
        models=list(tree["models"]),
        focus=focus,
        scores=score_tables(tree, focus),
        matrices=[matrix for name in judged if (matrix := _matrix(tree, name))],
        laws=laws_table(tree),
        tower=describe(tree.get("laws", {}).get("features", "")).title,
        first=[card(place) for place in range(min(FIRST, len(contest.prompts)))],
        extremes=[
            {"title": title, "lead": lead, "parts": [{"title": part, "cards": cards(rows)} for part, rows in parts]}
            for title, lead, parts in groups
        ],
        **card_size(some.size, len(drawn)),
        models_table=(["model", *columns], rows),
        commands=facts.get("commands", []),
        origin={
            "commit": commit,
            "prompts": facts.get("prompts_source"),
            "noise seeds": ", ".join(map(str, tree["seeds"])),
            "hardware": hardware_of(facts),
            "versions": ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items()),
        },
    )
    replace_text(contest.folder / "report.html", page)
    return contest.folder / "report.html"


Ranked = dict[int, tuple[str, str]]
"""Place of a prompt to the measure shown under its pictures, and what is said of it."""


def _extremes(values: Mapping[str, NDArray[Any]], focus: str) -> Iterator[tuple[str, str, list[tuple[str, Ranked]]]]:
    """Title, lead and parts of each ranking: the best and worst prompts by each measure, then where two rewards disagree most."""
    for name, value in values.items():
        title = describe(name).title
        order = np.argsort(value, kind="stable")
        ends = (("Worst", order), ("Best", order[::-1]))
        parts = [(f"{end} of {focus}", {int(p): (name, "") for p in places[:EXTREME]}) for end, places in ends]
        yield f"Best and worst by {title}", "Prompts by the score of one picture, from the first noise.", parts
    names = [name for name in values if name != "utility"]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            high, low = ((v - v.mean()) / max(float(v.std()), 1e-9) for v in (values[a], values[b]))
            titles = describe(a).title, describe(b).title
            parts = []
            for sign, (more, less), name in ((1, titles, a), (-1, titles[::-1], b)):
                order = np.argsort(-sign * (high - low), kind="stable")
                said = {int(p): f"{titles[0]} {high[p]:+.1f}, {titles[1]} {low[p]:+.1f} sd" for p in order[:EXTREME]}
                parts.append((f"{more} high, {less} low", {p: (name, told) for p, told in said.items()}))
            lead = f"Pictures of {focus} on which the two differ most, in standard deviations over all prompts: look here for hacking."
            yield f"Where {titles[0]} and {titles[1]} disagree", lead, parts


def _values(scores: Scores, model: str, name: str) -> NDArray[Any]:
    """A measure of each prompt's picture from the first noise ``[N]``."""
    found: NDArray[Any] = scores.arrays[model][name][0, 0]
    return found


def _matrix(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of one measure; empty where it gives no wins."""
    matrix = win_matrix(tree, name)
    names = [model for model in tree["models"] if model in matrix]
    rows = []
    for a in names:
        cells = [_cell(matrix[a][b]) if b in matrix[a] else {"share": "", "interval": "", "kind": ""} for b in names]
        rows.append({"name": a, "cells": cells})
    return {"title": describe(name).title, "names": names, "rows": rows} if rows else {}


def _cell(wins: Mapping[str, float]) -> dict[str, str]:
    kind = "up" if wins["low"] > 0.5 else "down" if wins["high"] < 0.5 else ""
    share, low, high = (f"{100 * wins[key]:.1f}" for key in ("mean", "low", "high"))
    return {"share": share, "interval": f"{low} to {high}", "kind": kind}


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
