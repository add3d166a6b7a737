"""Search spaces as plain data: found by name or file, checked against the configuration, turned into points. No Ray.

space = find("tilt_by_drp")
points = draw(space, "random", trials=12, seed=0)   # [{"drp.beta": 0.21, "drp.steps": 4}, ...]
check(space, points, "tiny", ["train.steps=100"])   # DIDRError names the key, before anything starts
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from didr_core import config as configs
from didr_core.config import Config
from didr_core.types import DIDRError

Point = dict[str, Any]
"""Swept key to value: what one trial has of its own."""

KINDS = ("loguniform", "uniform", "choice", "grid")
PACKAGE = "tune_spaces"
GRID_POINTS = 4  # of a range, where a grid is asked for
CORNERS = 256
DEFAULT_TRIALS = 12
NOT_SWEPT = ("evaluation", "data.heldout", "judge", "backbone", "workers", "tracking", "output", "name", "device")
"""Trials that differ in these are judged differently, or share no start: they cannot be compared."""


@dataclass(frozen=True)
class Domain:
    """What one key may be: a range (two numbers) or a list of values."""

    kind: str
    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value at ``share`` in [0, 1] of the domain."""
        if self.kind in ("choice", "grid"):
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "uniform":
            return float(f"{low + share * (high - low):.4g}")
        return float(f"{math.exp(math.log(low) + share * (math.log(high) - math.log(low))):.4g}")

    def grid(self) -> list[Any]:
        """All values; of a range :data:`GRID_POINTS` evenly spaced ones, both ends among them."""
        if self.kind in ("choice", "grid"):
            return list(self.values)
        return [self.at(i / (GRID_POINTS - 1)) for i in range(GRID_POINTS)]

    def ends(self) -> list[Any]:
        """What to check where not every value can be: the ends of a range, or all values."""
        return list(self.values)


@dataclass(frozen=True)
class Space:
    """A named space: what is swept, and what every trial has."""

    name: str
    about: str
    domains: Mapping[str, Domain]
    fixed: Mapping[str, Any]

    def tree(self) -> dict[str, Any]:
        """Plain data, as `space()` gave it."""
        return {k: {d.kind: list(d.values)} for k, d in self.domains.items()} | dict(self.fixed)

    @property
    def is_grid(self) -> bool:
        """Nothing but lists marked "grid"."""
        return all(d.kind == "grid" for d in self.domains.values())


