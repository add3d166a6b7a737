"""Work elsewhere, in another process or a thread, and the user's mistake found again in whatever Ray makes of an error."""

from __future__ import annotations

import importlib
import re
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError, UnserializableException
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from didr_core.train.ending import in_words
from didr_core.types import DIDRError
from pipelines.cluster.resources import Need

LOOK_S = 5.0
_ADVICE = re.compile(r"(\\n|\n)?Failed to apply UDF transform after .*? to be transient\.", re.DOTALL)  # of Ray Data


def elsewhere(
    need: Need, function: Callable[..., Any], *arguments: Any, meanwhile: Callable[[], None] = lambda: None
) -> Any:
    """``function(*arguments)`` in a process of its own that reserves ``need``: this one may have no GPU.

    Args:
        meanwhile: called every few seconds while it lasts, to show a sign of life.

    Raises:
        DIDRError: what the function raised; see :func:`users_mistake`.
    """
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # that of a Tune trial holds its driver only
    task = ray.remote(**need.options(), scheduling_strategy=outside)(function)
    waiting = task.remote(*arguments)
    try:
        while not ray.wait([waiting], timeout=LOOK_S)[0]:
            meanwhile()
        return ray.get(waiting)
    except RayError as error:
        if mistake := users_mistake(error):
            raise mistake from error
        raise


def by_name(module: str, function: str) -> Callable[[Any], Any]:
    """A function of one argument, imported where it is called and not where it passes through: torch takes Ray's helpers a second each."""

    def call(argument: Any) -> Any:
        return getattr(importlib.import_module(module), function)(argument)

    return call


def in_thread(function: Callable[..., None], *arguments: Any) -> Future[None]:
    """``function(*arguments)`` in a thread: in the main thread Ray Train would take Ctrl-C for itself."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            function(*arguments)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a pool's threads would be waited for at exit
    return future


def users_mistake(error: BaseException) -> DIDRError | None:
    """What somebody has to mend, because it would go wrong again; None for the death of a process or a node, which would not.

    Ray's own errors are deaths, but for those that carry what user code raised, and so is a collective call that lost a peer.
    """
    root = error
    while isinstance(cause := getattr(root, "cause", None), BaseException):  # as it crossed process borders
        root = cause
    calls = traceback.extract_tb(root.__traceback__)
    if calls and "/torch/distributed/" in calls[-1].filename:
        return None
    carries = getattr(root, "actor_init_failed", False) or type(root) in (RayError, UnserializableException)
    if type(root).__module__.startswith("ray.") and not carries:
        return None
    return DIDRError(_ADVICE.sub("", in_words(root if isinstance(root, DIDRError) else error)))
