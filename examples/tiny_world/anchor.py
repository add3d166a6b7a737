"""Part "anchor": the teacher's pairs that recipe `tiny` keeps its regression on (`train.anchor`), ``world``/anchor.safetensors.

As `didr pairs` makes them, with the finished world alone (`python -m examples.tiny_world.build anchor --again`), for training captions that
leave the background free: what the caption tells is not lost, and under a third of all leave it free.
"""

from __future__ import annotations

from pathlib import Path

from didr_core import config as configs
from didr_core.evaluate.pairs import make_pairs
from didr_core.world.captions import parse_caption
from examples.tiny_world.prompts import read_shards, write_shards


def build(folder: Path, world: Path, count: int = 512, steps: int = 50, batch: int = 64) -> None:
    """Runs the guided teacher from noise to latent for ``count`` of those captions."""
    captions = read_shards(world / "prompts" / "train")
    free = [caption for caption in captions if parse_caption(caption).background is None]
    write_shards(free, folder / "anchor_prompts", 1, "free")
    overrides = [
        f"backbone.pipeline={world / 'pipeline'}",
        f"data.prompts={folder / 'anchor_prompts'}",
        f"evaluation.teacher_steps={steps}",
        "train.anchor=null",
    ]
    make_pairs(configs.load("tiny", overrides), count, world / "anchor.safetensors", batch)
