"""A whole sweep through Ray Tune: a diverging trial, the driver killed with SIGKILL in the middle, resumed; and what is left after it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from random_models import clip_folder
from toy import toy_recipe

from benchmarks.sweep_soak import Soaked, _incomplete, _mlflow_faults
from didr_core.train.run_folder import read_lines
from pipelines.sweeps.folder import SweepFolder

STEPS = 8
SPACE = '''
def space():
    """Two learning rates that train, one that cannot."""
    return {"generator.lr": {"grid": [1e-3, 2e-3, 1e30]}, "drp.estimator": "ode", "drp.steps": 2}
'''

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def wait_until(what: str, true: object, driver: Soaked, seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert driver.process.poll() is None, f"the driver ended before: {what}\n{driver.log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_killed_and_resumed(tmp_path: Path) -> None:
    train = {"steps": STEPS, "batch": 4, "checkpoint_every": 2}
    judge = {"name": "pickscore", "path": str(clip_folder(tmp_path / "judge", seed=7))}
    recipe = toy_recipe(tmp_path, train=train, judge=judge, evaluation={"grid": 2, "prompts": 6}, tracking={"uri": ""})
    (tmp_path / "rates.py").write_text(SPACE)
    folder = SweepFolder(tmp_path / "out" / "s")
    base = [sys.executable, "-m", "pipelines.sweep"]
    begin = [
        "--recipe",
        str(recipe),
        "--space",
        str(tmp_path / "rates.py"),
        "--name",
        "s",
        "--output",
        str(tmp_path / "out"),
    ]

    def halfway() -> bool:
        """One trial is over, another one has a checkpoint and is not."""
        if not (folder.path / "sweep.json").is_file():
            return False
        over = [n for n in folder.points() if folder.result(n)]
        return bool(over) and any(folder.trial(n).last_step() for n in folder.points() if n not in over)

    with Soaked([*base, *begin, "--concurrent", "1"], tmp_path / "log") as driver:
        wait_until("one trial over and another one under way", halfway, driver)
        driver.process.kill()
        driver.process.wait()
        assert driver.orphans() == []
        dead = time.time()  # a trial's process may take a few more steps before it sees that its driver is gone
    points = folder.points()
    over = {n: (folder.trial(n).path / "result.json").stat().st_mtime for n in points if folder.result(n)}
    reached = {n: folder.trial(n).last_step() for n in points if n not in over}
    assert folder.info()["status"] == "running"
    with Soaked([*base, "--resume", str(folder.path)], tmp_path / "log") as driver:
        code = driver.wait(1200)
        assert code == 0, driver.log.read_text()[-3000:]
        assert driver.orphans() == []

    assert folder.points() == points
    assert _incomplete(folder, 3) == []
    assert _mlflow_faults(folder, 3) == []
    for number, when in over.items():
        assert (folder.trial(number).path / "result.json").stat().st_mtime == when, "a finished trial was done again"
    for number, step in reached.items():
        rows = read_lines(folder.trial(number).metrics_path)
        kept = [row for row in rows if row["step"] <= step]
        assert len(kept) == step and all(row["time"] < dead for row in kept), "it went on from its checkpoint"
    failed = [r for r in folder.results() if r["status"] == "failed"]
    assert [r["set"]["generator.lr"] for r in failed] == [1e30] and "non-finite" in failed[0]["reason"]
    rows = pq.read_table(folder.path / "trials.parquet").to_pylist()
    assert sorted(r["status"] for r in rows) == ["failed", "finished", "finished"]
    front = json.loads((folder.path / "front.json").read_text())
    assert front["recommended"]["number"] not in [r["number"] for r in failed]
    assert (folder.path / "export" / "model_index.json").is_file() and (folder.path / "front.png").is_file()
    said = driver.log.read_text()
    assert "align longer with it:  didr align --recipe" in said and "failed: step" in said
    assert "Traceback" not in said
