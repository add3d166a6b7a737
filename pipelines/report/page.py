"""``report.html``: one self-contained page of a run, made from the files in its folder and from nothing else.

What is shown is gathered here, how it looks is `page.html.j2`. Pictures are inlined, nothing is loaded from outside, so the page can be
mailed or kept as an MLflow artifact. Parts that a run does not have (no scores, no export) are left out with a word.
``write_report(run)`` can be called again at any time.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from PIL import Image

from didr_core.config.files import mapping, read_yaml, replace_text
from didr_core.config.limits import Limits
from didr_core.evaluate import control
from didr_core.evaluate.scores import JUDGES, comparison_table, describe, read_scores, table
from didr_core.export.card import usage
from didr_core.train.alarms import explain
from didr_core.train.run_folder import RunFolder, read_lines
from pipelines.report.console import clock
from pipelines.report.figures import MODEL_COLOURS, running_mean, save_curves

OTHERS = {
    "start": "the generator it started from",
    "control": "the same training without the reward",
    "teacher": "the many-step teacher",
}
NARROW_SCALE = 0.69
"""CSS pixels a pixel of a picture on a narrow screen: texts keep 11, and a panel of the curves fits into 390 px."""


def read_history(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, one a step, in order; of a step logged twice the later row."""
    return [row for _, row in sorted({row["step"]: row for row in read_lines(Path(run) / "metrics.jsonl")}.items())]


def steps_told(history: Sequence[Mapping[str, Any]]) -> str:
    """``"60 steps: 20 of assistant warm-up, 40 generator updates"``, from rows of metrics.jsonl."""
    updates = sum("loss/generator" in row for row in history)
    warmup = f"{len(history) - updates} of assistant warm-up, " if updates < len(history) else ""
    return f"{len(history)} steps: {warmup}{updates} generator updates"


def write_report(run: Path) -> Path:
    """Draw the curves (when there is a history) and write ``report.html``; returns its path.

    Raises:
        DIDRError: a file of the run is damaged.
    """
    folder = Path(run)
    history, alarms = read_history(folder), read_lines(folder / "alarms.jsonl")
    if any(len(row) > 2 for row in history):
        save_curves(history, folder / "curves.png", alarms)
    path = folder / "config.yaml"
    config = mapping(path.read_bytes(), str(path), parse=read_yaml) if path.is_file() else {}
    scores = read_scores(folder / "scores.json") if (folder / "scores.json").is_file() else None
    limits = Limits(**(config.get("alarms") or {}))
    info, facts = RunFolder(folder).info(), (scores or {}).get("facts", {})
    when = facts.get("date", "")[:16].replace("T", " ")
    commit = facts.get("commit") or info.get("commit")
    told = (when and f"{when} UTC", commit and f"commit {commit}", hardware_of(facts), facts.get("control"))
    wins = list(_wins(scores)) if scores else []
    by_name: dict[str, list[int]] = {}
    for row in alarms:
        by_name.setdefault(row["alarm"], []).append(int(row["step"]))
    page = render(
        "page.html.j2",
        name=str(config.get("name") or folder.name),
        folder=folder.name,
        facts=[fact for fact in told if fact],
        history=history,
        updates=sum("loss/generator" in row for row in history),
        verdict=_verdict(scores, wins),
        tiles=list(_tiles(history, info, scores, wins)),
        grid=_picture(folder / "grid.png"),
        control_in_numbers="control" in (scores or {}).get("models", {})
        and control.kept((config.get("evaluation") or {}).get("control")),
        wins=sorted(wins, key=lambda row: list(scores["models"]).index(row["against"])) if scores else [],
        scores=score_tables(scores, "aligned") if scores else None,
        curves=_picture(folder / "curves.png") if history else None,
        alarms=by_name,
        explain=lambda name: explain(name, limits),
        export=_export(folder / "export", config.get("backbone") or {}),
        commands=list(dict.fromkeys([*RunFolder(folder).commands(), *facts.get("commands", [])])),
        origin={
            "commit": commit,
            "seed": str(config.get("seed", "")),
            "prompts": facts.get("prompts_source"),
            "noise seeds": ", ".join(map(str, (scores or {}).get("seeds", []))),
            "MLflow run": info.get("mlflow_run_id"),
            "hardware": hardware_of(facts),
            "versions": ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items()),
        },
        config=yaml.safe_dump(config, sort_keys=False) if config else "",
        focus="aligned",
    )
    replace_text(folder / "report.html", page)
    return folder / "report.html"


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled: what users wrote is escaped, a name that it does not get is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(colours=MODEL_COLOURS, **values)


