"""The kept control stands in the table as one trained beside the run would; where it is no control it is left out, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from didr_core import config as configs
from didr_core.evaluate import control
from didr_core.evaluate.finish import heldout
from didr_core.evaluate.scores import Scores
from didr_core.plan.preflight import preflight
from didr_core.types import DIDRError

PROMPTS = [f"prompt {n}" for n in range(6)]


def scored(seeds: tuple[int, ...] = (0,), prompts: list[str] = PROMPTS, **shift: float) -> Scores:
    """Scores of models by name, each ``shift`` above the start, on the same noise."""
    shape = (1, len(seeds), len(prompts))
    start = np.random.default_rng(0).normal(size=shape)
    arrays = {
        name: {"reward": start + by, "strict": start > 0, "clipped": start, "background_code": np.arange(start.size).reshape(shape) % 2}
        for name, by in shift.items()
    }  # fmt: skip
    models = {name: {"steps": 1, "guidance": None, "seconds": 1.0} for name in shift}
    return Scores.build(models, arrays, prompts, seeds, facts={"date": "then"}, world="tiny")


def config(*sets: str, path: Path | None = None) -> Any:
    named = [f"evaluation.control={path}"] if path else []
    return configs.load("tiny", ["train.steps=30", *named, *sets])


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "control.json"
    run = scored(seeds=(0, 1), start=0, aligned=0.3)
    control.keep(run, config("algorithm=diff_instruct", "seed=7", "workers.train=1"), PROMPTS, path, "make it")
    return path


def test_a_kept_control_is_compared_prompt_by_prompt(kept: Path) -> None:
    beside = scored(start=0, control=0.3, aligned=1.0)
    shown = control.with_control(scored(start=0, aligned=1.0), config("seed=3", path=kept), PROMPTS)
    assert list(shown.tree["models"]) == ["start", "control", "aligned"]
    row = shown.tree["models"]["control"]
    assert row["seed"] == 7 and row["steps"] == 1
    expected = beside.tree["models"]["control"]["measures"]
    assert row["measures"] == {
        k: pytest.approx(expected[k], abs=1e-3) for k in ("reward", "strict", "background_entropy")
    }
    pair = next(p for p in shown.tree["pairs"] if (p["a"], p["b"]) == ("aligned", "control"))
    won = pair["measures"]["reward"]
    assert won["wins"]["mean"] == 1 and won["difference"]["mean"] == pytest.approx(0.7, abs=1e-3)
    assert shown.tree["facts"] == {
        "date": "then",
        "control": "the control was trained once before, with training seed 7 (make it), not in this run",
    }
    few = control.with_control(scored(prompts=PROMPTS[:4], start=0, aligned=1.0), config(path=kept), PROMPTS[:4])
    assert few.arrays["control"]["reward"] == pytest.approx(beside.arrays["control"]["reward"][:, :, :4], abs=1e-4)


@pytest.mark.parametrize(
    ("sets", "prompts", "seeds", "why"),
    [
        (["generator.lr=1e-4"], PROMPTS, (0,), "generator.lr is 0.0001 here and 5e-05 in "),
        (["train.steps=31"], PROMPTS, (0,), "train.steps is 31 here and 30 in "),
        (["judge=null"], PROMPTS, (0,), "judge.name is None here"),
        (["algorithm=diff_instruct"], PROMPTS, (0,), "diff_instruct uses no reward"),
        ([], [*PROMPTS, "one more"], (0,), "other held-out prompts, or more of them, than the 6"),
        ([], PROMPTS[::-1], (0,), "other held-out prompts"),
        ([], PROMPTS, (2,), r"noise seeds \[2\] are not in"),
    ],
)
def test_what_is_no_control_is_left_out(
    kept: Path, sets: list[str], prompts: list[str], seeds: tuple[int, ...], why: str
) -> None:
    run = scored(seeds=seeds, prompts=prompts, start=0, aligned=1.0)
    shown = control.with_control(run, config(*sets, path=kept), prompts)
    assert shown.arrays is run.arrays and "control" not in shown.tree["models"]
    with pytest.raises(AssertionError, match=f"no control is shown: {why}"):
        raise AssertionError(shown.tree["facts"]["control"])


def test_a_run_s_own_control_is_kept_as_it_is(kept: Path) -> None:
    run = scored(start=0, control=0.1, aligned=1.0)
    assert control.with_control(run, config(path=kept), PROMPTS) is run
    assert control.with_control(run, config("evaluation.control=null"), PROMPTS) is run


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match="no such file. Expected a run's folder"):
        preflight(configs.load("tiny", [f"evaluation.control={tmp_path}/none.json"]))
    (path := tmp_path / "c.json").write_text('{"seed": 0}')
    with pytest.raises(DIDRError, match="has no measures, model, prompts, seeds, settings"):
        preflight(configs.load("tiny", [f"evaluation.control={path}"]))


def test_the_bundled_control_is_one_of_the_demo_and_of_other_seeds_of_it() -> None:
    for sets in (
        [],
        ["seed=5", "workers.train=1", "drp.beta=0.5", "evaluation.prompts=64", "train.checkpoint_every=7"],
    ):
        demo = configs.load("tiny", sets)
        assert demo.evaluation.control == "world://control.json"
        prompts = heldout(demo, demo.evaluation.prompts)
        shown = control.with_control(scored(prompts=prompts, start=0, aligned=1.0), demo, prompts)
        assert "with training seed 0 (python -m benchmarks.control)" in shown.tree["facts"]["control"]
        measures = shown.tree["models"]["control"]["measures"]
        assert measures.keys() == {"reward", "judge", "utility", "strict", "background_entropy", "position_entropy"}
    assert len(json.dumps(control.read("world://control.json"))) < 2**16
