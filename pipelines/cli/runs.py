"""`didr runs`: the runs in a folder, from what each wrote: whatever is damaged or missing is said in its place."""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from didr_core.config.files import mapping, read_yaml
from didr_core.evaluate.scores import JUDGES, describe, read_scores, win_matrix
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines.report.console import clock, console, rich_table

HEADER = ("run", "status", "step", "last news", "against the start", "alarms (steps)")


def show_runs(folder: Path) -> None:
    """Print the table, or where else to look."""
    found = [RunFolder(path.parent) for path in folder.glob("*/run.json")]
    if not found:
        raise DIDRError(
            f"{folder}: no runs there (folders with run.json in them). `didr align` makes one; or give another folder."
        )
    newest = sorted(found, key=_news, reverse=True)
    console(sys.stdout).print(rich_table(HEADER, [_row(run) for run in newest]))


def _news(run: RunFolder) -> float:
    """When the run last wrote something, in seconds of the epoch."""
    return max(path.stat().st_mtime for path in (run.path / "run.json", run.metrics_path) if path.is_file())


def _row(run: RunFolder) -> list[str]:
    cells = [run.path.name]
    for told in (_status, _step, _age, _scores, _alarms):
        try:
            cells.append(told(run))
        except DIDRError as error:
            cells.append(f"? {error}")
    return cells


def _status(run: RunFolder) -> str:
    """As ``run.json`` says, but where that is "running" and nobody works in the folder any more: killed, or a power cut."""
    said = str(run.info().get("status", "?"))
    if said == "running":
        with suppress(DIDRError), run.lock():
            return "interrupted"
    return said


def _step(run: RunFolder) -> str:
    path, rows = run.path / "config.yaml", read_lines(run.metrics_path)
    tree = mapping(path.read_bytes(), str(path), parse=read_yaml) if path.is_file() else {}
    return f"{rows[-1]['step'] if rows else 0}/{(tree.get('train') or {}).get('steps', '?')}"


def _age(run: RunFolder) -> str:
    return f"{clock(time.time() - _news(run))} ago"


def _scores(run: RunFolder) -> str:
    """What the aligned model wins of the start by the last judge that there is."""
    path = run.path / "scores.json"
    tree = read_scores(path) if path.is_file() else {"pairs": []}
    for name in JUDGES:
        if wins := win_matrix(tree, name).get("aligned", {}).get("start"):
            share, low, high = (f"{100 * wins[key]:.0f}" for key in ("mean", "low", "high"))
            return f"{describe(name).title}: wins {share} % ({low} to {high})"
    return ""


def _alarms(run: RunFolder) -> str:
    counts = Counter(row["alarm"] for row in read_lines(run.alarms_path))
    return ", ".join(f"{name} ({times})" for name, times in counts.items())