def names() -> list[str]:
    """Spaces that come with this repository."""
    folder = Path(import_module(PACKAGE).__file__ or "").parent
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def find(name: str) -> Space:
    """The space of that name, or of the user's file at that path.

    Raises:
        DIDRError: unknown name, no such file, no `space()`, or something else than the plain data that README.md describes.
    """
    if name.endswith(".py"):
        path = Path(name).expanduser()
        spec = importlib.util.spec_from_file_location(f"didr_space_{path.stem}", path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise DIDRError(f"--space {name!r}: no such file. Expected a Python file with a function space().")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise DIDRError(f"--space {name!r}: cannot be read ({type(error).__name__}: {error})") from error
    elif name in names():
        module = import_module(f"{PACKAGE}.{name}")
    else:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DIDRError(f"--space {name!r}: unknown; known: {', '.join(names())}, or a path ending in .py.{hint}")
    function = getattr(module, "space", None)
    if not callable(function):
        raise DIDRError(f"--space {name!r}: has no function space(). Expected `def space() -> dict`.")
    lines = (module.__doc__ or function.__doc__ or "").strip().splitlines()
    return read(Path(name).stem, function(), lines[0] if lines else "")


def read(name: str, tree: Any, about: str = "") -> Space:
    """Plain data to a :class:`Space`.

    Raises:
        DIDRError: not a mapping of dotted keys, an unknown kind, an empty list, an impossible range, a key that must not be swept.
    """
    if not isinstance(tree, Mapping) or not all(isinstance(k, str) for k in tree):
        raise DIDRError(f"space {name!r}: expected a dict of dotted keys, got {type(tree).__name__}")
    swept = {k: _domain(name, k, v) for k, v in tree.items() if _is_domain(v)}
    if not swept:
        raise DIDRError(f"space {name!r}: sweeps nothing. Give a key a domain, e.g. {{'loguniform': [0.05, 1.0]}}.")
    for key in swept:
        if any(key == no or key.startswith(f"{no}.") for no in NOT_SWEPT):
            raise DIDRError(
                f"space {name!r}: {key!r} must not be swept: trials would not be comparable. Set one value for all, here or with --set."
            )
    return Space(name, about, swept, {k: v for k, v in tree.items() if k not in swept})


def _is_domain(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and isinstance(next(iter(value.values())), list | tuple)


def _domain(name: str, key: str, value: Mapping[str, Any]) -> Domain:
    kind, values = next(iter(value.items()))
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DIDRError(f"space {name!r}: {key}: unknown kind {kind!r}; known: {', '.join(KINDS)}.{hint}")
    if kind in ("choice", "grid"):
        if not values or len(set(map(repr, values))) < len(values):
            raise DIDRError(
                f"space {name!r}: {key}: {kind} of {list(values)!r}; expected different values, one at least"
            )
        return Domain(kind, tuple(values))
    numbers = len(values) == 2 and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not numbers or values[0] >= values[1] or (kind == "loguniform" and values[0] <= 0):
        least = "0 < low < high" if kind == "loguniform" else "low < high"
        raise DIDRError(f"space {name!r}: {key}: {kind} of {list(values)!r}; expected [low, high] with {least}")
    return Domain(kind, tuple(values))


def draw(space: Space, search: str, trials: int | None, seed: int) -> list[Point]:
    """The points of a sweep in the order they are tried.

    "grid": all combinations, in an order shuffled by ``seed``, so that a sweep cut short still covers the space.
    "random": a Latin hypercube of ``trials`` points: each key alone is spread evenly.
    """
    rng = random.Random(seed)
    if search == "grid":
        rows = _product(d.grid() for d in space.domains.values())
        rng.shuffle(rows)
        return [dict(zip(space.domains, row, strict=True)) for row in rows[:trials]]
    count = trials or DEFAULT_TRIALS
    columns = {}
    for key, domain in space.domains.items():
        strata = rng.sample(range(count), count)
        columns[key] = [domain.at((place + rng.random()) / count) for place in strata]
    return [{key: column[i] for key, column in columns.items()} for i in range(count)]


def _product(lists: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*lists))


def corners(space: Space) -> list[Point]:
    """Points that stand for a space whose points are not known beforehand."""
    rows = _product(d.ends() for d in space.domains.values())[:CORNERS]
    return [dict(zip(space.domains, row, strict=True)) for row in rows]


def settings(point: Mapping[str, Any]) -> list[str]:
    """A point in words that `--set` understands: for commands and messages; the code passes points on as they are."""
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def shown(point: Mapping[str, Any]) -> str:
    """``beta 0.21, steps 4``: the last word of each key."""
    parts = ((key.rpartition(".")[2], value) for key, value in point.items())
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in parts)


def check(space: Space, points: Sequence[Point], recipe: str, overrides: Sequence[str]) -> Config:
    """Every point against the configuration model; returns the configuration of the first, which is what trials share.

    ``overrides`` win over what the space fixes.

    Raises:
        DIDRError: names the key and the point; also where ``--set`` fixes what the space sweeps.
    """
    taken = [item.partition("=")[0].strip() for item in overrides]
    for item, key in zip(overrides, taken, strict=True):
        if key in space.domains:
            raise DIDRError(
                f"--set {item!r}: the space {space.name!r} sweeps {key}. Leave it out, or use a space of your own without it."
            )
    configs.load(recipe, overrides)  # mistakes of the recipe or of --set, in their own words
    fixed = {key: value for key, value in space.fixed.items() if key not in taken}
    checked = []
    for point in points:
        own = fixed | point
        try:
            checked.append(configs.load(recipe, overrides, own))
        except DIDRError as error:
            raise DIDRError(f"space {space.name!r}, point {' '.join(settings(own))}: {error}") from None
    return checked[0]
