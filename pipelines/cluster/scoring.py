"""What an actor of a reward's pool is, and the reward as everybody else sees it, whose model is there.

A black box (a program, a service, a judge in another framework) is always scored in actors during training; a reward with a gradient where
its `placement` says so. :mod:`pipelines.cluster.pool` deals out the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from torch import Tensor

from didr_core.config import Config, build, differentiable
from didr_core.rewards.remote import Graded, RemoteReward
from didr_core.train.patience import Calls
from didr_core.types import Reward, Tensors
from pipelines.cluster import keeper as keepers
from pipelines.cluster.pool import RESTARTS, Arrays, Pool
from pipelines.cluster.resources import ClusterView, Demands, Group, NoRoom, check, demands_of, pool_group, taken
from pipelines.cluster.session import cluster_view


class Scorer:
    """One actor: a reward's model and nothing else. It keeps nothing from call to call."""

    def __init__(self, config: Config, key: str = "reward", calls: Path | None = None) -> None:
        torch.set_num_threads(1)
        own = config.pools[key]
        self.device = config.torch_device
        self.reward = build("rewards", own)
        self.calls = Calls(calls, f"the scoring actor of {own.name!r}")
        with self.calls.at("loading"):
            self.reward.load(self.device)

    def ready(self) -> None:
        """Answers when the model is loaded."""

    def prepare(self, prompts: Sequence[str]) -> Arrays:
        """The reward's own inputs for the prompts, ``{name: [B, ...]}``."""
        with self.calls.at(f"reading {len(prompts)} prompts"):
            return {name: _array(value) for name, value in self.reward.prepare(prompts).items()}

    def score(
        self, images: NDArray[np.float32], inputs: Arrays, weight: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """``[B, 3, H, W]`` and the prepared inputs to raw scores ``[B]``, and their gradient times ``weight [B]`` where there is one."""
        tensors = {name: _tensor(value).to(self.device) for name, value in inputs.items()}
        pictures = _tensor(images).to(self.device).requires_grad_(weight is not None)
        with self.calls.at(f"scoring {len(images)} pictures"), torch.set_grad_enabled(weight is not None):
            scores: Tensor = self.reward.score(pictures, tensors).float()
            if weight is None:
                return _array(scores), None
            (gradient,) = torch.autograd.grad(scores, pictures, _tensor(weight).to(self.device))
            return _array(scores), _array(gradient)


def start_pools(config: Config, view: ClusterView, calls: Path | None = None) -> list[Pool]:
    """A pool for each of :attr:`Config.pools`; they live as long as this process or their handles. In ``calls`` they say what they do."""
    pools = []
    for key, reward in config.pools.items():
        group, settings = pool_group(config, key, view), config.pool(key)
        start = partial(_start, config, key, calls, group)
        actors, keeper = [start() for _ in range(group.count)], None
        if (most := settings.counts[1]) > group.count:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            keeping = ray.remote(num_cpus=0, scheduling_strategy=here)(keepers.Keeper)
            keeper = keeping.remote(actors, most, start, partial(_has_room, config, key), keepers.IDLE_S)
        pools.append(Pool(key, reward.name, settings, actors, keeper))
    return pools


def _start(config: Config, key: str, calls: Path | None, group: Group) -> Any:
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # that of a Tune trial holds its driver only
    options = {**group.need.options(), "scheduling_strategy": outside, "max_restarts": RESTARTS}
    actor = ray.remote(**options, runtime_env=config.pool(key).runtime_env or None)(Scorer)
    return actor.remote(config, key, calls)


def _has_room(config: Config, key: str, more: int) -> bool:
    """Whether so many ``more`` actors than the fewest fit beside all else, and nobody holds that of one; or somebody starts nodes."""
    view = cluster_view()
    group = pool_group(config, key, view)
    try:
        check(Demands((*demands_of(config, view).groups, replace(group, count=more))), view)
    except NoRoom:
        return view.grows
    return view.grows or not taken(Demands((replace(group, count=1),)), view)


def placed(config: Config, pools: Sequence[Pool]) -> Reward:
    """The run's reward with its models in ``pools``; :meth:`Reward.load` loads what stays here, parts of a composite."""
    there: dict[str, Any] = {pool.key: _remote(config, pool) for pool in pools}
    if "reward" in there:
        return there["reward"]  # type: ignore[no-any-return]
    assert config.reward is not None
    made = build("rewards", config.reward)
    made.rewards = [there.get(f"reward.parts[{n}].reward", reward) for n, reward in enumerate(made.rewards)]
    return made  # type: ignore[no-any-return]


def _remote(config: Config, pool: Pool) -> RemoteReward:
    def prepare(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: _tensor(value) for name, value in pool.prepare(list(prompts)).items()}

    def submit(images: Tensor, inputs: Tensors, weight: Tensor | None) -> Callable[[], Graded]:
        arrays = {name: _array(value) for name, value in inputs.items()}
        wait = pool.score(_array(images), arrays, None if weight is None else _array(weight))

        def answer() -> Graded:
            scores, gradients = zip(*wait(), strict=True)
            score = torch.from_numpy(np.concatenate(scores))
            return score, None if weight is None else torch.from_numpy(np.concatenate(gradients))

        return answer

    return RemoteReward(submit, prepare, differentiable(config.pools[pool.key]))


def _array(value: Tensor) -> NDArray[np.float32]:
    """numpy knows no bfloat16; float32 holds it exactly."""
    return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy())


def _tensor(value: NDArray[np.float32]) -> Tensor:
    """A copy: arrays that come out of the object store are read-only."""
    return torch.from_numpy(np.array(value))
