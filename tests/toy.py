"""A whole run at toy size: random models, prompt shards and a recipe; and rewards that misbehave on demand."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from random_models import clip_folder, prompt_shards, sdxl_folder
from torch import Tensor

from didr_core.config import Component
from didr_core.types import Tensors

STEPS, BATCH, EVERY = 6, 8, 2


def toy_recipe(folder: Path, **changes: Any) -> Path:
    """``folder/toy.yaml`` and everything it names; ``changes`` replace top-level sections."""
    tree = {
        "name": "toy",
        "output": str(folder / "runs"),
        "backbone": {"name": "sdxl", "pipeline": str(sdxl_folder(folder / "pipeline"))},
        "algorithm": "didr",
        "reward": {"name": "pickscore", "path": str(clip_folder(folder / "clip"))},
        "drp": {"estimator": "tweedie", "beta": 0.5, "snr_gate": True, "clip": 1.0},
        "generator": {"lr": 1e-3},
        "assistant": {"lr": 1e-3},
        "train": {"steps": STEPS, "batch": BATCH, "checkpoint_every": EVERY},
        "data": {
            "prompts": str(prompt_shards(folder / "prompts")),
            "heldout": str(prompt_shards(folder / "heldout", 1, 8, "drawing")),
        },
        "workers": {"train": 2},
        "evaluation": {"grid": 4, "prompts": 8},
        "tracking": {"uri": "none"},
    } | changes
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Treacherous:
    """A reward that is NaN for one prompt: `toy:Treacherous`."""

    differentiable = True

    class Config(Component):
        bad: str

    def __init__(self, config: Config) -> None:
        self.bad = config.bad

    def load(self, device: torch.device | str = "cpu") -> None:
        pass

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"factor": torch.tensor([float("nan") if p == self.bad else 1.0 for p in prompts])}

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        return images.mean((1, 2, 3)) * inputs["factor"]


class Opaque(Treacherous):
    """A reward without a gradient: `toy:Opaque`."""

    differentiable = False


class Wayward(Treacherous):
    """A reward that does once what the file `order` in `orders` says: `toy:Wayward`. FACTOR of its environment is in its inputs."""

    class Config(Component):
        orders: str

    def __init__(self, config: Config) -> None:
        self.order = Path(config.orders) / "order"

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"factor": torch.full((len(prompts),), float(os.environ.get("FACTOR", "1")))}

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        with contextlib.suppress(FileNotFoundError):  # another actor was sooner
            order = self.order.read_text()
            self.order.unlink()
            if order == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if order == "hang":
                time.sleep(1000)
            raise ValueError(f"told to {order}")
        return (images.square().mean((1, 2, 3)) * inputs["factor"]).sin()
