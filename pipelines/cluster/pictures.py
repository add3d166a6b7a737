"""A contest on Ray Data: blocks of prompts -> generator actors (draw) -> reward actors (judge), each of which writes its file.

What travels is which block; pictures and scores lie in the contest's folder, so an actor that dies, or a driver, loses one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from didr_core.config import Config
from didr_core.evaluate.contest import Contest, Hand, Item
from didr_core.train.patience import Calls
from pipelines.cluster.prompts import IN_FLIGHT
from pipelines.cluster.remote import users_mistake
from pipelines.cluster.resources import ClusterView, Demands, Group, reward_need, train_need

Row = dict[str, Any]
"""``model`` and ``block``, of an :data:`Item`."""


class GeneratorActor:
    """Draws blocks; holds one model at a time."""

    def __init__(self, config: Config, contest: Contest, calls: Path) -> None:
        torch.set_num_threads(config.train.threads)
        self.hand, self.calls = Hand(contest, config.torch_device), Calls(calls, "a generator actor")

    def __call__(self, row: Row) -> Row:
        """Draw a block."""
        name = self.hand.contest.models[row["model"]].name
        with self.calls.at(f"drawing block {row['block']} of {name}"):
            self.hand.draw((row["model"], row["block"]))
        return row


class JudgeActor:
    """Judges blocks; holds all rewards."""

    def __init__(self, config: Config, contest: Contest, calls: Path) -> None:
        torch.set_num_threads(1)
        self.hand, self.calls = Hand(contest, config.torch_device), Calls(calls, "a reward actor")

    def __call__(self, row: Row) -> Row:
        """Judge a block."""
        with self.calls.at(f"judging block {row['block']} of {self.hand.contest.models[row['model']].name}"):
            self.hand.judge((row["model"], row["block"]))
        return row


def demands(config: Config, cluster: ClusterView) -> Demands:
    """All that :func:`contest_on_ray` runs at once."""
    workers = config.workers
    train, reward = train_need(workers, cluster), reward_need(workers, cluster)
    return Demands(
        (
            Group("generator actor", workers.train, train, "workers.train", "workers.train_cpus or .train_gpus"),
            Group("reward actor", workers.rewards, reward, "workers.rewards", "workers.reward_cpus or .reward_gpus"),
        )
    )


def contest_on_ray(config: Config, contest: Contest, cluster: ClusterView, calls: Path) -> Iterator[Item]:
    """All that is missing, by `workers.train` generator and `workers.rewards` reward actors; yields what is done.

    Raises:
        DIDRError: what an actor raised, in words.
    """
    ray.data.DataContext.get_current().raise_original_map_exception = True
    items = contest.todo()
    stream = ray.data.from_items([{"model": m, "block": b} for m, b in items], override_num_blocks=len(items))
    workers = config.workers
    stages = (
        (GeneratorActor, workers.train, train_need(workers, cluster)),
        (JudgeActor, workers.rewards, reward_need(workers, cluster)),
    )
    for actor, size, need in stages:
        pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=IN_FLIGHT)
        stream = stream.map(actor, fn_constructor_args=(config, contest, calls), compute=pool, **need.options())
    try:
        for row in stream.iter_rows():
            yield row["model"], row["block"]
    except Exception as error:
        if mistake := users_mistake(error):
            raise mistake from error
        raise
