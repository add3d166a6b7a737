"""Part "distill": the project's own learner takes the regression start to the bundled generator (recipe `tiny_distill`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from didr_core import config as configs
from didr_core.config import WORLD
from didr_core.preflight import preflight
from didr_core.runs import RunFolder
from didr_core.train import train


def build(folder: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Train `tiny_distill` into ``folder/distill`` (resumed where it stopped) and put its UNet into the world; returns where that is."""
    place = folder / "distill"
    config = configs.load("tiny_distill", ["evaluation.prompts=0", "workers.train=1", *overrides])
    index = preflight(config)
    run = RunFolder.find(str(place)) if (place / "config.yaml").is_file() else RunFolder.create(config, str(place))
    train(config, run, index)
    target = WORLD / "generator"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place / "export" / "unet", target)
    return target
