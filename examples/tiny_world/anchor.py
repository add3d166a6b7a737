"""Part "anchor": the teacher's pairs that recipe `tiny` keeps its regression on (`train.anchor`), ``world``/anchor.safetensors.

Made with the finished world alone: `python -m examples.tiny_world.build anchor --again`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from didr_core.config.files import replaced
from examples.tiny_world.prompts import read_shards
from examples.tiny_world.sampling import Parts, ddim, start_noise

ANCHOR: dict[str, Any] = {"count": 512, "steps": 50, "guidance": 2.0, "batch": 64, "seed": 62}


def build(folder: Path, world: Path, **settings: Any) -> None:
    """Runs the guided teacher from noise to latent for captions drawn from the training prompts."""
    s = {**ANCHOR, **settings}
    captions = read_shards(world / "prompts" / "train")
    drawn = np.random.default_rng(s["seed"]).choice(len(captions), s["count"], replace=False)
    parts = Parts.load(world / "pipeline")
    hidden, pooled = parts.encode([captions[row] for row in drawn])
    noise = start_noise(s["count"], s["seed"])
    given = zip(*(v.split(s["batch"]) for v in (noise, hidden, pooled)), strict=True)
    latents = torch.cat([ddim(parts.unet, *rows, s["steps"], s["guidance"]) for rows in given])
    save_pairs(world / "anchor.safetensors", noise, latents, hidden, pooled)


def save_pairs(path: Path, noise: Tensor, latents: Tensor, hidden: Tensor, pooled: Tensor) -> None:
    """As `didr_core.data.teacher_pairs` reads them, fp16."""
    rows = {"z": noise, "x0": latents, "condition.prompt_embeds": hidden, "condition.pooled": pooled}
    with replaced(path) as partial:
        save_file({name: value.half().contiguous() for name, value in rows.items()}, partial)
