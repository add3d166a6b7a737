"""Rewards without a gradient, scored in actors while training runs: the trainer sends pictures and gets numbers back.

A differentiable reward must sit on the trainer, in the generator's graph. A black box (a program, a service, a judge in another framework)
need not: :class:`ActorReward` stands in for it in the learner, and `workers.rewards` actors hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from didr_core.config import Config, build
from didr_core.train.patience import Calls
from didr_core.types import Tensors
from pipelines.cluster.resources import Need

Arrays = dict[str, NDArray[Any]]


class Scorer:
    """One actor: the reward model and nothing else."""

    def __init__(self, config: Config, calls: Path | None = None) -> None:
        torch.set_num_threads(1)
        assert config.reward is not None
        self.device = config.torch_device
        self.reward = build("rewards", config.reward)
        self.calls = Calls(calls, f"the scoring actor of {config.reward.name!r}")
        with self.calls.at("loading"):
            self.reward.load(self.device)

    def prepare(self, prompts: Sequence[str]) -> Arrays:
        """The reward's own inputs for the prompts, ``{name: [B, ...]}``."""
        return {name: value.cpu().numpy() for name, value in self.reward.prepare(prompts).items()}

    @torch.no_grad()
    def score(self, images: NDArray[np.float32], inputs: Arrays) -> NDArray[np.float32]:
        """``[B, 3, H, W]`` and the prepared inputs ``{name: [B, ...]}`` to raw scores ``[B]``."""
        tensors = {name: torch.from_numpy(np.array(value)).to(self.device) for name, value in inputs.items()}
        with self.calls.at(f"scoring {len(images)} pictures"):
            scores: Tensor = self.reward.score(torch.from_numpy(np.array(images)).to(self.device), tensors)
        return scores.float().cpu().numpy()


class ActorReward:
    """The reward as the learner sees it. Rows are dealt out evenly; an actor that dies is started again and asked again."""

    differentiable = False
    details: Callable[[Tensor, Tensors], tuple[Tensor, Tensors]] | None = None
    features: Callable[[Tensor], Tensor] | None = None

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)

    def check(self) -> None:
        """Preflight has looked at it before the actors started."""

    def tokenizers(self) -> None:
        """The actors' affair."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """The actors have loaded it."""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the reward prepares, made by the first actor."""
        return {n: torch.from_numpy(np.array(v)) for n, v in ray.get(self.actors[0].prepare.remote(prompts)).items()}

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``[B, 3, H, W]`` to raw scores ``[B]``.

        Raises:
            DIDRError: the reward's own complaint (as the cause of Ray's error).
        """
        shares = [rows for rows in np.array_split(np.arange(len(images)), len(self.actors)) if len(rows)]
        pictures = images.detach().float().cpu().numpy()
        arrays = {name: value.cpu().numpy() for name, value in inputs.items()}
        asked = [
            actor.score.remote(pictures[rows], {name: value[rows] for name, value in arrays.items()})
            for actor, rows in zip(self.actors, shares, strict=False)
        ]
        return torch.from_numpy(np.concatenate(ray.get(asked))).to(images.device)


def start_scorers(config: Config, need: Need, calls: Path | None = None) -> list[Any]:
    """`workers.rewards` actors, which live as long as this process or their handles; in ``calls`` they say what they are at."""
    actor = ray.remote(**need.options(), max_restarts=-1, max_task_retries=-1)(Scorer)
    return [actor.remote(config, calls) for _ in range(config.workers.rewards)]
