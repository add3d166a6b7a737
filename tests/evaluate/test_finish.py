"""The end of a run, where the networks are: what it leaves on the trainer, and what it leaves in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_recipe

from didr_core import config as configs
from didr_core.evaluate.finish import Gallery, finish
from didr_core.train.learner import Learner
from didr_core.train.run_folder import RunFolder


@pytest.mark.parametrize("work", ["grid", "end"])
def test_text_towers_are_gone_from_the_trainer_once_prompts_are_encoded(work: str, tmp_path: Path) -> None:
    config = configs.load(
        str(toy_recipe(tmp_path)),
        ["workers.train=1", "evaluation.grid=2", "evaluation.prompts=4", "evaluation.teacher_steps=2"],
    )
    learner, run = Learner(config), RunFolder.create(config, str(tmp_path / "run"))
    drawn: list[Any] = []

    def draw(*given: Any) -> None:
        drawn.append(given)

    if work == "grid":
        Gallery(learner, config, run, draw).after(1, learner.generator("ema"))
    else:
        finish(learner, config, run, draw=draw)
        (early, captions, path, title), whole = drawn
        assert list(whole[0]) == ["start", "aligned", "teacher"] and whole[1:] == (captions, path, title)
        for name, pictures in early.items():
            assert torch.allclose(whole[0][name], pictures, atol=1e-4), "scored from the grid's own prompts and noise"
        assert whole[0]["teacher"].shape == early["start"].shape
        assert (run.path / "scores.json").is_file() and (run.path / "export" / "README.md").is_file()
    assert drawn and learner.backbone._text is None  # type: ignore[attr-defined]
