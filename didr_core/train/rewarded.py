"""Latents as pictures and their standardised reward; and what is done while a reward that is scored elsewhere is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from didr_core.train.reward_scale import RewardScale
from didr_core.types import Backbone, Batch, Reward, Scored, Tensors

Loss = TypeVar("Loss")


class Seen(NamedTuple):
    """Of ``N`` latents."""

    gain: Tensor  # [N] standardised: 0 is the starting generator's mean, 1 its standard deviation
    raw: Tensor  # [N]
    images: Tensor  # [N, 3, H, W]
    parts: Tensors  # {name: [N]}, of a reward made of others, where asked for


class Rewarded:
    """The reward of latents, for one micro-batch."""

    def __init__(
        self,
        backbone: Backbone,
        reward: Reward,
        scale: RewardScale,
        phase: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.backbone, self.reward, self.scale, self.phase = backbone, reward, scale, phase
        self.meanwhile: list[Callable[[], object]] = []
        """Work that needs no reward: done, once, while the first answer from elsewhere is waited for; never, where the reward is here."""

    def of(self, latent: Tensor, batch: Batch) -> Tensor:
        """Standardised reward ``[M * B]`` of the latents of ``batch``, differentiable where the reward is."""
        return self.begin(latent, batch)().gain

    def begin(self, latent: Tensor, batch: Batch, parts: bool = False) -> Callable[[], Seen]:
        """Ask for the reward of latents ``[M * B, ...]``; the returned function waits for it. ``parts``: for the log, too."""
        times = len(latent) // len(batch)
        inputs = {k: v.repeat(times, *([1] * (v.dim() - 1))) for k, v in batch.reward_inputs.items()}
        with self.phase("decoder"):
            images = self.backbone.decode(latent)
        away: Callable[[], Scored] | None = None
        if self.reward.begin:
            with self.phase("reward"):  # all that follows from scores is a sum of gains
                away = self.reward.begin(images, inputs, 1 / self.scale.value.expand(len(images)))

        def answer() -> Seen:
            found: Tensors = {}
            if away:
                todo, self.meanwhile = self.meanwhile, []
                with torch.enable_grad():
                    for work in todo:
                        work()
            with self.phase("reward"):
                if away:
                    raw, found = away()
                elif parts and self.reward.details:
                    raw, found = self.reward.details(images, inputs)
                else:
                    raw = self.reward.score(images, inputs)
            baseline = torch.zeros_like(raw) if batch.baseline is None else batch.baseline.repeat(times)
            return Seen((raw - baseline) / self.scale.value, raw, images, found if parts else {})

        return answer


def in_flight(parts: Sequence[Batch], loss: Callable[[Batch, Callable[[], object]], Loss]) -> Iterator[Loss]:
    """``loss`` of each micro-batch, in order. It is told how to begin the next one, for when it waits: two are in flight then."""
    begun: dict[int, Loss] = {}

    def begin(number: int, meanwhile: Callable[[], object]) -> None:
        if number < len(parts):
            begun[number] = loss(parts[number], meanwhile)

    for number in range(len(parts)):
        if number not in begun:
            begin(number, partial(begin, number + 1, lambda: None))
        yield begun.pop(number)
