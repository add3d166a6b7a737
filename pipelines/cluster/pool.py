"""Pools of actors that score a run's rewards: they are started once, and every trainer and every actor of the prompt stream asks them.

Calls are stateless. Each caller deals the pictures of a call out to its share of the pool, waits when it needs the answer, and asks another
actor when one dies in mid-call or takes too long; Ray starts the lost one again, and it is asked once it has loaded its model. What the
reward itself raises is not tried again. A call without an end is named by :mod:`didr_core.train.patience`, as all actors' calls are.
Where the pool's size is a range, :mod:`pipelines.cluster.keeper` says who is in it.

Imports no torch: handles of pools pass through Ray's helper processes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RuntimeEnvSetupError,
)

from didr_core.config import Actors
from didr_core.types import DIDRError

LOOK_S = 0.05
TELL_S = 1.0
RESTARTS = 20
"""Of one actor in a run, those for a node that was taken away aside: one that dies again and again ends the run."""
LOOK_AT = "Look at its memory, and with -v at what it prints; `--resume` goes on from the last checkpoint."
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)
Arrays = Mapping[str, NDArray[Any]]
Answers = Callable[[], Sequence[tuple[NDArray[Any], NDArray[Any] | None]]]


class Pool:
    """The actors of one reward, as one caller sees them. Travels to others; each then counts its own calls."""

    def __init__(self, key: str, name: str, settings: Actors, actors: Sequence[Any], keeper: Any = None) -> None:
        """``key``: of :attr:`Config.pools`. ``name``: of the reward. ``actors``: their handles. ``keeper``: where their number changes."""
        self.key, self.name, self.settings, self.actors, self.keeper = key, name, settings, list(actors), keeper
        self.share_with()

    def share_with(self, rank: int = 0, workers: int = 1, say: Callable[[str], None] = lambda _: None) -> None:
        """This caller is one of ``workers``, and asks its part of the actors first; ``say``: told of actors that are lost."""
        self.rank, self.workers, self.say = rank, workers, say
        self.busy = Counter[Any]()  # calls of an actor
        self.coming: dict[Any, Any] = {}  # those that load, and what answers when they have
        self.waited = 0.0  # seconds, since the keeper was told
        for actor in self.actors:
            self._await(actor)

    def prepare(self, prompts: Sequence[str]) -> Arrays:
        """The reward's inputs for the prompts, by one actor."""
        answer: Arrays = _Call(self, "prepare", prompts).result()
        return answer

    def score(self, images: NDArray[Any], inputs: Arrays, weight: NDArray[Any] | None) -> Answers:
        """Ask :meth:`pipelines.cluster.scoring.Scorer.score`, rows dealt out; the returned function waits for the parts, in order."""

        def part(rows: NDArray[Any]) -> tuple[Any, ...]:
            return images[rows], {k: v[rows] for k, v in inputs.items()}, None if weight is None else weight[rows]

        parts = max(1, len(self.actors) // self.workers)
        dealt = np.array_split(np.arange(len(images)), min(parts, len(images)))
        calls = [_Call(self, "score", *part(rows)) for rows in dealt]
        return lambda: [call.result() for call in calls]

    def choose(self) -> Any:
        """The actor with the fewest of this caller's calls among those that are there; where none is, the first that comes.

        Raises:
            DIDRError: one cannot start in the environment that it was given, or dies again and again. RayActorError: its reward cannot be
                loaded.
        """
        self.tell()
        while True:
            for actor, ref in list(self.coming.items()):
                if ray.wait([ref], timeout=0)[0]:
                    self._came(actor, ref)
            first = self.rank * len(self.actors) // self.workers
            if there := [a for a in (*self.actors[first:], *self.actors[:first]) if a not in self.coming]:
                return min(there, key=lambda actor: self.busy[actor])
            time.sleep(LOOK_S)

    def _came(self, actor: Any, ref: Any) -> None:
        del self.coming[actor]
        try:
            ray.get(ref)
        except RuntimeEnvSetupError as error:
            raise DIDRError(
                f"{self.key}.actors.runtime_env={self.settings.runtime_env!r}: no actor of {self.name!r} could start in it. Mend it, or "
                f"leave it out. Ray says: {error}"
            ) from error
        except LOST as error:
            if getattr(error, "actor_init_failed", False):
                raise
            if isinstance(error, ActorDiedError):
                raise DIDRError(
                    f"reward {self.name!r}: a scoring actor is not started again (at most {RESTARTS} times in a run): {error}. {LOOK_AT}"
                ) from error
            self._await(actor)  # it is being started again

    def _await(self, actor: Any) -> None:
        self.coming[actor] = actor.ready.remote()

    def tell(self) -> None:
        """Tell the keeper for how long was waited; it says who is in the pool. Where it has died, the fewest are."""
        if self.keeper is None:
            return
        before = self.actors
        try:
            self.actors = ray.get(self.keeper.tell.remote(self.waited))
        except LOST:
            self.keeper, self.actors = None, before[: self.settings.counts[0]]
        self.waited = 0.0
        self.coming = {actor: ref for actor, ref in self.coming.items() if actor in self.actors}
        if len(self.actors) != len(before) and not self.rank:
            self.say(f"scoring actors of {self.name!r}: {len(self.actors)}, {len(before)} before")

    def wait(self, ref: Any, end: float) -> None:
        """Until an answer is there, or ``end``; the keeper hears of it."""
        while self.keeper is not None and (now := time.monotonic()) < end:
            there, _ = ray.wait([ref], timeout=min(TELL_S, end - now))
            self.waited += time.monotonic() - now
            if there:
                return
            self.tell()

    def lost(self, actor: Any, why: str, tried: int) -> None:
        """An actor is gone, or as good as gone: it is started again.

        Raises:
            DIDRError: it was the last that the call may lose.
        """
        if actor not in self.coming:
            self._await(actor)
        told = f"a scoring actor of {self.name!r} {why}"
        if tried >= self.settings.tries:
            raise DIDRError(
                f"reward {self.name!r}: {told}, the last of {tried} that a call has lost ({self.key}.actors.tries={self.settings.tries}). "
                f"{LOOK_AT}"
            )
        self.say(f"{told}; another one is asked ({tried} of {self.settings.tries})")


class _Call:
    """One call of one actor, and of others where that is lost."""

    def __init__(self, pool: Pool, method: str, *arguments: Any) -> None:
        self.pool, self.method, self.arguments = pool, method, arguments
        self._send()

    def _send(self) -> None:
        self.actor, self.since = self.pool.choose(), time.monotonic()
        self.pool.busy[self.actor] += 1
        self.ref = getattr(self.actor, self.method).remote(*self.arguments)

    def result(self) -> Any:
        """Wait for the answer.

        Raises:
            DIDRError: too many actors were lost. Or what the reward raised, wrapped by Ray.
        """
        pool, limit, tried = self.pool, self.pool.settings.timeout_s, 0
        while True:
            try:
                pool.wait(self.ref, self.since + (limit or math.inf))
                return ray.get(self.ref, timeout=limit and max(0.0, self.since + limit - time.monotonic()))
            except GetTimeoutError:
                why = f"gave no answer for {limit:g} s ({pool.key}.actors.timeout_s)"
                ray.kill(self.actor, no_restart=False)
            except LOST as error:
                if getattr(error, "actor_init_failed", False):
                    raise
                why = "was lost in a call"
            finally:
                pool.busy[self.actor] -= 1
            tried += 1
            pool.lost(self.actor, why, tried)
            self._send()
