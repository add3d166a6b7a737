"""Rewards that misbehave on demand, for `benchmarks.chaos`: a file named `mode` in `orders` says how, from the next call on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from didr_core.rewards.quadratic import QuadraticReward
from didr_core.types import Tensors


class Moody(QuadraticReward):
    """The quadratic reward of `exact_2d`, unless `<orders>/mode` says: slow, hang, throw, nan, shape."""

    class Config(QuadraticReward.Config):
        orders: str
        pace: float = 0.0  # seconds that a call takes

    config: Config

    def _mode(self) -> str:
        try:
            return (Path(self.config.orders) / "mode").read_text()
        except FileNotFoundError:
            return ""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self._act()
        return super().prepare(prompts)

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        scores = super().score(images, inputs)
        mode = self._act()
        if mode == "nan":
            return scores * float("nan")
        return scores[:1] if mode == "shape" else scores

    def _act(self) -> str:
        mode = self._mode()
        time.sleep(self.config.pace)
        if mode == "throw":
            raise ValueError("the chaos reward broke")
        if mode in ("slow", "hang"):
            time.sleep(0.4 if mode == "slow" else 10_000)
        return mode


class MoodyBlackBox(Moody):
    """The same without a gradient: under Ray it is scored in actors."""

    differentiable = False

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        time.sleep(0.1)  # or the actors that prepare would be done, and gone, before training has begun
        return super().prepare(prompts)

    @torch.no_grad()
    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        return super().score(images, inputs)
