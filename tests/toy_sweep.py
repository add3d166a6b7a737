"""A sweep at toy size, done in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.sweeps import space, work
from pipelines.sweeps.folder import SweepFolder, SweepOptions

STEPS = 4


def new(toy: Path, tree: dict[str, Any], output: Path, **changes: Any) -> SweepFolder:
    found = space.read("mine", tree, "for a test")
    points = space.draw(found, "grid", None, 0)
    config = space.check(found, points, str(toy), [f"output={output}"])
    facts = {"search": "grid", "scheduler": "none", "trials": len(points), "concurrent": 1, "workers": 1, "seed": 0}
    whole = {"recipe": str(toy), "overrides": [], "patience": 1.0, **facts, **changes}
    return SweepFolder.create(SweepOptions(name="s", space="mine", tree=found.tree(), **whole), config, points)


def do(folder: SweepFolder, number: int) -> dict[str, Any]:
    *_, result = work.legs(folder, number)
    return result
