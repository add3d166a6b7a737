"""Search spaces as plain data: found by name or file, checked against the configuration, turned into points. No Ray.

space = find("tilt_by_drp")
points = draw(space, "random", trials=12, seed=0)   # [{"drp.beta": 0.21, "drp.steps": 4}, ...]
check(space, points, "tiny", ["train.steps=100"])   # DIDRError names the key, before anything starts
"""

from __future__ import annotations

import itertools
import json
import math
import random
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.files import expanded
from didr_core.config.registry import near
from didr_core.types import DIDRError

Point = dict[str, Any]
"""Swept key to value: what one trial has of its own."""

RANGES, LISTS = ("loguniform", "uniform"), ("choice", "grid")
PACKAGE = "tune_spaces"
GRID_POINTS = 4  # of a range, where a grid is asked for
CORNERS = 256
DEFAULT_TRIALS = 12
NOT_SWEPT = ("evaluation", "data.heldout", "judge", "backbone", "workers", "tracking", "output", "name", "device")
"""Trials that differ in these are judged differently, or share no start: they cannot be compared."""
PLAIN = "a plain value for all trials, or {'loguniform': [0.05, 1.0]}, {'uniform': [0, 1]}, {'choice': [1, 2]}, {'grid': [1, 2]}"


@dataclass(frozen=True)
class Domain:
    """What one key may be: a range (two numbers) or a list of values."""

    kind: str
    values: tuple[Any, ...]

    @property
    def listed(self) -> bool:
        """A list, not a range."""
        return self.kind in LISTS

    def at(self, share: float) -> Any:
        """The value at ``share`` in [0, 1] of the domain."""
        if self.listed:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "uniform":
            return self.rounded(low + share * (high - low))
        return self.rounded(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))

    def rounded(self, value: float) -> float:
        """To four digits, but never out of the range, whose ends may have more."""
        return float(min(max(float(f"{value:.4g}"), self.values[0]), self.values[1]))

    def grid(self) -> list[Any]:
        """All values; of a range :data:`GRID_POINTS` evenly spaced ones, both ends among them."""
        return list(self.values) if self.listed else [self.at(i / (GRID_POINTS - 1)) for i in range(GRID_POINTS)]


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

    def product(self, values: Sequence[Sequence[Any]]) -> list[Point]:
        """Every combination of these values of each key."""
        return [dict(zip(self.domains, row, strict=True)) for row in itertools.product(*values)]


def names() -> list[str]:
    """Spaces that come with this repository."""
    return sorted(p.stem for p in _folder().glob("*.py") if not p.stem.startswith("_"))


def _folder() -> Path:
    return Path(import_module(PACKAGE).__file__ or "").parent


def find(name: str) -> Space:
    """The space of that name, or of the user's file at that path.

    Raises:
        DIDRError: unknown name, no such file, no `space()`, or something else than the plain data that README.md describes.
    """
    own = name.endswith(".py")
    path = expanded(name) if own else _folder() / f"{name}.py"
    if own and not path.is_file():
        raise DIDRError(f"--space {name!r}: no such file. Expected a Python file with a function space().")
    if not own and name not in names():
        hint = near(name, names())
        raise DIDRError(f"--space {name!r}: unknown; known: {', '.join(names())}, or a path ending in .py.{hint}")
    try:
        module = runpy.run_path(str(path))
    except Exception as error:
        raise DIDRError(f"--space {name!r}: cannot be read ({type(error).__name__}: {error})") from error
    function = module.get("space")
    if not callable(function):
        raise DIDRError(f"--space {name!r}: has no function space(). Expected `def space() -> dict`.")
    lines = (module["__doc__"] or function.__doc__ or "").strip().splitlines()
    try:
        tree = function()
    except Exception as error:
        raise DIDRError(f"--space {name!r}: space() raised {type(error).__name__}: {error}") from error
    return read(path.stem, tree, lines[0] if lines else "")


