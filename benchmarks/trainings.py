"""Trainings that a benchmark starts: one process each, resumed where an earlier call stopped."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def train(recipe: str, settings: Sequence[str], work: Path, name: str) -> Path:
    """Train ``recipe`` with ``settings`` (`key=value`) in ``work/name`` by `didr_core.train.loop`, log beside it; returns the export.

    What is finished is not done again. One worker, and no scoring of its own: the benchmark does that.
    """
    folder = work / name
    if (folder / "export" / "model_index.json").is_file():
        return folder / "export"
    command = [sys.executable, "-m", "didr_core.train"]
    if (folder / "config.yaml").is_file():
        command += ["--resume", str(folder)]
    else:
        command += ["--recipe", recipe, "--output", str(folder)]
        for setting in ("workers.train=1", "evaluation.prompts=0", "evaluation.every=0", *settings):
            command += ["--set", setting]
    began = time.time()
    with (work / f"{name}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    print(f"{name}: trained in {time.time() - began:.0f} s", flush=True)
    return folder / "export"
