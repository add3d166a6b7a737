"""A contest on Ray Data: blocks of prompts -> generator actors (draw) -> reward actors (judge), each of which writes its file.

What travels is which block; pictures and scores lie in the contest's folder, so an actor that dies, or a driver, loses one block.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.data import ActorPoolStrategy

from didr_core.config import Config
from pipelines.cluster.prompts import IN_FLIGHT
from pipelines.cluster.remote import users_mistake
from pipelines.cluster.resources import ClusterView, Demands, Group, reward_need, train_need

if TYPE_CHECKING:  # the stream passes through helper processes of Ray's, and torch would take a second of each
    from didr_core.evaluate.contest import Contest, Item

Row = dict[str, Any]
"""``model`` and ``block``, of an :data:`Item`."""


class _Stage:
    """A hand on the contest, which says what it is at. Opens what it is given, and imports what it needs, when it is made."""

    def __init__(self, tree: Mapping[str, Any], contest: bytes, calls: Path, who: str, threads: int) -> None:
        import torch

        from didr_core.evaluate.contest import Hand
        from didr_core.train.patience import Calls

        torch.set_num_threads(threads)
        self.calls = Calls(calls, who)
        self.hand = Hand(pickle.loads(contest), Config(**tree).torch_device)

    def _do(self, doing: str, work: Any, row: Row) -> Row:
        with self.calls.at(f"{doing} block {row['block']} of {self.hand.contest.models[row['model']].name}"):
            work((row["model"], row["block"]))
        return row


class GeneratorActor(_Stage):
    """Draws blocks; holds one model at a time."""

    def __init__(self, tree: Mapping[str, Any], contest: bytes, calls: Path) -> None:
        super().__init__(tree, contest, calls, "a generator actor", tree["train"]["threads"])

    def __call__(self, row: Row) -> Row:
        """Draw a block."""
        return self._do("drawing", self.hand.draw, row)


class JudgeActor(_Stage):
    """Judges blocks; holds all rewards."""

    def __init__(self, tree: Mapping[str, Any], contest: bytes, calls: Path) -> None:
        super().__init__(tree, contest, calls, "a reward actor", 1)

    def __call__(self, row: Row) -> Row:
        """Judge a block."""
        return self._do("judging", self.hand.judge, row)


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
    workers, given = config.workers, (config.model_dump(mode="json"), pickle.dumps(contest), calls)
    stages = (
        (GeneratorActor, workers.train, train_need(workers, cluster)),
        (JudgeActor, workers.rewards, reward_need(workers, cluster)),
    )
    for actor, size, need in stages:
        pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=IN_FLIGHT)
        stream = stream.map(actor, fn_constructor_args=given, compute=pool, **need.options())
    try:
        for row in stream.iter_rows():
            yield row["model"], row["block"]
    except Exception as error:
        if mistake := users_mistake(error):
            raise mistake from error
        raise
