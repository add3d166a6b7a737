"""Which alarms ring, and when: on the default recipe over training seeds, and on a reward without a matching term.

    python -m benchmarks.alarms --seeds 0 1 2 3 4 5 6 7 8 9 --work /tmp/alarms    # some two minutes a run, one worker each

Writes results/alarms.md: beside each run's alarms, what its table of 256 held-out captions says of the same losses. An alarm is right where
the table shows the loss. With `--curves` it writes tests/train/recorded_curves.json, too: all that alarms read of the first three runs and
of the first hacked one. Other runs in that file stay: `unanchored-0` and `-1` are the default recipe with `train.anchor=null`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.trainings import train
from didr_core import config as configs
from didr_core.evaluate.scores import read_scores
from didr_core.export.card import markdown
from didr_core.train.alarms import LOOKED, Alarms
from didr_core.train.run_folder import RunFolder, read_lines

HERE = Path(__file__).parent
CURVES = HERE.parent / "tests" / "train" / "recorded_curves.json"
STEPS = ("reward/gain", "latent/mean", "latent/std", "image/clipped", "drs/ratio", "drs/cosine", "drs/clipped")
READ = (*STEPS, "loss/assistant", "grad/generator")
HEADER = [
    "run",
    "steps",
    "alarms (first step)",
    "judge",
    "utility",
    "strict accuracy",
    "diversity",
    "free background, bits",
]
MEASURES = ("judge", "utility", "strict", "background_entropy")


def row(folder: Path) -> list[str]:
    """A run's alarms by their first step, as the thresholds of now hear them; and aligned against start in its table."""
    run = RunFolder(folder)
    history = read_lines(run.metrics_path)
    alarms, first = Alarms(), dict[str, int]()
    for line in history:
        for name in alarms.update({k: v for k, v in line.items() if k != "step" and not k.startswith("time/")}):
            first.setdefault(name, line["step"])
    tree = read_scores(folder / "scores.json")
    pair = next(p["measures"] for p in tree["pairs"] if (p["a"], p["b"]) == ("aligned", "start"))
    told = {name: _difference(pair[name]["difference"]) for name in MEASURES}
    looked = [line["heldout/diversity"] for line in history if "heldout/diversity" in line]
    rung = ", ".join(f"{name} ({step})" for name, step in first.items()) or "none"
    cells = [told["judge"], told["utility"], told["strict"], f"x {looked[-1]:.2f}", told["background_entropy"]]
    return [folder.name, str(len(history)), rung, *cells]


def _difference(entry: dict[str, float]) -> str:
    return f"{entry['mean']:+.3f} ({entry['low']:+.3f} to {entry['high']:+.3f})"


def curves(folder: Path) -> dict[str, list[Any]]:
    """What alarms read of a run, a list a metric with an entry a step; four significant digits."""
    history = read_lines(RunFolder(folder).metrics_path)
    names = [
        name for name in dict.fromkeys(k for line in history for k in line) if name in READ or name.startswith(LOOKED)
    ]
    return {name: [float(f"{line[name]:.4g}") if name in line else None for line in history] for name in names}


def write_curves(runs: Sequence[Path]) -> None:
    """A line a metric, so that a change can be read."""
    known = json.loads(CURVES.read_text()) | {run.name: curves(run) for run in runs}
    told = ",\n".join(
        json.dumps(name) + ": {\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in read.items()) + "\n}"
        for name, read in known.items()
    )
    CURVES.write_text(f"{{\n{told}\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--hacked", type=int, nargs="+", default=[0], help="seeds of recipe tiny_hacked")
    parser.add_argument("--work", type=Path, required=True, help="folder for the trainings")
    parser.add_argument("--curves", action="store_true", help="record runs for the tests")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Path]] = {}
    for recipe, seeds in (("tiny", given.seeds), ("tiny_hacked", given.hacked)):
        evaluation = configs.load(recipe).evaluation
        settings = [f"evaluation.every={evaluation.every}", f"evaluation.prompts={evaluation.prompts}"]
        settings += ["evaluation.teacher_steps=0", "tracking.uri=none"]
        runs[recipe] = [
            train(recipe, [*settings, f"seed={seed}"], given.work, f"{recipe}-{seed}").parent for seed in seeds
        ]
    every = [row(run) for found in runs.values() for run in found]
    text = "# Which alarms ring\n\nAligned against start, 256 held-out captions, 95 % intervals; diversity over seeds of the last look.\n\n"
    (HERE / "results" / "alarms.md").write_text(
        text + markdown(HEADER, every) + "\n\nMade by `python -m benchmarks.alarms`.\n"
    )
    print(markdown(HEADER, every))
    if given.curves:
        write_curves([*runs["tiny"][:3], *runs["tiny_hacked"][:1]])


if __name__ == "__main__":
    main()
