"""Where a step's time goes: each moment counts once, the rows add up to the step, and the run is the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import toy_recipe

from didr_core import config as configs
from didr_core.data.prompts import PromptIndex
from didr_core.train import profile
from didr_core.train.loop import outcome, train
from didr_core.train.run_folder import RunFolder


def test_each_moment_counts_for_the_innermost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now)
    measured = profile.Profile()
    with measured("decoder"):  # outside of a step: a grid
        now += 100
    for _ in range(2):  # the first step is told apart
        with measured("step"):
            now += 1
            with measured("generator update"):
                now += 2
                with measured("proxy"):
                    now += 4
                    with measured("reward"):
                        now += 8
                    now += 16
                with measured("reference"):  # has no row: the generator's
                    now += 32
            with measured("report"):
                now += 64
        now += 1000
    monkeypatch.undo()
    told = measured.summary()
    expected = {"other": 1, "generator": 34, "proxy": 20, "reward": 8, "report": 64}
    assert {name: s for name, s in told["rows"].items() if s} == expected
    assert told["steps"] == [127.0] and told["first"] == 127.0
    header, rows = profile.table(told)
    assert len(header) == 3 and rows[-1] == ["step", "127.0000", "100.0 %"] and ["proxy", "20.0000", "15.7 %"] in rows


def test_a_profiled_run_is_the_same_run(tmp_path: Path) -> None:
    config = configs.load(str(toy_recipe(tmp_path)), ["train.steps=3", "train.checkpoint_every=100", "workers.train=1"])
    weights = {}
    for name, asked in (("plain", False), ("profiled", True)):
        run = RunFolder.create(config, str(tmp_path / name))
        with outcome(run):
            learner = train(config, run, PromptIndex.open(config.data.prompts), profile=asked)
        weights[name] = list(learner.generator_net.state_dict().values())
        assert run.profile_path.is_file() == asked
    assert all(torch.equal(a, b) for a, b in zip(weights["plain"], weights["profiled"], strict=True))
    told = json.loads(run.profile_path.read_text())
    assert len(told["steps"]) == 2 and told["first"] > 0 and told["cpu"] > 0
    assert sum(told["rows"].values()) == pytest.approx(sum(told["steps"]) / 2, rel=1e-9)
    assert all(told["rows"].values())
    assert told["rows"]["TA"] > told["rows"]["report"]
