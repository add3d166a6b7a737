"""Makes the control that recipe `tiny` shows: the same training without the reward, and its measures of held-out captions.

    python -m benchmarks.control --work /tmp/control     # writes didr_core/world/files/control.json, some two minutes on a CPU core

One worker. To be made again when anything changes that the control depends on: a run says so in place of the row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.trainings import train
from didr_core import config as configs
from didr_core.config import WORLD
from didr_core.evaluate.control import keep
from didr_core.evaluate.finish import heldout
from didr_core.evaluate.scores import Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WORLD / "control.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for the training")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    shown = configs.load(given.recipe).evaluation.prompts
    settings = [
        "algorithm=diff_instruct",
        f"seed={given.seed}",
        f"evaluation.prompts={shown}",
        "evaluation.teacher_steps=0",
        "evaluation.control=null",
        "tracking.uri=none",
    ]
    run = train(given.recipe, settings, given.work, f"control-seed{given.seed}").parent
    config = configs.load(given.recipe, settings)
    keep(Scores.read(run), config, heldout(config, shown), given.out, "python -m benchmarks.control")


if __name__ == "__main__":
    main()
