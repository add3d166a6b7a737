"""The end of a sweep: front and recommendation, table, files, figures."""

from __future__ import annotations

import io
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from toy_sweep import STEPS

from didr_core import config as configs
from pipelines import sweep
from pipelines.sweeps import figures, results
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.monitor import SweepMonitor

pytestmark = pytest.mark.slow


def trial(number: int, gain: float, distance: float, **more: Any) -> dict[str, Any]:
    score = round(gain - (distance - 1), 6)
    return {
        "number": number,
        "status": "finished",
        "set": {},
        "gain": gain,
        "distance": distance,
        "start_distance": 1.0,
        "score": score,
        "alarms": [],
        **more,
    }


def test_front_and_recommendation_by_hand() -> None:
    failed = {"number": 9, "status": "failed", "reason": "NaN", "set": {}}
    rows = [trial(0, 0.1, 0.9), trial(1, 0.5, 1.2), trial(2, 0.4, 1.3), trial(3, 2.0, 6.0), failed]
    assert results.front_of(rows) == [3, 1, 0]  # 2 is beaten by 1
    chosen, why = results.recommend(rows)
    assert chosen == 1 and "+0.300" in why  # not the one with the most reward
    rows[1]["alarms"] = ["reward-hacking"]
    chosen, why = results.recommend(rows)
    assert chosen == 0 and "(trial 0001 scored higher and ended with the alarm" in why
    assert results.recommend([failed]) == (None, "no trial ran to its end")
    assert "not above 0" in results.recommend([trial(0, 0.1, 1.5)])[1]


def test_what_a_sweep_leaves(swept: SweepFolder, tmp_path: Path) -> None:
    found = [*swept.results(), {"number": 7, "set": {"drp.beta": 9.0}, "status": "failed", "reason": "NaN", "step": 1}]
    chosen, why = results.recommend(found)
    results.write_table(swept, found, chosen)
    rows = pq.read_table(swept.path / "trials.parquet").to_pylist()
    assert [r["number"] for r in rows] == [0, 1, 7] and sum(r["recommended"] for r in rows) == 1
    assert rows[2]["reason"] == "NaN" and rows[2]["gain"] is None and rows[0]["measure.judge"] is not None
    tree = results.front_tree(swept, found, chosen, why)
    swept.write("front.json", tree)
    tree = json.loads((swept.path / "front.json").read_text())
    assert tree["trials"] == {"planned": 2, "failed": 1, "finished": 2}
    assert tree["recommended"]["number"] == chosen and "held-out judge" in tree["objectives"]["gain"]
    assert "2-step guided reference" in tree["objectives"]["distance"]
    words = tree["align_longer"].split()
    pairs = [w for flag, w in pairwise(words) if flag == "--set"]
    again = configs.load(words[words.index("--recipe") + 1], pairs)  # the command is one that works
    assert (again.drp.beta, again.train.steps) == (swept.points()[chosen]["drp.beta"], 3 * STEPS)
    header, lines = results.table(swept, found, chosen)
    assert header[:2] == ["trial", "drp.beta"] and "recommended" in lines[0][-1] and "failed" in lines[-1][-1]


def test_a_trial_has_the_number_of_its_folder_everywhere(swept: SweepFolder) -> None:
    found = swept.results()
    chosen, why = results.recommend(found)
    name = next(p.name for p in (swept.path / "trials").iterdir() if int(p.name) == chosen)
    assert results.table(swept, found, chosen)[1][0][0] == name
    assert f"recommended: trial {name} (beta" in results.summary(swept, chosen, why)[0]
    assert SweepMonitor(swept, "none").name_of(chosen) == f"trial {name} (beta {swept.points()[chosen]['drp.beta']})"


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_at_the_end_fits_the_terminal(
    swept: SweepFolder, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number and no mark is broken over lines; what there is no room for is in trials.parquet."""
    seen = io.StringIO()
    monkeypatch.setattr(sweep, "console", lambda: Console(file=seen, width=columns))
    point = {"drp.beta": 0.2134, "drp.steps": 4, "drp.estimator": "stochastic"}
    spread = {"gain_low": 0.4, "gain_high": 0.56, "distance_low": 0.2, "distance_high": 0.222, "seconds": 1.0}
    rows = [trial(i, 0.5234 - i / 9, 0.2109, set=point, measures={"judge": 1.2345}, **spread) for i in range(2)]
    monkeypatch.setattr(SweepFolder, "results", lambda folder: rows)
    sweep._say(swept, time.monotonic())
    lines = seen.getvalue().splitlines()
    first = next(line for line in lines if line.startswith("0000"))
    assert "+0.523 ± 0.08" in first and "0.211 ± 0.011" in first and "+1.312" in first
    assert first.rstrip().endswith("recommended") and ("1.234" in first) == (columns == 200)


@pytest.mark.parametrize("keys", [("drp.beta", "drp.steps"), ("drp.beta", "drp.estimator"), ("guidance.reference",)])
def test_figures_of_any_space(keys: tuple[str, ...], tmp_path: Path) -> None:
    values = {
        "drp.beta": [0.05, 0.1, 0.3, 0.9, 0.2, 0.5, 0.7],
        "drp.steps": [1, 2, 4, 8] * 2,
        "guidance.reference": range(1, 8),
    }
    values["drp.estimator"] = ["ode", "truncated"] * 4
    rows = [trial(i, 0.1 * i, 1 + 0.02 * i * i, set={k: values[k][i] for k in keys}) for i in range(7)]
    drawn = figures.save_front(rows, 2, tmp_path / "front.png", gain="gain (sd)", distance="distance")
    assert drawn.stat().st_size > 10_000
    heat = figures.save_heat(rows, tmp_path / "heat.png")
    assert (heat is not None) == (len(keys) == 2)
    with pytest.raises(ValueError, match="no judged trial"):
        figures.save_front([], None, tmp_path / "x.png", gain="", distance="")
