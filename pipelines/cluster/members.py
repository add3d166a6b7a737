"""Which nodes a training group runs on, and when it must be another group: a node left, is about to, or one came.

Ray Train has a scaling policy of its own, but a group that Ray Train resizes begins anew from what it knows, and what we go on from is our
own checkpoint (`group.py` starts every group). So the driver looks: where something changed, it asks the group to stop after its step, with
a checkpoint, as a user would, and the next one starts on what is there. A group that cannot stop any more, its workers being dead, ends by
itself. The global batch stays: with fewer workers each has more of it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from didr_core.config import Config
from didr_core.train.run_folder import RunFolder
from pipelines.cluster.resources import ClusterView, NoRoom, check, demands_of
from pipelines.cluster.session import await_room, cluster_view, nodes_in_use

LOOK_S = 2.0
START_S, ALONE_S = 20.0, 5.0
"""How long a group waits for all its workers before it starts with fewer, where that is allowed; and where nobody starts nodes."""
STAYS_S = 10.0
"""How long there must have been room for a larger group before this one stops for it."""


def with_workers(config: Config, count: int) -> Config:
    """The same training by ``count`` workers: the batch stays, and no more samples are at once on a GPU than before."""
    if count == config.workers.train:
        return config
    micro = math.gcd(config.sizes.micro_batch, config.train.batch // count)
    workers, train = config.workers, config.train
    update = {
        "workers": workers.model_copy(update={"train": count}),
        "train": train.model_copy(update={"micro_batch": micro}),
    }
    return config.model_copy(update=update)


def counts(config: Config) -> list[int]:
    """Numbers of workers that may train, the largest first: those that the batch divides by."""
    most = config.workers.train
    least = config.workers.train_min or most
    return [n for n in range(most, least - 1, -1) if config.train.batch % n == 0]


def _answering() -> ClusterView:
    return cluster_view(answering=True)


class Members:
    """The nodes of the group that trains now. The driver's thread looks, the group's own asks :meth:`start` and :meth:`why`."""

    def __init__(self, config: Config, run: RunFolder, view: ClusterView, say: Callable[[str], None]) -> None:
        self.config, self.run, self.view, self.say = config, run, view, say
        self.workers = config.workers.train
        self._used: dict[str, str] = {}  # nodes that processes of this run are on: id and name
        self._why = ""
        self._next, self._room_since = 0.0, math.inf
        self._looking = threading.Lock()

    def start(self, again: bool) -> tuple[Config, ClusterView]:
        """The config and the nodes of the next group: as large as there is room for.

        Args:
            again: a group has ended, so the nodes may be others now.

        Raises:
            NoRoom: not even for the smallest, where nobody starts nodes.
        """
        with self._looking:
            self._next = math.inf  # there is no group to look after
        if again:
            self.view = self._largest()
            self.run.stop_path.unlink(missing_ok=True)
        self._used, self._why, self._room_since, self._next = {}, "", math.inf, 0.0
        return with_workers(self.config, self.workers), self.view

    def why(self) -> str:
        """Why the group ended, or "": then it was not for a node. Its workers may have missed a node before our look did, so look again."""
        with self._looking:
            if not self._why:
                self._missing(_answering())
            return self._why

    def look(self) -> None:
        """Ask the group to stop where it should be another one."""
        with self._looking:
            if not self._why and time.monotonic() >= self._next:
                self._look()

    def _look(self) -> None:
        self._next = time.monotonic() + LOOK_S
        view = _answering()
        if self._missing(view):
            return
        here = {node.id: node.name for node in view.nodes}
        self._used |= {node: here[node] for node in nodes_in_use() & here.keys()}
        larger = self._fits(view) if self.workers < self.config.workers.train else 0
        self._room_since = min(self._room_since, time.monotonic()) if larger > self.workers else math.inf
        if time.monotonic() - self._room_since >= STAYS_S:
            self._stop(f"there is room for {larger} workers")

    def _missing(self, view: ClusterView) -> bool:
        gone = self._used.keys() - {node.id for node in view.nodes}
        if gone:
            self._stop(f"{', '.join(sorted(self._used[node] for node in gone))} left, or is about to")
        return bool(gone)

    def _stop(self, why: str) -> None:
        self._why = why
        self.run.stop_path.touch()

    def _largest(self) -> ClusterView:
        """Waits for room: for all workers :data:`START_S` at most, then for as few as are allowed."""
        least = with_workers(self.config, counts(self.config)[-1])
        alone = self.config.workers.train_min and not self.view.grows
        late = time.monotonic() + (ALONE_S if alone else START_S)
        while (found := self._fits(view := _answering())) < self.config.workers.train and time.monotonic() < late:
            self.say(f"waiting for nodes: there is room for {found} of {self.config.workers.train} workers")
            time.sleep(1.0)
        if not found:
            view = await_room(lambda v: demands_of(least, v), view, self.say, look=_answering).cluster
        self.workers = found or self._fits(view)
        return view

    def _fits(self, view: ClusterView) -> int:
        for count in counts(self.config):
            try:
                check(demands_of(with_workers(self.config, count), view), view)
            except NoRoom:
                continue
            return count
        return 0
