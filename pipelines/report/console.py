"""What a user watches: one live progress line on a terminal, one plain line every few seconds in a log, a summary table at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from didr_core.config.limits import Limits
from didr_core.evaluate.scores import comparison_table, laws_table, table
from didr_core.train.alarms import LOOKED, explain
from didr_core.train.profile import table as profile_table

SMOOTHING = 0.9  # of the numbers shown; the curves in the report are raw
SHOWN = {
    "drs/ratio": "DRS/matching {:.3g}",
    "loss/assistant": "TA loss {:.3g}",
    "heldout/judge": "held-out judge {:+.2f} sd",
    "heldout/background_bits": "free backgrounds {:+.2f} bits",
}
"""Metrics of the progress line, behind the reward."""


class Progress:
    """Step, reward, DRS ratio, TA loss, alarms, pace and ETA of a run.

    Args:
        total: steps of the run. start: steps that were done before (resume).
        every: seconds between lines where there is no terminal.
        stream: where to write; stderr by default, so that stdout stays for results.
        limits: of the run's alarms, for their sentences.
    """

    def __init__(
        self,
        total: int,
        *,
        title: str = "align",
        start: int = 0,
        every: float = 10.0,
        stream: TextIO | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.total, self.title, self.step, self.every, self.limits = total, title, start, every, limits
        self.console = console(stream)
        self._values: dict[str, float] = {}
        self._alarms: tuple[str, ...] = ()
        self._told: set[str] = set()
        self._pace: float | None = None
        self._last_time: float | None = None
        self._last_line = -math.inf
        self._phase = ""
        self._live = (
            Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, float], alarms: Sequence[str] = ()) -> None:
        """One finished step."""
        now = time.monotonic()
        if self._last_time is not None and step > self.step:
            pace = (now - self._last_time) / (step - self.step)
            self._pace = pace if self._pace is None else SMOOTHING * self._pace + (1 - SMOOTHING) * pace
        self._last_time, self.step, self._phase = now, step, ""
        for key, value in metrics.items():
            if math.isfinite(value):
                old = value if key.startswith(LOOKED) else self._values.get(key, value)
                self._values[key] = SMOOTHING * old + (1 - SMOOTHING) * value
        self._alarms = tuple(alarms)
        for name in alarms:
            if name not in self._told:
                self._told.add(name)
                self.note(f"alarm {name} at step {step}: {explain(name, self.limits)}", style="yellow")
        self._show(force=step >= self.total)

    def phase(self, name: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
        """What happens before and after the steps: "starting", "scoring aligned", ...; ``left``: seconds to its end."""
        changed = name != self._phase
        self._phase = name
        self._show(force=changed, done=done, total=total, left=left)

    def note(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        """End the live line; safe to call twice."""
        if self._live:
            self._live.stop()
            self._live = None

    def line(self) -> str:
        """The line as text."""
        parts = [f"{self.title} {self.step}/{self.total}"]
        if "reward/gain" in self._values:
            raw = f" ({self._values['reward/raw']:.4g} raw)" if "reward/raw" in self._values else ""
            parts.append(f"reward {self._values['reward/gain']:+.2f} sd{raw}")
        parts += [form.format(self._values[key]) for key, form in SHOWN.items() if key in self._values]
        if self._pace is not None:
            parts += [f"{self._pace:.2f} s/step", f"ETA {clock((self.total - self.step) * self._pace)}"]
        if self._alarms:
            parts.append("ALARM " + ", ".join(self._alarms))
        return "  ".join(parts)

    def _show(self, force: bool, done: int = 0, total: int = 0, left: float | None = None) -> None:
        text = (
            self.line() if not self._phase else f"{self.title}  {self._phase}" + (f"  {done}/{total}" if total else "")
        )
        text += "" if left is None else f"  ETA {clock(left)}"
        if self._live:
            share, whole = (done, total) if self._phase else (self.step, self.total)
            self._live.update(self._render(text, share, whole))
        elif force or time.monotonic() - self._last_line >= self.every:
            self._last_line = time.monotonic()
            self.console.print(Text(text), soft_wrap=True)

    def _render(self, text: str, done: int, total: int) -> Table:
        row = Table.grid(padding=(0, 1), expand=False)
        bar = ProgressBar(total=max(total, 1), completed=done, width=20)
        row.add_row(bar, Text(text, style="yellow" if self._alarms else "", overflow="fold"))
        return row


def clock(seconds: float) -> str:
    """``75 -> "1:15"``, ``4000 -> "1:06:40"``."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def console(stream: TextIO | None = None) -> Console:
    """A console that never wraps a log's lines at 80 characters."""
    given: dict[str, Any] = {"file": stream or sys.stderr, "highlight": False, "markup": False}
    made = Console(**given)
    return made if made.is_terminal else Console(**given, width=200, color_system=None)


