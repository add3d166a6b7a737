"""A function called in another process of the cluster, and the user's mistake found again in whatever Ray makes of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from didr_core.types import DIDRError
from pipelines.cluster.resources import Need

LOOK_S = 5.0


def elsewhere(
    need: Need, function: Callable[..., Any], *arguments: Any, meanwhile: Callable[[], None] = lambda: None
) -> Any:
    """``function(*arguments)`` in a process of its own that reserves ``need``: this one may have no GPU.

    Args:
        meanwhile: called every few seconds while it lasts, to show a sign of life.

    Raises:
        DIDRError: what the function raised as one.
    """
    outside = PlacementGroupSchedulingStrategy(placement_group=None)  # that of a Tune trial holds its driver only
    task = ray.remote(**need.options(), scheduling_strategy=outside)(function)
    waiting = task.remote(*arguments)
    try:
        while not ray.wait([waiting], timeout=LOOK_S)[0]:
            meanwhile()
        return ray.get(waiting)
    except ray.exceptions.RayTaskError as error:
        if mistake := users_mistake(error):
            raise mistake from None
        raise


def users_mistake(error: BaseException | None) -> DIDRError | None:
    """The DIDRError at the root of ``error``, which may have crossed process borders of Ray on its way here."""
    seen: list[BaseException] = []
    found: DIDRError | None = None
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, DIDRError):
            found = error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return found
