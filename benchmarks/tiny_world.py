"""The README's headline table: does alignment help, against a control, on held-out captions of the bundled world?

    python -m benchmarks.tiny_world --seeds 0 1 2 --prompts 1000 --jobs 2

For each training seed it trains the recipe (`aligned`) and the very same run without the reward (`control`: Diff-Instruct), then scores
start, control, aligned and the 50-step guided teacher on the same held-out captions with the same noise, and pools the seeds.
Trainings run in one process each (`didr_core.train.loop`, the same update as the Ray workers'), `--jobs` at a time; whatever is finished in
`--work` is not done again. Writes ``scores.json``, ``scores.npz`` and ``table.md`` to `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainings import train
from didr_core import config as configs
from didr_core.config import Config
from didr_core.evaluate.contestants import contestants
from didr_core.evaluate.evaluator import Evaluator
from didr_core.evaluate.finish import heldout
from didr_core.evaluate.scores import Scores, comparison_table, origin, pool, show, table, title
from didr_core.export.card import markdown
from didr_core.export.folder import exported

ARMS = {"aligned": (), "control": ("algorithm=diff_instruct",)}
FACETS = (
    *(f"right_{fact}" for fact in ("count", "colour", "shape", "relation", "background")),
    *(f"strict_{kind}" for kind in ("single", "count", "pair", "relation")),
)
SHOWN = ("utility", "judge", "reward", "strict", "background_entropy", "position_entropy")


def score(config: Config, exports: dict[str, Path], evaluator: Evaluator) -> Scores:
    """Start, control, aligned and teacher against each other, for one training seed."""
    backbone = evaluator.backbone
    generators = {arm: exported(config, export) for arm, export in exports.items()}
    generators["start"] = backbone.load_network("generator")
    return evaluator.compare(contestants(config, backbone, generators, backbone.load_network("reference")))


def facet_table(tree: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Where it is right: each fact of the caption alone, and everything by kind of caption. Header and rows."""
    header = ["model", *(title(name) for name in FACETS)]
    rows = [
        [model, *(show(row["measures"].get(name), name) for name in FACETS)] for model, row in tree["models"].items()
    ]
    return header, rows


def tables(tree: Mapping[str, Any]) -> str:
    """The three tables in Markdown: measures, facets, `aligned` against the others."""
    return "\n\n".join(markdown(*t) for t in (table(tree), facet_table(tree), comparison_table(tree, "aligned", SHOWN)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_world", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument(
        "--noise-seeds", type=int, nargs="+", default=[1000, 1001], help="pictures a caption, for scoring"
    )
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_world"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiny_world"))
    given = parser.parse_args(arguments)
    config = configs.load(given.recipe, ["evaluation.teacher_steps=50", *given.overrides])
    if config.data.heldout is None:
        parser.error("the recipe names no data.heldout")
    prompts = heldout(config, given.prompts)
    given.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as jobs:
        waiting = {
            (seed, arm): jobs.submit(
                train, given.recipe, [f"seed={seed}", *given.overrides, *ARMS[arm]], given.work, f"{arm}-{seed}"
            )
            for seed in given.seeds
            for arm in ARMS
        }
        exports = {key: job.result() for key, job in waiting.items()}
    torch.set_num_threads(given.jobs)
    evaluator = Evaluator.of(config, prompts, given.noise_seeds, cache=given.work / "teacher")
    scores = [score(config, {arm: exports[seed, arm] for arm in ARMS}, evaluator) for seed in given.seeds]
    command = "python -m benchmarks.tiny_world " + " ".join(arguments if arguments is not None else sys.argv[1:])
    pooled = pool(scores, facts=origin(config.data.heldout, [command.strip()]))
    pooled.write(given.out)
    text = tables(pooled.tree)
    (given.out / "table.md").write_text(f"{text}\n\n`{command.strip()}`, {pooled.tree['facts']['date'][:10]}\n")
    print(text)


if __name__ == "__main__":
    main()
