"""The end of a sweep: the front, the recommended trial and why, as a table, `trials.parquet` and `front.json`. No Ray."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from didr_core.evaluate.fronts import front
from didr_core.evaluate.scores import describe
from didr_core.train.alarms import HACKING
from pipelines.sweeps.bench import WORDS
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.space import settings, shown

LONGER = 3  # times the steps, in the command that aligns with the recommended values
PARTS = ("gain", "distance", "score")
FIGURES = ("front.png", "heat.png")


def judged(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Trials that ran to their end and have a place on both axes."""
    return [
        r for r in results if r["status"] == "finished" and r.get("gain") is not None and r.get("distance") is not None
    ]


def front_of(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the trials that no other one beats in both gain and distance, by falling gain."""
    known = judged(results)
    if not known:
        return []
    places = np.array([[r["gain"], -r["distance"]] for r in known], dtype=np.float64)
    return [int(known[i]["number"]) for i in front(places)]


def recommend(results: Sequence[Mapping[str, Any]]) -> tuple[int | None, str]:
    """The trial of the front with the highest score, and why. Trials that end with the hacking alarm come last."""
    known = {int(r["number"]): r for r in judged(results)}
    members = front_of(results)
    if not members:
        return None, "no trial ran to its end"
    calm = [n for n in members if HACKING not in known[n].get("alarms", ())]
    chosen = max(calm or members, key=lambda n: known[n]["score"])
    best = known[chosen]
    passed = [n for n in members if known[n]["score"] > best["score"]]
    why = (
        f"of the {len(members)} trial(s) on the front it has the highest score, {best['score']:+.3f}: gain {best['gain']:+.3f} sd at "
        f"distance {best['distance']:.3g} (start {best['start_distance']:.2g})"
    )
    if passed:
        why += f" ({', '.join(f'trial {n + 1}' for n in passed)} scored higher and ended with the alarm {HACKING})"
    if not calm:
        why += f"; every trial on the front ended with the alarm {HACKING}: look at its grid before using it"
    if best["score"] <= 0:
        why += "; but not above 0, the starting generator's own: no trial is worth its distance. Look for a larger beta or more steps"
    return chosen, why


def command(folder: SweepFolder, number: int) -> str:
    """`didr align` with a trial's values, for longer."""
    plan, config = folder.plan(), folder.config_of(number)
    fixed = {k: v for k, v in plan.tree.items() if k not in folder.points()[number]}
    given = dict(item.partition("=")[::2] for item in plan.overrides)
    steps = f"train.steps={LONGER * config.train.steps}"
    whole = [*settings(fixed | folder.points()[number]), *(f"{k}={v}" for k, v in given.items())]
    kept = [item for item in whole if not item.startswith("train.steps=") and item.partition("=")[0] not in given]
    kept += [f"{k}={v}" for k, v in given.items() if k != "train.steps"]
    words = [word for item in [*kept, steps] for word in ("--set", item.replace('"', ""))]
    return shlex.join(["didr", "align", "--recipe", plan.recipe, *words])


def table(
    folder: SweepFolder, results: Sequence[Mapping[str, Any]], chosen: int | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, best score first; trials that did not run to their end last."""
    keys = list(folder.points().get(0, {}))
    members = front_of(results)
    measures = [
        m
        for m in ("judge", "reward", "utility", "strict", "diversity")
        if any((r.get("measures") or {}).get(m) is not None for r in results)
    ]
    header = ["trial", *keys, "gain, sd", "distance", "score", *(describe(m).title for m in measures), ""]
    rows = []
    for r in sorted(results, key=lambda r: (r["status"] != "finished", -(r.get("score") or 0.0))):
        marks = ["recommended"] if r["number"] == chosen else []
        marks += ["front"] if r["number"] in members else []
        marks += [r["status"]] if r["status"] != "finished" else []
        cells = [_cell(r["set"].get(k)) for k in keys]
        cells += [_spread(r, "gain", "+.3f"), _spread(r, "distance", ".3g"), _cell(r.get("score"), "+.3f")]
        cells += [_cell((r.get("measures") or {}).get(m), ".4g") for m in measures]
        rows.append([str(r["number"] + 1), *cells, ", ".join(marks + list(r.get("alarms") or ()))])
    return header, rows


def _cell(value: Any, form: str = ".4g") -> str:
    if value is None:
        return "–"
    return format(value, form) if isinstance(value, float) else str(value)


def _spread(result: Mapping[str, Any], key: str, form: str) -> str:
    low, high = result.get(f"{key}_low"), result.get(f"{key}_high")
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.2g}"
    return _cell(result.get(key), form) + half


def write_table(folder: SweepFolder, results: Sequence[Mapping[str, Any]], chosen: int | None) -> None:
    """`trials.parquet`: a row a trial."""
    members = front_of(results)
    rows = []
    for r in results:
        flat = {k: v for k, v in r.items() if k not in ("set", "measures", "alarms")}
        flat |= {f"set.{k}": v for k, v in r["set"].items()} | {
            f"measure.{k}": v for k, v in (r.get("measures") or {}).items()
        }
        flat |= {
            "alarms": ",".join(r.get("alarms") or ()),
            "on_front": r["number"] in members,
            "recommended": r["number"] == chosen,
        }
        rows.append(flat | {"run": f"trials/{r['number']:04d}"})
    names = list(dict.fromkeys(k for row in rows for k in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    pq.write_table(pa.table(columns), folder.path / "trials.parquet")


def _column(values: list[Any]) -> pa.Array:
    """One type a column: swept values may be numbers in one trial and text in another."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        numbers = all(isinstance(v, int | float) or v is None for v in values)
        return pa.array([None if v is None else float(v) if numbers else str(v) for v in values])


def front_tree(
    folder: SweepFolder, results: Sequence[Mapping[str, Any]], chosen: int | None, why: str
) -> dict[str, Any]:
    """What front.json holds."""
    plan, config = folder.plan(), folder.config()
    members = front_of(results)
    counts = {status: sum(r["status"] == status for r in results) for status in sorted({r["status"] for r in results})}
    teacher = config.evaluation.teacher_steps
    judge = "held-out judge" if config.judge else "training reward (no judge is configured)"
    reference = f"the {teacher}-step guided reference's" if teacher else "the starting generator's"
    return {
        "sweep": folder.name,
        "space": {"name": plan.space, "about": plan.about, "values": dict(plan.tree)},
        "trials": {"planned": plan.trials, **counts},
        "objectives": {
            "gain": f"mean gain of the {judge} over the starting generator, in standard deviations of the start's scores; higher is better",
            "distance": f"Wasserstein-2 distance of picture features (Gaussian fits) to {reference} pictures of the same captions, in "
            "standard deviations of the reference's features; lower is better",
        },
        "scalarisation": WORDS,
        "judged_on": {"prompts": config.evaluation.prompts, "noises": max(2, config.evaluation.seeds)},
        "intervals": "95 %, paired bootstrap over captions",
        "front": [_short(r) for n in members for r in results if r["number"] == n],
        "recommended": None
        if chosen is None
        else _short(next(r for r in results if r["number"] == chosen)) | {"why": why},
        "align_longer": None if chosen is None else command(folder, chosen),
        "seconds": timing(folder, results),
        "facts": dict(plan.facts),
    }


def timing(folder: SweepFolder, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Wall time against pure training time. ``overhead``: wall time beyond the training time that the trials at once share."""
    info, plan = folder.info(), folder.plan()
    wall = float(sum(info.get("wall", [])))
    training = float(sum(r.get("train_seconds") or 0.0 for r in results))
    shared = training / plan.concurrent
    return {
        "wall": round(wall, 1),
        "training": round(training, 1),
        "trials_at_once": plan.concurrent,
        "overhead": round(wall / shared - 1, 4) if shared else None,
        "wall_over_training": round(wall / training, 4) if training else None,
    }


def _short(result: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "number",
        "set",
        *PARTS,
        "gain_low",
        "gain_high",
        "distance_low",
        "distance_high",
        "start_distance",
        "measures",
        "alarms",
    )
    return {k: result[k] for k in keys if k in result} | {"run": f"trials/{result['number']:04d}"}


def write_front(folder: SweepFolder, tree: Mapping[str, Any]) -> None:
    """`front.json`, whole or not at all."""
    part = folder.path / "front.json.part"
    part.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    part.replace(folder.path / "front.json")


def summary(folder: SweepFolder, chosen: int | None, why: str) -> list[str]:
    """The last lines of a sweep."""
    if chosen is None:
        return [f"no recommendation: {why}"]
    point = shown(folder.points()[chosen])
    return [f"recommended: trial {chosen + 1} ({point}): {why}", f"align longer with it:  {command(folder, chosen)}"]
