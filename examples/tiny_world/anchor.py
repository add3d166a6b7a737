"""Part "anchor": the teacher's pairs that recipe `tiny` keeps its regression on (`train.anchor`), ``world``/anchor.safetensors.

As `didr pairs` makes them, with the finished world alone: `python -m examples.tiny_world.build anchor --again`.
"""

from __future__ import annotations

from pathlib import Path

from didr_core import config as configs
from didr_core.evaluate.pairs import make_pairs


def build(folder: Path, world: Path, count: int = 512, steps: int = 50, batch: int = 64) -> None:
    """Runs the guided teacher from noise to latent for ``count`` training captions."""
    overrides = [
        f"backbone.pipeline={world / 'pipeline'}",
        f"data.prompts={world / 'prompts' / 'train'}",
        f"evaluation.teacher_steps={steps}",
        "train.anchor=null",
        "seed=62",
    ]
    make_pairs(configs.load("tiny", overrides), count, world / "anchor.safetensors", batch)