def warn(text: str) -> None:
    """A line of its own, for what may not be meant."""
    console().print(Text(f"note: {text}", style="yellow"), soft_wrap=True)


def print_summary(
    scores: Mapping[str, Any] | None,
    run: Path,
    *,
    alarms: Sequence[str] = (),
    steps: str = "",
    seconds: float | None = None,
    tracked: str = "",
    profile: Mapping[str, Any] | None = None,
    focus: str = "aligned",
    stream: TextIO | None = None,
    limits: Limits | None = None,
) -> None:
    """The models side by side, what the aligned one (``focus``) wins, alarms, how long it took, and where the results lie.

    Args:
        steps: how many of which kind, see :func:`pipelines.report.page.steps_told`.
        tracked: where MLflow shows the run.
        profile: where the time of a step went, see :meth:`didr_core.train.profile.Profile.summary`.
    """
    out = console(stream)
    if profile:
        count, cpu, first = len(profile["steps"]), profile["cpu"], profile["first"]
        out.print(f"\nmean of {count} steps, {cpu:.4f} CPU s of the process each; the first took {first:.1f} s")
        out.print(rich_table(*profile_table(profile), bold="step"))
    if scores:
        counts = scores["counts"]
        seeds = f"{counts['seeds']} noise seed{'s' if counts['seeds'] > 1 else ''}"
        out.print(f"\n{counts['prompts']} held-out prompts x {seeds}, ± half the 95 % interval")
        out.print(rich_table(*table(scores), bold=focus))
        if told := scores.get("facts", {}).get("control"):
            out.print(Text(told), soft_wrap=True)
        judged = [m for m in scores["measures"] if m in ("judge", "utility") or m.startswith("reward")]
        header, rows = comparison_table(scores, focus, judged)
        if rows:
            out.print(f"\n{focus} against the others, prompt by prompt")
            out.print(rich_table(header, rows))
        header, rows = laws_table(scores)
        if rows:
            out.print(
                f"\n{counts['pictures_per_model']} pictures a model as a set, features of {scores['laws']['features']}"
            )
            out.print(rich_table(header, rows))
    for name in alarms:
        out.print(Text(f"alarm {name}: {explain(name, limits)}", style="yellow"), soft_wrap=True)
    if seconds is not None:
        out.print(f"\n{steps + '; ' if steps else ''}took {clock(seconds)}")
    for label, name in (
        ("report", "report.html"),
        ("pictures", "grid.png"),
        ("export", "export"),
        ("scores", "scores.json"),
    ):
        if (Path(run) / name).exists():
            out.print(Text(f"{label:<9}{Path(run) / name}"), soft_wrap=True)
    if tracked:
        out.print(Text(f"{'MLflow':<9}{tracked}"), soft_wrap=True)


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], bold: str = "aligned") -> Table:
    """Header and rows of text as a plain table; the row that starts with ``bold`` stands out."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row, style="bold" if row[0] == bold else "")
    return made