def read(name: str, tree: Any, about: str = "") -> Space:
    """Plain data to a :class:`Space`.

    Raises:
        DIDRError: not a mapping of dotted keys to plain data, an unknown kind, an empty list, an impossible range, a key that must not
            be swept.
    """
    if not isinstance(tree, Mapping) or not all(isinstance(k, str) for k in tree):
        raise DIDRError(f"space {name!r}: expected a dict of dotted keys, got {type(tree).__name__}")
    for key, value in tree.items():
        try:
            json.dumps(value)
        except TypeError as error:  # an object of ray.tune, a function
            form = f". This one is {form}" if (form := _plain_form(value)) else ""
            raise DIDRError(
                f"space {name!r}: {key}: {value!r} is no plain data ({error}); expected {PLAIN}{form}"
            ) from None
    swept = {k: _domain(name, k, v) for k, v in tree.items() if _is_domain(v)}
    if not swept:
        raise DIDRError(f"space {name!r}: sweeps nothing. Give a key a domain, e.g. {{'loguniform': [0.05, 1.0]}}.")
    for key in swept:
        if any(key == no or key.startswith(f"{no}.") for no in NOT_SWEPT):
            raise DIDRError(
                f"space {name!r}: {key!r} must not be swept: trials would not be comparable. Set one value for all, here or with --set."
            )
    return Space(name, about, swept, {k: v for k, v in tree.items() if k not in swept})


def _plain_form(value: Any) -> str:
    """What an object of `ray.tune`, or a function, is as plain data, as far as it can be; empty for other objects."""
    low, high = getattr(value, "lower", -math.inf), getattr(value, "upper", math.inf)
    if categories := getattr(value, "categories", None):
        return str({"choice": list(categories)})
    if isinstance(low, int) and isinstance(high, int) and high - low <= CORNERS:
        return str({"choice": list(range(low, high))})
    if math.isfinite(low) and math.isfinite(high):
        sampler = value.get_sampler()
        kind = type(getattr(sampler, "sampler", sampler)).__name__.lower()  # a rounded one has another inside
        return str({"loguniform" if "log" in kind else "uniform": [low, high]})
    return "a list of its values, {'choice': [...]}" if callable(value) or hasattr(value, "sample") else ""


def _is_domain(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and isinstance(next(iter(value.values())), list | tuple)


def _domain(name: str, key: str, value: Mapping[str, Any]) -> Domain:
    kind, values = next(iter(value.items()))
    got = f"space {name!r}: {key}: {kind} of {list(values)!r}"
    if kind in LISTS:
        if not values or len(set(map(repr, values))) < len(values):
            raise DIDRError(f"{got}; expected different values, one at least")
    elif kind in RANGES:
        numbers = len(values) == 2 and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or values[0] >= values[1] or (kind == "loguniform" and values[0] <= 0):
            least = "0 < low < high" if kind == "loguniform" else "low < high"
            raise DIDRError(f"{got}; expected [low, high] with {least}")
    else:
        hint = near(str(kind), (*RANGES, *LISTS), 0.5)
        raise DIDRError(f"space {name!r}: {key}: unknown kind {kind!r}; expected {PLAIN}.{hint}")
    return Domain(kind, tuple(values))


def draw(space: Space, search: str, trials: int | None, seed: int) -> list[Point]:
    """The points of a sweep in the order they are tried.

    "grid": all combinations, in an order shuffled by ``seed``, so that a sweep cut short still covers the space.
    "random": a Latin hypercube of ``trials`` points: each key alone is spread evenly.
    """
    rng = random.Random(seed)
    if search == "grid":
        points = space.product([d.grid() for d in space.domains.values()])
        rng.shuffle(points)
        return points[:trials]
    count = trials or DEFAULT_TRIALS
    columns = []
    for domain in space.domains.values():
        strata = rng.sample(range(count), count)
        columns.append([domain.at((place + rng.random()) / count) for place in strata])
    return [dict(zip(space.domains, row, strict=True)) for row in zip(*columns, strict=True)]


def corners(space: Space) -> list[Point]:
    """Points that stand for a space whose points are not known beforehand: ends of ranges, values of lists."""
    return space.product([d.values for d in space.domains.values()])[:CORNERS]


def settings(point: Mapping[str, Any]) -> list[str]:
    """A point in words that `--set` understands: for commands and messages; the code passes points on as they are."""
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def given(overrides: Sequence[str]) -> dict[str, str]:
    """What `--set` says: key to text."""
    parts = (item.partition("=") for item in overrides)
    return {key.strip(): text for key, _, text in parts}


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
    taken = given(overrides)
    for key in space.domains.keys() & taken.keys():
        raise DIDRError(
            f"--set '{key}={taken[key]}': the space {space.name!r} sweeps {key}. Leave it out, or use a space of your own without it."
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
