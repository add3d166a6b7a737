"""Looks at held-out prompts during training: they change nothing, stand in the metrics, ring alarms, and stop a run that is told to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from didr_core import config as configs
from didr_core.evaluate.finish import looker, train_and_finish
from didr_core.evaluate.watch import against
from didr_core.networks import optim
from didr_core.plan.preflight import preflight
from didr_core.train.alarms import HACKING, Alarms
from didr_core.train.learner import Learner
from didr_core.train.loop import Look, outcome, train
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError

SETS = ["train.steps=4", "train.batch=8", "train.checkpoint_every=100", "evaluation.every=2", "tracking.uri=none"]


def begun(folder: Path, *sets: str) -> RunFolder:
    return RunFolder.create(configs.load("exact_2d", [*SETS, *sets]), str(folder))


def losing(learner: Learner) -> Look:
    """A look that finds backgrounds lost from step 2 on."""
    return lambda step, network: {"heldout/background_bits": -1.0, "heldout/reward": 0.1}


def test_an_alarm_stops_the_run_with_a_checkpoint_and_it_goes_on_when_told(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "alarms.on_alarm=stop", "alarms.away_from_reference=1000")
    index = preflight(run.config())
    with (
        pytest.raises(DIDRError, match=r"after step 2, with a checkpoint.* free-choice-lost: .*0.25 bits"),
        outcome(run),
    ):
        train(run.config(), run, index, look_of=losing)
    assert run.last_step() == 2 and run.info()["status"] == "failed"
    assert read_lines(run.alarms_path) == [{"step": 2, "alarm": "free-choice-lost"}]
    config = run.config(["alarms.on_alarm=warn"])
    with outcome(run):
        train(config, run, index, look_of=losing)
    assert run.last_step() == 4
    assert [row["step"] for row in read_lines(run.alarms_path)] == [2, 3, 4]


def test_an_alarm_that_is_no_damage_stops_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "alarms.on_alarm=stop", "alarms.away_from_reference=1000")
    with outcome(run):
        train(run.config(), run, preflight(run.config()), look_of=lambda learner: lambda *_: {"heldout/judge": -9.0})
    assert not read_lines(run.alarms_path), "the reward fell with it"
    run = begun(tmp_path / "still", "alarms.on_alarm=stop", "alarms.away_from_reference=1000", "generator.eps=1e9")
    with outcome(run):
        train(run.config(), run, preflight(run.config()), look_of=lambda learner: lambda *_: {})
    assert [row["alarm"] for row in read_lines(run.alarms_path)] == ["weights-still"] * 3
    assert run.last_step() == 4


def test_looks_change_nothing_and_stand_in_the_metrics(tmp_path: Path) -> None:
    weights = []
    for every in (0, 2):
        run = begun(tmp_path / str(every), f"evaluation.every={every}", "evaluation.prompts=8", "evaluation.grid=2")
        with outcome(run):
            train_and_finish(run.config(), run, preflight(run.config()))
        weights.append((run.checkpoint(4) / "generator.0.safetensors").read_bytes())
    assert weights[0] == weights[1]
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    looked = {key for key in rows[1] if key.startswith("heldout/")}
    assert looked == {"heldout/reward", "heldout/diversity", "heldout/saturation"} and "adam/below_eps" in rows[1]
    assert not looked & rows[0].keys() and looked <= rows[3].keys()


def test_the_start_differs_from_itself_by_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    learner = Learner(run.config())
    found = looker(learner, run.config(), run)(0, learner.generator("start"))
    assert found == {"heldout/reward": 0, "heldout/diversity": 1, "heldout/saturation": 0}


def test_weights_below_eps_are_counted() -> None:
    network = nn.Linear(3, 1, bias=False)
    for made in (torch.optim.AdamW, optim.StochasticAdamW):
        optimizer = made(network.parameters(), lr=0.1, betas=(0.0, 0.99), eps=1e-3)
        assert optim.below_eps(optimizer) == 0
        for _ in range(3):
            network.weight.grad = torch.tensor([[1e-4, 2e-3, 5e-4]])  # of size, so sqrt(v), of the gradient
            optimizer.step()
        assert optim.below_eps(optimizer) == pytest.approx(2 / 3)


CURVES = json.loads((Path(__file__).parent / "recorded_curves.json").read_text())
"""What alarms read of real runs, by step (`python -m benchmarks.alarms --curves`)."""


def heard(run: str) -> tuple[dict[str, int], int]:
    """The first step of each alarm, and how many steps there are."""
    columns, alarms, first = CURVES[run], Alarms(), dict[str, int]()
    steps = len(next(iter(columns.values())))
    for step in range(steps):
        seen = {name: values[step] for name, values in columns.items() if values[step] is not None}
        for name in alarms.update(seen):
            first.setdefault(name, step + 1)
    return first, steps


def test_hacking_is_heard_within_the_first_third() -> None:
    """Where the bundled world's judge and utility both rise to the end: what is lost is what captions leave free."""
    first, steps = heard("tiny_hacked-0")
    assert {name for name, step in first.items() if step <= steps / 3} == {
        HACKING,
        "free-choice-lost",
        "diversity-falls",
    }
    assert min(CURVES["tiny_hacked-0"]["heldout/judge"][9::10]) > 0.5


def test_the_default_recipe_rings_where_its_table_shows_a_loss_alone() -> None:
    """Seeds 0, 1 and 2. The third's table of 256 captions: free backgrounds 0.17 bits (0.05 to 0.32) less at the end."""
    assert heard("tiny-0")[0] == heard("tiny-1")[0] == {}
    assert heard("tiny-2")[0] == {HACKING: 57, "too-predictable": 57}


def test_a_loss_that_the_table_shows_rings_and_not_before_it_is_there() -> None:
    """Seed 0 without the anchor, on 2026-11-27: free backgrounds 1.95 bits at the start, 0.97 at the end."""
    first, _ = heard("unanchored-0")
    lost = CURVES["unanchored-0"]["heldout/background_bits"]
    assert lost[39] > -0.2 > -0.5 > lost[49] > lost[59], "what the looks found at steps 40, 50, 60"
    assert first == {"free-choice-lost": 50, HACKING: 56, "diversity-falls": 60}


def test_a_small_loss_rings_at_the_end_alone() -> None:
    """Seed 1 of it: by the table of 256 captions 0.21 bits (0.09 to 0.34) less at the end."""
    assert CURVES["unanchored-1"]["heldout/background_bits"][49] > -0.1
    assert heard("unanchored-1")[0] == {HACKING: 60, "free-choice-lost": 60}


def test_what_no_watched_prompt_leaves_free_is_not_watched() -> None:
    """Not a number would ring `not-finite` at every look."""
    plain = {name: np.ones((1, 2, 3)) for name in ("diversity", "saturation")}
    named = {**plain, "background_code": np.full((1, 2, 3), -1)}
    free = {**plain, "background_code": np.arange(6).reshape(1, 2, 3)}
    assert against(named, named) == {"heldout/diversity": 1.0, "heldout/saturation": 0.0}
    assert against(free, free)["heldout/background_bits"] == 0.0
