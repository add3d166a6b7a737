"""``report.html``: one self-contained page of a run, made from the files in its folder and from nothing else.

Pictures are inlined, nothing is loaded from outside, so the page can be mailed or kept as an MLflow artifact. Parts that a run does
not have (no scores, no export) are left out with a word. ``write_report(run)`` can be called again at any time.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from didr_core.config.files import replace_text
from didr_core.evaluate.scores import comparison_table, describe, read_scores, table
from didr_core.export.card import usage
from didr_core.train.alarms import explain
from didr_core.train.run_folder import read_lines
from pipelines.report.console import clock
from pipelines.report.figures import MODEL_COLOURS, running_mean, save_curves, save_grid

__all__ = ["read_history", "save_curves", "save_grid", "write_report"]

JUDGED = ("reward", "judge", "utility")

STYLE = """
:root { --ink:#1f2430; --soft:#5b6472; --line:#e3e6eb; --paper:#fff; --wash:#f6f7f9; --accent:#0072B2; --good:#00734f; --warn:#b24a00; }
* { box-sizing: border-box; }
body { margin:0; background:var(--wash); color:var(--ink); }
body { font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px; }
header h1 { font-size:34px; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em; }
header p { margin:0; color:var(--soft); }
.verdict { font-size:20px; line-height:1.45; color:var(--ink)!important; margin:14px 0 0!important; max-width:62em; }
section { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:24px 28px; margin-top:22px; }
h2 { font-size:20px; margin:0 0 4px; } h2 + p { margin-top:0; } p.lead { color:var(--soft); margin:0 0 16px; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:14px; margin-top:24px; }
.tile { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:16px 20px; }
.tile b { display:block; font-size:30px; line-height:1.15; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:14px; }
img { display:block; width:100%; height:auto; border-radius:6px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:15px; line-height:1.35; }
th { text-align:right; font-weight:600; color:var(--soft); border-bottom:2px solid var(--line); padding:8px 10px; vertical-align:bottom; }
td { text-align:right; border-bottom:1px solid var(--line); padding:9px 10px; white-space:nowrap; }
th:first-child, td:first-child { text-align:left; padding-left:0; } tr:last-child td { border-bottom:0; }
td small { color:var(--soft); display:block; font-weight:400; font-size:12.5px; line-height:1.2; }
tr.focus td { background:#eef6fb; font-weight:600; } tr.focus td:first-child { padding-left:10px; }
.dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:8px; }
.wins { display:grid; grid-template-columns:max-content max-content 1fr max-content; gap:6px 18px; align-items:center; }
.wins .who { font-weight:600; } .wins .what { color:var(--soft); } .wins .share { font-variant-numeric:tabular-nums; font-weight:600; }
.wins .share small { font-weight:400; color:var(--soft); } .wins svg { width:100%; height:26px; }
.alarm { border-left:4px solid #D55E00; background:#fff6ef; padding:10px 16px; margin:10px 0; border-radius:0 8px 8px 0; }
.calm { color:var(--good); font-weight:600; }
pre { background:#f3f5f8; border:1px solid var(--line); border-radius:8px; padding:14px 16px; overflow-x:auto; font:14px/1.5 ui-monospace,
"DejaVu Sans Mono",monospace; margin:8px 0 16px; }
code { font:.92em ui-monospace,"DejaVu Sans Mono",monospace; } summary { cursor:pointer; font-weight:600; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 20px; margin:0; } dt { color:var(--soft); }
dd { margin:0; overflow-wrap:anywhere; }
footer { color:var(--soft); font-size:14px; margin-top:26px; }
@media (max-width:640px) {
  .wins { grid-template-columns:1fr auto; grid-auto-flow:dense; } .wins svg, .wins .who { grid-column:1/-1; }
  .wins .who:empty { display:none; } section { padding:18px 16px; }
}
@media print { body { background:#fff; } section, .tile { break-inside:avoid; } }
"""


@dataclass(frozen=True)
class _Run:
    """Everything a run folder holds that a report shows."""

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    history: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    scores: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> _Run:
        config = folder / "config.yaml"
        return cls(
            folder,
            (yaml.safe_load(config.read_text()) or {}) if config.is_file() else {},
            json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else {},
            read_history(folder),
            read_lines(folder / "alarms.jsonl"),
            read_scores(folder / "scores.json") if (folder / "scores.json").is_file() else None,
        )

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    def pair(self, b: str) -> Mapping[str, Any]:
        """Measures of aligned against ``b``."""
        pairs = self.scores["pairs"] if self.scores else []
        return next((p["measures"] for p in pairs if p["a"] == "aligned" and p["b"] == b), {})


def read_history(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, one a generator step, in order; of a step logged twice the later row."""
    return [row for _, row in sorted({row["step"]: row for row in read_lines(Path(run) / "metrics.jsonl")}.items())]


def write_report(run: Path) -> Path:
    """Draw the curves (when there is a history) and write ``report.html``; returns its path.

    Raises:
        DIDRError: scores.json is there but broken.
    """
    folder = Path(run)
    found = _Run.read(folder)
    if any(len(row) > 2 for row in found.history):
        save_curves(found.history, folder / "curves.png", found.alarms)
    parts = [_header(found), _tiles(found), _grid(found), _who_wins(found), _score_table(found), _curves(found)]
    parts += [_alarms(found), _use(found), _repeat(found), _config(found)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>DIDR: {escape(found.name)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}"
        "<footer>Written by DIDR. Every number is in scores.json and metrics.jsonl beside this page.</footer></main></body></html>\n"
    )
    replace_text(folder / "report.html", page)
    return folder / "report.html"


def _header(run: _Run) -> str:
    facts = (run.scores or {}).get("facts", {})
    when = facts.get("date", "")[:16].replace("T", " ")
    bits = [
        f"{when} UTC" if when else "",
        f"commit {facts.get('commit') or run.facts.get('commit') or ''}".removesuffix("commit "),
        _hardware(facts),
    ]
    line = " · ".join(escape(b) for b in bits if b)
    return f'<header><h1>{escape(run.name)}</h1><p>{line}</p><p class="verdict">{_verdict(run)}</p></header>'


def _hardware(facts: Mapping[str, Any]) -> str:
    hardware = facts.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]}"
    return f"{hardware['cpus']} CPU cores ({hardware.get('machine', '')})" if hardware.get("cpus") else ""


def _verdict(run: _Run) -> str:
    """One sentence: what came out, by the last judge that there is (true utility, else the held-out judge, else the reward)."""
    for measure in ("utility", "judge", "reward"):
        parts = []
        for other, name in (
            ("start", "the generator it started from"),
            ("control", "the same training without the reward"),
            ("teacher", "the many-step teacher"),
        ):
            wins = (run.pair(other).get(measure) or {}).get("wins")
            if wins and wins["mean"] is not None:
                parts.append(f"<b>{100 * wins['mean']:.0f} %</b> against {name}")
        if parts:
            judge = escape(describe(measure).title)
            return f"Judged by the {judge}, the aligned one-step generator wins {_and(parts)}, prompt by prompt from the same noise."
    return "One-step generator aligned by DIDR." if run.history else "No training steps yet."


def _and(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _tiles(run: _Run) -> str:
    tiles: list[tuple[str, str]] = []
    gain = [row["reward/gain"] for row in run.history if row.get("reward/gain") is not None]
    if gain:
        smooth = running_mean(_array(gain), max(1, len(gain) // 25))
        tiles.append((f"{smooth[-1]:+.2f} sd", "training reward, against the start"))
    for measure, other, label in (
        ("judge", "start", "wins against the start, held-out judge"),
        ("utility", "teacher", "wins against the teacher, true utility"),
    ):
        wins = (run.pair(other).get(measure) or {}).get("wins")
        if wins:
            tiles.append((f"{100 * wins['mean']:.0f} %", label))
    strict = (run.pair("start").get("strict") or {}).get("difference")
    if strict:
        tiles.append((f"{100 * strict['mean']:+.1f}", "points of strict accuracy, against the start"))
    if run.history:
        times = [row["time/step"] for row in run.history if row.get("time/step")]
        pace = f", {sum(times) / len(times):.2f} s each" if times else ""
        total = f" ({clock(sum(times))})" if times else ""
        tiles.append((str(run.history[-1]["step"]), f"generator steps{pace}{total}"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{escape(b)}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _grid(run: _Run) -> str:
    return _section(
        "Before and after",
        "Held-out prompts. Both pictures of a pair start from the same noise.",
        _image(run.folder / "grid.png", "pictures of the same prompts and noise by each model")
        or "<p>No grid was made.</p>",
    )


def _who_wins(run: _Run) -> str:
    rows: list[str] = []
    told: set[str] = set()
    for other in (run.scores or {}).get("models", {}):
        for measure in JUDGED:
            wins = (run.pair(other).get(measure) or {}).get("wins")
            if wins and wins["mean"] is not None:
                mean, low, high = (100 * wins[k] for k in ("mean", "low", "high"))
                who = "" if other in told else f"against {escape(other)}"
                told.add(other)
                rows.append(
                    f'<span class="who">{who}</span><span class="what">{escape(describe(measure).title)}</span>'
                    f"{_interval_bar(mean, low, high, MODEL_COLOURS['aligned'])}"
                    f'<span class="share">{mean:.1f} % <small>{low:.1f} to {high:.1f}</small></span>'
                )
    if not rows:
        return ""
    lead = (
        "Share of same-prompt, same-noise comparisons that the aligned generator wins (a tie is half a win), "
        "with 95 % intervals. 50 % is no difference."
    )
    return _section("Who wins, prompt by prompt", lead, f'<div class="wins">{"".join(rows)}</div>')


def _interval_bar(mean: float, low: float, high: float, colour: str) -> str:
    """A bar from 0 to 100 % with the interval and a mark at 50 %, as inline SVG."""

    def box(x: float, y: float, wide: float, tall: float, fill: str, opacity: float = 1.0) -> str:
        size = f'x="{x:.2f}" y="{y:g}" width="{wide:.2f}" height="{tall:g}"'
        return f'<rect {size} fill="{fill}" opacity="{opacity:g}"/>'

    shapes = [
        box(0, 3.5, 100, 3, "#eceff3"),
        box(0, 3.5, mean, 3, colour, 0.28),
        box(low, 4.4, max(high - low, 0.2), 1.2, colour),
        box(mean - 0.3, 2, 0.6, 6, colour),
        box(49.9, 0, 0.2, 10, "#1f2430"),
    ]
    return f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'


def _score_table(run: _Run) -> str:
    if not run.scores:
        return _section(
            "Scores", "", "<p>Not scored: <code>evaluation.prompts</code> was 0, or scoring has not run yet.</p>"
        )
    counts = run.scores["counts"]
    lead = (
        f"{counts['prompts']:,} held-out prompts × {counts['seeds']} noise seed{'s' if counts['seeds'] > 1 else ''}; "
        "mean ± half the 95 % interval (paired bootstrap over captions)."
    )
    header, rows = comparison_table(run.scores, "aligned", list(run.scores["measures"]))
    details = _details("All differences of the aligned generator", _table(header, rows)) if rows else ""
    everything = _details("All measures", _table(*_turned(table(run.scores, True))))
    short = f'<div class="scroll">{_table(*table(run.scores))}</div>'
    return _section("Scores", lead, f"{short}<p></p>{everything}{details}")


def _details(summary: str, body: str) -> str:
    return f'<details><summary>{escape(summary)}</summary><div class="scroll">{body}</div></details>'


def _turned(made: tuple[list[str], list[list[str]]]) -> tuple[list[str], list[list[str]]]:
    """Measures down, models across: the long table."""
    header, rows = made
    return ["measure", *(row[0] for row in rows)], [
        [header[i], *(row[i] for row in rows)] for i in range(1, len(header))
    ]


def _curves(run: _Run) -> str:
    lead = "Faint: each step. Strong: running mean. Marks on the lower edge: steps at which an alarm rang."
    picture = _image(run.folder / "curves.png", "training curves") if run.history else ""
    return _section("Curves", lead if picture else "", picture or "<p>No step has been logged yet.</p>")


def _alarms(run: _Run) -> str:
    by_name: dict[str, list[int]] = {}
    for row in run.alarms:
        by_name.setdefault(row["alarm"], []).append(int(row["step"]))
    if not by_name:
        return _section("Alarms", "", '<p class="calm">None rang.</p>' if run.history else "<p>No steps yet.</p>")
    items = [
        f'<div class="alarm"><b>{escape(name)}</b>, {len(steps)} steps, first {min(steps)}, last {max(steps)}.<br>'
        f"{escape(explain(name))}</div>"
        for name, steps in by_name.items()
    ]
    return _section("Alarms", "Advice, not a stop. Read them together with the grid.", "".join(items))


def _use(run: _Run) -> str:
    export = run.folder / "export"
    if not (export / "model_index.json").is_file():
        return _section(
            "Use it",
            "",
            "<p>Not exported yet. <code>didr export</code> writes a folder that stock diffusers loads.</p>",
        )
    backbone = run.config.get("backbone") or {}
    if told := usage(backbone.get("name", "sdxl")):
        return _section("Use it", "", f"<p>{escape(told)}</p>")
    step = f", timesteps=[{backbone.get('timestep', 399)}]" if backbone.get("name") == "sdxl" else ""
    code = (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{run.folder.name}/export", torch_dtype=torch.float32)\n'
        f'image = pipe("a prompt", num_inference_steps=1, guidance_scale=0{step}).images[0]'
    )
    files = ", ".join(f"<code>{escape(p.name)}</code>" for p in sorted(export.glob("*.safetensors")))
    single = f"<p>The generator's weights alone, in one file: {files}.</p>" if files else ""
    return _section(
        "Use it",
        "The folder <code>export</code> beside this page loads in stock diffusers, without DIDR.",
        f"<pre>{escape(code)}</pre>{single}",
    )


def _repeat(run: _Run) -> str:
    facts = (run.scores or {}).get("facts", {})
    commands = list(dict.fromkeys([c for c in [run.facts.get("command"), *facts.get("commands", [])] if c]))
    block = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    rows = {
        "commit": facts.get("commit") or run.facts.get("commit"),
        "seed": run.config.get("seed"),
        "prompts": facts.get("prompts_source"),
        "noise seeds": ", ".join(map(str, (run.scores or {}).get("seeds", []))),
        "MLflow run": run.facts.get("mlflow_run_id"),
        "hardware": _hardware(facts),
        "versions": ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items()),
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in rows.items() if v not in (None, ""))
    return _section("Repeat it", "", f"{block}<dl>{listed}</dl>")


def _config(run: _Run) -> str:
    if not run.config:
        return ""
    text = escape(yaml.safe_dump(run.config, sort_keys=False))
    return _section(
        "Configuration", "", f"<details><summary>The whole resolved configuration</summary><pre>{text}</pre></details>"
    )


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p class=lead>{lead}</p>' if lead else ''}{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(
        f"<tr{' class=focus' if row[0] == 'aligned' else ''}>{''.join(_cell(c, i) for i, c in enumerate(row))}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str, column: int) -> str:
    mean, sign, half = text.partition(" ± ")
    dot = (
        f'<span class="dot" style="background:{MODEL_COLOURS[text]}"></span>'
        if column == 0 and text in MODEL_COLOURS
        else ""
    )
    return f"<td>{dot}{escape(mean)}{f' <small>± {escape(half)}</small>' if sign else ''}</td>"


def _image(path: Path, text: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _array(values: Sequence[float]) -> Any:
    import numpy as np

    return np.asarray(values, dtype=np.float64)
