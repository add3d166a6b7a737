"""A sweep's options: what is left open, what older sweeps wrote down, what they ask of a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from didr_core import config as configs
from pipelines.cli.main import main
from pipelines.cluster.resources import ClusterView, Node
from pipelines.sweeps import budget
from pipelines.sweeps.folder import SweepFolder, SweepOptions


def test_options_that_are_left_out_are_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("pipelines.sweep.sweep", lambda options, **rest: seen.append((options, rest)))
    for words in ([], ["--trials", "5", "--set", "drp.beta=1", "--output", "there", "--search", "random"]):
        with pytest.raises(SystemExit) as done:
            main(["sweep", *words])
        assert not done.value.code
    (bare, _), (said, rest) = seen
    assert replace(bare, command="") == SweepOptions()
    assert said == SweepOptions(trials=5, overrides=["drp.beta=1"], search="random", command=said.command)
    assert rest["output"] == "there" and rest["resume"] is None


def test_an_older_sweep_json_is_still_read(tmp_path: Path) -> None:
    """Its plan as version 0.1 wrote it, with every choice made."""
    plan = {"name": "s", "recipe": "tiny", "overrides": ["train.steps=6"], "space": "smoke", "about": "", "tree": {}}
    plan |= {"search": "grid", "scheduler": "none", "trials": 2, "concurrent": 1, "workers": 1, "seed": 0}
    plan |= {"patience": 30.0, "command": "didr sweep", "facts": {"didr": "0.1.0"}}
    (tmp_path / "sweep.json").write_text(json.dumps({"plan": plan, "status": "running", "started": 1.0, "asked": 0}))
    options = SweepFolder.find(str(tmp_path)).options()
    assert (options.name, options.trials, options.overrides) == ("s", 2, ["train.steps=6"])


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.sweep.sweep", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--space", "smoke"])
    assert stopped.value.code == 130
    assert "`didr sweep --resume NAME`" in capsys.readouterr().err


def test_a_trials_plan_counts_the_actors_that_score_a_black_box() -> None:
    view = ClusterView((Node("one", {"CPU": 64.0}),))
    names = [g.name for g in budget.sweep_demands(configs.load("tiny_blackbox"), view, 2, 3).groups]
    assert "scoring actor of a trial" in names
    assert "scoring actor of a trial" not in [
        g.name for g in budget.sweep_demands(configs.load("tiny"), view, 2, 3).groups
    ]
    ranged = configs.load("tiny", ["reward.placement=actors", "reward.actors.count=[1,4]"])
    assert budget.sweep_demands(ranged, view, 1, 3).groups[-1].count == 3 * 4, "no pool grows into another trial's room"
