"""Who keeps a pool whose size is a range (`reward.actors.count: [1, 4]`): one actor more while calls are waited for, one less when idle.

An actor of its own on the driver's machine, which reserves nothing. Whoever asks the pool tells it how long answers were waited for, and
hears who is in the pool. Seconds waited in a second are, by Little's law, calls that are waited for on average; what is away while a
trainer does something else delays nobody and does not count. The fewest actors are the driver's own and outlive their keeper.
`ray.util.ActorPool` does not scale, and Ray Serve, which does, needs packages that Ray Train does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

IDLE_S, LOOKS = 60.0, 6
"""How long nobody must have asked before an actor is given back; looks in that time, each of which changes the pool by one at most."""
WAITING = 0.25
"""Calls waited for, on average and for each actor, above which there should be another one."""


def change(waiting: float, actors: int, fewest: int, most: int, idle_s: float, patience_s: float = IDLE_S) -> int:
    """By how many actors a pool should change, 1, 0 or -1; ``waiting``: calls waited for on average, ``idle_s``: since anybody asked."""
    if idle_s >= patience_s:
        return -1 if actors > fewest else 0
    return 1 if actors < most and waiting > WAITING * actors else 0


class Keeper:
    """Starts and ends the actors beyond the fewest."""

    def __init__(
        self, actors: Sequence[Any], most: int, start: Callable[[], Any], has_room: Callable[[int], bool], idle_s: float
    ) -> None:
        """``actors``: the fewest. ``start``: one more. ``has_room``: for so many more than the fewest. ``idle_s``: :data:`IDLE_S`."""
        self.actors, self.fewest, self.most, self.idle_s = list(actors), len(actors), most, idle_s
        self.start, self.has_room = start, has_room
        self.coming: tuple[Any, Any] | None = None  # an actor that loads, and what answers when it has
        self.waited, self.since, self.asked = 0.0, time.monotonic(), time.monotonic()
        self.lock = threading.Lock()
        threading.Thread(target=self._keep, daemon=True).start()

    def tell(self, waited: float) -> list[Any]:
        """Who asks has waited for so many seconds since it told last. Returns the pool's actors."""
        with self.lock:
            self.waited, self.asked = self.waited + waited, time.monotonic()
            return self.actors

    def look(self) -> None:
        """Change the pool where it should be another one. An actor that loads belongs to it when it has loaded."""
        now = time.monotonic()
        waiting, idle_s, count = self.waited / (now - self.since), now - self.asked, len(self.actors)
        self.waited, self.since = 0.0, now
        by = change(waiting, count + (self.coming is not None), self.fewest, self.most, idle_s, self.idle_s)
        if self.coming:
            actor, ready = self.coming
            if ray.wait([ready], timeout=0)[0]:
                self.coming = None
                try:
                    ray.get(ready)
                    self.actors = [*self.actors, actor]
                except RayError as error:
                    if getattr(error, "actor_init_failed", False):  # no GPU has room for it beside the others, say
                        self.most = count
                    print(f"a scoring actor beside {count} others did not come: {error}", flush=True)
            elif by < 0:
                self.coming = None  # Ray ends what nobody has a handle of
        elif by > 0 and self.has_room(count + 1 - self.fewest):
            actor = self.start()
            self.coming = actor, actor.ready.remote()
        elif by < 0:
            *self.actors, last = self.actors
            ray.kill(last)

    def _keep(self) -> None:
        while True:
            time.sleep(self.idle_s / LOOKS)
            with self.lock:
                try:
                    self.look()
                except Exception as error:  # Ray's head does not answer, say: the next look may find it again
                    print(f"the pool stays as it is: {error}", flush=True)
