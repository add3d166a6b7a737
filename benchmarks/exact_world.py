"""What trainings with a known answer need: prompts that mean nothing, batches of them, and a generator at the reference's law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from didr_core import config as configs
from didr_core.config import Config
from didr_core.diffusion.noise import Noise
from didr_core.drs import Estimate, Estimator, Problem
from didr_core.train.learner import Learner
from didr_core.types import Batch, Condition, Tensors


class BatchNoise(Noise):
    """One draw a batch instead of one a sample: not tied to workers, but small networks do not wait for it."""

    def normal(self, index: Tensor | Sequence[int], shape: Sequence[int], tag: str) -> Tensor:
        """``[B, *shape]`` standard normal."""
        return torch.randn(len(index), *shape, generator=self.generator(int(index[0]), tag))

    def uniform(self, index: Tensor | Sequence[int], tag: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``[B]`` uniform."""
        return low + (high - low) * torch.rand(len(index), generator=self.generator(int(index[0]), tag))


class Exact(Estimator):
    """`drp.estimator` of a training that is told the answer."""

    answer: ClassVar[Callable[[Problem], Estimate]]

    def estimate(self, problem: Problem) -> Estimate:
        """The closed form."""
        return type(self).answer(problem)


def batches(size: int, count: int, copies: int = 1, inputs: Tensors | None = None) -> Iterator[Batch]:
    """Batches of nameless prompts, each of them ``copies`` times; rewards stay on their own scale (no baseline, no spread)."""
    names, unused = [""] * size * copies, torch.zeros(size * copies, 1)
    for step in range(count):
        index = torch.arange(step * size, (step + 1) * size).repeat(copies)
        yield Batch(index, names, names, Condition({"unused": unused}), inputs or {"unused": unused})


def distill(config: Config, steps: int, rate: float = 1e-3) -> nn.Module:
    """The running average of the generator after ``steps`` Diff-Instruct updates of batch 256, rate falling over the second half."""
    tree = configs.dump(config) | {"algorithm": {"name": "diff_instruct"}, "reward": None}
    tree["generator"] |= {"lr": rate, "decay": 0.5}
    tree["train"] |= {"steps": steps, "batch": 256}
    learner = Learner(configs.validate(tree), noise=BatchNoise(config.seed))
    for batch in batches(256, steps):
        learner.step(batch)
    return learner.generator("ema")
