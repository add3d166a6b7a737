"""When a pool should grow and shrink, and what its keeper does then, on a Ray that is scripted. With Ray: test_scoring.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from pipelines.cluster import keeper as module
from pipelines.cluster.keeper import IDLE_S, Keeper, change


@pytest.mark.parametrize(
    ("waiting", "actors", "idle_s", "by"),
    [
        (0.2, 1, 0.0, 0),  # waited for a fifth of the time
        (0.3, 1, 0.0, 1),
        (0.3, 2, 0.0, 0),
        (1.0, 3, 0.0, 1),  # one trainer that does nothing but wait: four actors
        (1.0, 4, 0.0, 0),
        (99.0, 5, 0.0, 0),  # there are no more
        (0.0, 2, IDLE_S - 1, 0),
        (0.0, 2, IDLE_S, -1),
        (0.0, 1, IDLE_S, 0),  # never below the fewest
        (99.0, 2, IDLE_S, -1),  # the end of a long wait
    ],
)
def test_a_pool_grows_where_calls_are_waited_for(waiting: float, actors: int, idle_s: float, by: int) -> None:
    assert change(waiting, actors, fewest=1, most=5, idle_s=idle_s) == by


class Actor:
    def __init__(self, ready: Any) -> None:
        self.answer, self.left = ready, False
        self.ready = SimpleNamespace(remote=lambda: self)


def test_an_actor_belongs_to_the_pool_when_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, started, asked = [100.0], list[Actor](), list[int]()
    answers: list[Any] = []  # of the actors that are started: None while they load

    def get(actor: Actor) -> None:
        if isinstance(actor.answer, Exception):
            raise actor.answer

    fake = SimpleNamespace(
        wait=lambda refs, timeout: ([r for r in refs if r.answer], []),
        get=get,
        kill=lambda actor: setattr(actor, "left", True),
    )
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def start() -> Actor:
        started.append(Actor(answers.pop(0)))
        return started[-1]

    first = Actor("ready")
    room = [False]
    keeper = Keeper([first], 4, start, lambda more: bool(asked.append(more)) or room[0], IDLE_S)

    def look(waited: float, seconds: float = 10.0) -> list[Actor]:
        clock[0] += seconds
        if waited:
            keeper.tell(waited)
        keeper.look()
        return keeper.actors

    assert look(9.0) == [first] and asked == [1] and not started, "no room"
    room[0], answers[:] = True, [None, "ready", RayActorError(), RayActorError(actor_init_failed=True)]
    assert look(9.0) == look(9.0) == [first] and len(started) == 1, "one at a time, and it loads"
    started[0].answer = "ready"
    assert look(9.0) == [first, started[0]]
    assert look(9.0) == [first, started[0]] and look(1.0) == [first, *started] and len(started) == 2
    assert asked == [1, 1, 2]
    assert look(30.0) == look(30.0) == [first, *started[:2]] and keeper.most == 4, "a third was lost, with its node say"
    assert look(30.0) == look(30.0) == [first, *started[:2]] and keeper.most == 3, "the next cannot be loaded"
    assert look(30.0) == [first, *started[:2]] and len(started) == 4, "and is not tried again"
    assert look(0.0, IDLE_S) == [first, started[0]] and started[1].left and not started[0].left
    assert look(0.0) == look(0.0) == [first] and started[0].left and not first.left
    answers[:] = [None]
    look(9.0)
    assert len(started) == 5 and look(0.0, IDLE_S) == [first] and keeper.coming is None, "not wanted any more"