def hardware_of(facts: Mapping[str, Any]) -> str:
    """What a table was made on, in words; empty where unknown."""
    hardware = facts.get("hardware") or {}
    if gpus := hardware.get("gpus"):
        return f"{len(gpus)} × {gpus[0]}"
    return f"{hardware['cpus']} CPU cores ({hardware.get('machine', '')})" if hardware.get("cpus") else ""


def _wins(scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What aligned wins of each other model by each judge, in per cent, and how much higher its mean is."""
    pairs = {pair["b"]: pair["measures"] for pair in scores["pairs"] if pair["a"] == "aligned"}
    for name in JUDGES:
        for against, measures in pairs.items():
            wins = measures.get(name, {}).get("wins")
            if wins and wins["mean"] is not None:
                row = next(r for r in comparison_table(scores, "aligned", [name])[1] if r[0] == against)
                shares = {key: round(100 * wins[key], 2) for key in ("mean", "low", "high")}
                yield dict(name=name, measure=row[1], against=against, difference=row[2], interval=row[3], **shares)


def _verdict(scores: Mapping[str, Any] | None, wins: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came out, by the last judge that there is, and what got worse on the way."""
    judge = next((row["name"] for row in wins if row["against"] in OTHERS), "")
    told = [row for row in wins if row["name"] == judge and row["against"] in OTHERS]
    pairs = scores["pairs"] if scores else []
    start: dict[str, Any] = next((p["measures"] for p in pairs if (p["a"], p["b"]) == ("aligned", "start")), {})
    fell = [name for name, entry in start.items() if describe(name).shown and (entry["difference"]["high"] or 0.0) < 0]
    worse = comparison_table(scores, "aligned", fell)[1] if scores and fell else []
    return {
        "judge": describe(judge).title if judge else "",
        "rows": [{**row, "against": OTHERS[row["against"]]} for row in told],
        "worse": [f"{row[1]} {row[2]} ({row[3]})" for row in worse if row[0] == "start"],
    }


def _tiles(
    history: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
    scores: Mapping[str, Any] | None,
    wins: Sequence[dict[str, Any]],
) -> Iterator[dict[str, str]]:
    gain = [row["reward/gain"] for row in history if row.get("reward/gain") is not None]
    if gain:
        smooth = running_mean(np.asarray(gain, dtype=np.float64), max(1, len(gain) // 25))
        yield {"value": f"{smooth[-1]:+.2f} sd", "label": "training reward against the start, mean of the last steps"}
    for name, against in (("judge", "start"), ("utility", "teacher")):
        for row in wins:
            if (row["name"], row["against"]) == (name, against):
                label = f"wins against the {against}, {row['measure']}"
                between = f"{row['low']:.0f} to {row['high']:.0f}"
                yield {"value": f"{row['mean']:.0f} %", "interval": between, "label": label}
    strict = comparison_table(scores, "aligned", ["strict"])[1] if scores else []
    for against, _, difference, interval, *_ in strict:
        if against == "start":
            yield {"value": difference, "interval": interval, "label": "points of strict accuracy, against the start"}
    if history:
        times = [row["time/step"] for row in history if row.get("time/step")]
        steps, _, kinds = steps_told(history).partition(" ")
        pace = f", {sum(times) / len(times):.2f} s each" if times else ""
        yield {"value": steps, "label": kinds + pace}
        if info.get("seconds") or info.get("since"):
            now = time.time() - info["since"] if info.get("status") == "running" else 0.0
            total = clock(info.get("seconds", 0.0) + now)
            yield {"value": total, "label": f"in all: {clock(sum(times))} of steps, then start-up, scoring, export"}


def score_tables(scores: Mapping[str, Any], focus: str) -> dict[str, Any]:
    """The tables of a scores.json: short, everything, and what ``focus`` has over the others."""
    header, rows = table(scores, True)
    measures = [[header[i], *(row[i] for row in rows)] for i in range(1, len(header))]
    return {
        "counts": scores["counts"],
        "measures": list(scores["measures"]),
        "short": table(scores),
        "everything": (["measure", *(row[0] for row in rows)], measures),  # measures down, models across
        "differences": comparison_table(scores, focus, list(scores["measures"])),
    }


def _export(folder: Path, backbone: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the exported pipeline is used; None where there is none."""
    if not (folder / "model_index.json").is_file():
        return None
    name = backbone.get("name", "sdxl")
    return {
        "usage": usage(name),
        "timestep": backbone.get("timestep", 399) if name == "sdxl" else None,
        "files": [p.name for p in sorted(folder.glob("*.safetensors"))],
    }


def _picture(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with Image.open(path) as image:
        width = round(NARROW_SCALE * image.width)
    return {"data": base64.b64encode(path.read_bytes()).decode(), "width": width}
