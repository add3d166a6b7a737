"""A toy recipe, and a sweep of it that is over."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import clip_folder
from toy import toy_recipe
from toy_sweep import STEPS, do, new

from pipelines.sweeps import work
from pipelines.sweeps.folder import SweepFolder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy recipe whose judge is another model than its reward."""
    folder = tmp_path_factory.mktemp("toy")
    judge = {"name": "pickscore", "path": str(clip_folder(folder / "judge", seed=7))}
    train_ = {"steps": STEPS, "batch": 4, "checkpoint_every": 2}
    return toy_recipe(folder, train=train_, judge=judge, evaluation={"grid": 2, "prompts": 6, "teacher_steps": 2})


@pytest.fixture(scope="module")
def swept(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """Two trials of two, done in this process."""
    tree = {"drp.beta": {"grid": [0.2, 0.9]}, "drp.steps": 1}
    folder = new(toy, tree, tmp_path_factory.mktemp("out"))
    assert work.prepare(folder) > 0
    for number in folder.points():
        do(folder, number)
    return folder
