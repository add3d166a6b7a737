"""The progress line and the summary, in a log and on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pipelines.report import console
from pipelines.report.console import Progress, clock, print_summary

METRICS = {"reward/gain": 1.0, "reward/raw": 21.5, "drs/ratio": 0.5, "loss/assistant": 0.2}


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    time, out = Clock(monkeypatch), io.StringIO()
    with Progress(200, stream=out, every=10.0) as progress:
        for step in range(1, 201):
            time.now += 0.5
            progress.update(step, METRICS)
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 13, "100 s of training"
    assert lines[-1].startswith("align 200/200") and "ETA 0:00" in lines[-1]
    assert "\x1b" not in out.getvalue() and all(len(line) < 200 for line in lines)
    for text in ("reward +1.00 sd", "21.5 raw", "DRS/matching 0.5", "TA loss 0.2", "0.50 s/step"):
        assert text in lines[3], text


def test_eta_counts_from_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    time, out = Clock(monkeypatch), io.StringIO()
    progress = Progress(200, stream=out, start=150)
    progress.update(151, METRICS)
    assert "ETA" not in progress.line(), "one step says nothing of the pace"
    time.now += 2.0
    progress.update(152, METRICS)
    assert "2.00 s/step" in progress.line() and "ETA 1:36" in progress.line()


def test_an_alarm_is_explained_once_and_named_while_it_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    out = io.StringIO()
    progress = Progress(10, stream=out, every=0.0)
    for step in range(1, 5):
        progress.update(step, METRICS, ["drs-silent"] if step in (2, 3) else [])
    text = out.getvalue()
    assert text.count("the reward is not heard") == 1 and "at step 2" in text
    assert [("ALARM drs-silent" in line) for line in text.splitlines() if line.startswith("align")] == [
        False,
        True,
        True,
        False,
    ]


def test_values_that_are_not_finite_are_left_out() -> None:
    progress = Progress(10, stream=io.StringIO())
    progress.update(1, METRICS)
    progress.update(2, METRICS | {"reward/gain": float("nan")})
    assert "reward +1.00 sd" in progress.line()


def test_phases_are_told_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    time, out = Clock(monkeypatch), io.StringIO()
    progress = Progress(10, stream=out)
    for done in range(5):
        time.now += 1.0
        progress.phase("scoring aligned", done, 256)
    progress.phase("exporting")
    assert out.getvalue().splitlines() == ["align  scoring aligned  0/256", "align  exporting"]


def test_a_terminal_gets_one_living_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    with Progress(3, stream=out) as progress:
        for step in range(1, 4):
            progress.update(step, METRICS)
        assert progress._live is not None
    assert "\x1b[" in out.getvalue()
    progress.close()


def test_summary_shows_models_wins_alarms_and_where_things_lie(tmp_path: Path) -> None:
    interval = {"mean": 0.8, "low": 0.7, "high": 0.9}
    scores = {
        "counts": {"prompts": 12, "seeds": 2},
        "measures": {"reward": {}, "strict": {}},
        "models": {n: {"steps": 1, "measures": {"reward": interval, "strict": interval}} for n in ("start", "aligned")},
        "pairs": [{"a": "aligned", "b": "start", "measures": {"reward": {"difference": interval, "wins": interval}}}],
    }
    (tmp_path / "report.html").write_text("")
    out = io.StringIO()
    steps = "60 steps: 20 of assistant warm-up, 40 generator updates"
    print_summary(scores, tmp_path, alarms=["drs-silent"], steps=steps, seconds=75, tracked="http://m/#/1", stream=out)
    text = out.getvalue()
    for part in (
        "12 held-out prompts x 2",
        "0.800 ± 0.100",
        "80.0 ± 10.0",
        "80.0 %",
        "drs-silent",
        f"{steps}; took 1:15",
        "report.html",
        "MLflow   http://m/#/1",
    ):
        assert part in text, part
    assert "export" not in text and "data wait" not in text, "it is not there"
    profile = {"steps": [4.0, 4.0], "first": 9.0, "cpu": 3.0, "rows": {"TA": 3.0, "data wait": 1.0}}
    print_summary(None, tmp_path, profile=profile, stream=out)
    told = [line.split() for line in out.getvalue().splitlines()]
    assert ["data", "wait", "1.0000", "25.0", "%"] in told and ["step", "4.0000", "100.0", "%"] in told


def test_clock() -> None:
    assert [clock(s) for s in (0, 75, 4000, float("inf"))] == ["0:00", "1:15", "1:06:40", "?"]


def test_brackets_are_not_read_as_colours() -> None:
    """A command that is shown is copied: `tracking.also=[tensorboard]` must not lose its list."""
    stream = io.StringIO()
    console.console(stream).print("--set tracking.also=[tensorboard] [/mnt/x]")
    assert stream.getvalue() == "--set tracking.also=[tensorboard] [/mnt/x]\n"
