"""The end of a sweep: the front, the recommended trial and why, as a table, `trials.parquet` and `front.json`. No Ray."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from didr_core.evaluate.fronts import front
from didr_core.evaluate.scores import describe
from didr_core.train.alarms import HACKING
from pipelines.sweeps.bench import WORDS
from pipelines.sweeps.folder import SweepFolder, trial_name
from pipelines.sweeps.space import given, settings, shown

LONGER = 3  # times the steps, in the command that aligns with the recommended values
PARTS = ("gain", "distance", "score")
ENDS = ("gain_low", "gain_high", "distance_low", "distance_high")
SHORT = ("number", "set", *PARTS, *ENDS, "start_distance", "measures", "alarms")
"""What front.json says of a trial."""
Results = Sequence[Mapping[str, Any]]


def judged(results: Results) -> list[Mapping[str, Any]]:
    """Trials that ran to their end and have a place on both axes."""
    return [
        r for r in results if r["status"] == "finished" and r.get("gain") is not None and r.get("distance") is not None
    ]


def front_of(results: Results) -> list[int]:
    """Numbers of the trials that no other one beats in both gain and distance, by falling gain."""
    known = judged(results)
    places = np.array([[r["gain"], -r["distance"]] for r in known], dtype=np.float64).reshape(-1, 2)
    return [int(known[i]["number"]) for i in front(places)]


def recommend(results: Results) -> tuple[int | None, str]:
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
        why += f" ({', '.join(map(trial_name, passed))} scored higher and ended with the alarm {HACKING})"
    if not calm:
        why += f"; every trial on the front ended with the alarm {HACKING}: look at its grid before using it"
    if best["score"] <= 0:
        why += "; but not above 0, the starting generator's own: no trial is worth its distance. Look for a larger beta or more steps"
    return chosen, why


def command(folder: SweepFolder, number: int) -> str:
    """`didr align` with a trial's values, for longer."""
    options, said = folder.options(), given(folder.options().overrides)
    steps = {"train.steps": LONGER * folder.config_of(number).train.steps}
    own = {k: v for k, v in {**folder.space().fixed, **folder.points()[number]}.items() if k not in said}
    items = [*settings(own | steps), *(f"{k}={v}" for k, v in said.items() if k not in steps)]
    words = [word for item in items for word in ("--set", item.replace('"', ""))]
    return shlex.join(["didr", "align", "--recipe", options.recipe, *words])


def table(
    folder: SweepFolder, results: Results, chosen: int | None, narrow: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, best score first; trials that did not run to their end last.

    ``narrow``: for a terminal of 80 columns; settings share one column, and measures are left to trials.parquet.
    """
    keys = list(dict.fromkeys(k for r in results for k in r["set"]))
    wanted = () if narrow else ("judge", "reward", "utility", "strict", "diversity")
    measures = [m for m in wanted if any(_measure(r, m) is not None for r in results)]
    swept = ["settings"] if narrow else keys
    header = ["trial", *swept, "gain, sd", "distance", "score", *(describe(m).title for m in measures), ""]
    members, rows = front_of(results), []
    for r in sorted(results, key=lambda r: (r["status"] != "finished", -(r.get("score") or 0.0))):
        marks = ["recommended"] if r["number"] == chosen else ["front"] if r["number"] in members else []
        marks += [r["status"]] if r["status"] != "finished" else []
        cells = [shown(r["set"])] if narrow else [_cell(r["set"].get(k)) for k in keys]
        cells += [_spread(r, "gain", "+.3f"), _spread(r, "distance", ".3g"), _cell(r.get("score"), "+.3f")]
        cells += [_cell(_measure(r, m)) for m in measures]
        rows.append([f"{r['number']:04d}", *cells, ", ".join(marks + list(r.get("alarms") or ()))])
    return header, rows


def _measure(result: Mapping[str, Any], name: str) -> Any:
    return (result.get("measures") or {}).get(name)


def _cell(value: Any, form: str = ".4g") -> str:
    if value is None:
        return "–"
    return format(value, form) if isinstance(value, float) else str(value)


def _spread(result: Mapping[str, Any], key: str, form: str) -> str:
    low, high = result.get(f"{key}_low"), result.get(f"{key}_high")
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.2g}"
    return _cell(result.get(key), form) + half


def write_table(folder: SweepFolder, results: Results, chosen: int | None) -> None:
    """`trials.parquet`: a row a trial."""
    members = front_of(results)
    rows = []
    for r in results:
        number, alarms = r["number"], ",".join(r.get("alarms") or ())
        flat = {k: v for k, v in r.items() if k not in ("set", "measures")}
        flat |= {f"set.{k}": v for k, v in r["set"].items()}
        flat |= {f"measure.{k}": v for k, v in (r.get("measures") or {}).items()}
        flat |= {"alarms": alarms, "on_front": number in members, "recommended": number == chosen}
        rows.append(flat | {"run": f"trials/{number:04d}"})
    names = dict.fromkeys(k for row in rows for k in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    pq.write_table(pa.table(columns), folder.path / "trials.parquet")


def _column(values: list[Any]) -> pa.Array:
    """One type a column: swept values may be numbers in one trial and text in another."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if v is None else str(v) for v in values])


def front_tree(folder: SweepFolder, results: Results, chosen: int | None, why: str) -> dict[str, Any]:
    """What front.json holds."""
    options, config = folder.options(), folder.config()
    short = {r["number"]: {k: r[k] for k in SHORT if k in r} | {"run": f"trials/{r['number']:04d}"} for r in results}
    teacher = config.evaluation.teacher_steps
    judge = "held-out judge" if config.judge else "training reward (no judge is configured)"
    reference = f"the {teacher}-step guided reference's" if teacher else "the starting generator's"
    return {
        "sweep": folder.name,
        "space": {"name": options.space, "about": options.about, "values": dict(options.tree)},
        "trials": {"planned": options.trials, **Counter(sorted(r["status"] for r in results))},
        "objectives": {
            "gain": f"mean gain of the {judge} over the starting generator, in standard deviations of the start's scores; higher is better",
            "distance": f"Wasserstein-2 distance of picture features (Gaussian fits) to {reference} pictures of the same captions, in "
            "standard deviations of the reference's features; lower is better",
        },
        "scalarisation": WORDS,
        "judged_on": {"prompts": config.evaluation.prompts, "noises": max(2, config.evaluation.seeds)},
        "intervals": "95 %, paired bootstrap over captions",
        "front": [short[n] for n in front_of(results)],
        "recommended": None if chosen is None else short[chosen] | {"why": why},
        "align_longer": None if chosen is None else command(folder, chosen),
        "seconds": timing(folder, results),
        "facts": dict(options.facts),
    }


def timing(folder: SweepFolder, results: Results) -> dict[str, Any]:
    """Wall time against pure training time. ``overhead``: wall time beyond the training time that the trials at once share."""
    at_once = folder.options().concurrent
    wall = float(sum(folder.info().get("wall", [])))
    training = float(sum(r.get("train_seconds") or 0.0 for r in results))
    return {
        "wall": round(wall, 1),
        "training": round(training, 1),
        "trials_at_once": at_once,
        "overhead": round(wall * at_once / training - 1, 4) if training else None,
        "wall_over_training": round(wall / training, 4) if training else None,
    }


def summary(folder: SweepFolder, chosen: int | None, why: str) -> list[str]:
    """The last lines of a sweep."""
    if chosen is None:
        return [f"no recommendation: {why}"]
    point = shown(folder.points()[chosen])
    return [f"recommended: {trial_name(chosen)} ({point}): {why}", f"align longer with it:  {command(folder, chosen)}"]
