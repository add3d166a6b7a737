"""Find a component by its key: the file's name in `algorithms/`, `backbones/` or `rewards/`, or from elsewhere ``package.module:Class`` (on
PYTHONPATH) or ``path/to/file.py:Class``.

A component is one class with a nested ``Config`` (a :class:`didr_core.config.Strict`), built as ``Class(config)``. A new file is a new key:
nothing has to be registered.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_serializer

from didr_core.config import hub
from didr_core.config.files import expanded
from didr_core.types import OPTIONAL, DIDRError

KINDS = {"algorithms": "Config", "backbones": "Config", "rewards": "Config", "drs": "estimate"}
"""Each kind is a package of `didr_core`; its components are the classes that have this attribute."""
METHODS = {
    "algorithms": ("generator_loss",),
    "rewards": ("load", "prepare", "score"),
    "backbones": ("encode", "x0", "generate", "decode"),
}
"""What one from outside is asked for by name, before anything is loaded."""
OWN = ("didr_core", "pipelines", "tune_spaces")
PLAIN = {"losses", "images", "problem", "remote"}  # public modules beside the components, which are none


def names(kind: str) -> list[str]:
    """The bundled keys of ``kind``."""
    package = importlib.import_module(f"didr_core.{kind}")
    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_") and m.name not in PLAIN
    )


def near(name: str, known: Iterable[str], alike: float = 0.6) -> str:
    """A blank and "Did you mean ...?" with the one of ``known`` that is most like ``name``; empty where none is."""
    found = difflib.get_close_matches(name, known, 3, alike)
    found.sort(key=lambda other: sorted(other) != sorted(name))  # letters that changed places come first
    return f" Did you mean {found[0]!r}?" if found else ""


def find(kind: str, name: str) -> type[Any]:
    """The component class behind ``name``, with defaults for what it leaves out (:data:`didr_core.types.OPTIONAL`).

    Raises:
        DIDRError: unknown key (names the nearest), or a module without a component class.
    """
    key = "drp.estimator" if kind == "drs" else kind
    if not isinstance(name, str):
        raise DIDRError(f"{key}: expected a name, got {name!r}")
    if ":" in name:
        return stand_in(name) or _outside(kind, key, name)
    known = names(kind)
    if name not in known:
        raise DIDRError(f"{key}: unknown name {name!r}; known: {', '.join(known)}.{near(name, known)}")
    module = importlib.import_module(f"didr_core.{kind}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, KINDS[kind]):
            return _complete(kind, value)
    raise DIDRError(f"{key}: didr_core/{kind}/{name}.py defines no class with {KINDS[kind]}.")


def _outside(kind: str, key: str, name: str) -> type[Any]:
    module_name, _, attribute = name.rpartition(":")
    try:
        found = getattr(_module(module_name), attribute)
    except Exception as error:  # whatever its own code raises
        top = name.partition(".")[0]
        hidden = f" {top!r} is DIDR's own package, it hides a folder of yours of that name." * (top in OWN)
        raise DIDRError(
            f"{key}: cannot import {name!r} ({type(error).__name__}: {error}). Expected 'package.module:Class' on PYTHONPATH, or "
            f"'path/to/file.py:Class'.{hidden}"
        ) from error
    see = f"See the README of didr_core/{kind}."
    own = getattr(found, "Config", None)
    if KINDS[kind] == "Config" and not (isinstance(own, type) and issubclass(own, Component)):
        raise DIDRError(f"{key}: {name!r} has no nested Config class, a didr_core.config.Component. {see}")
    if missing := [m for m in METHODS.get(kind, (KINDS[kind],)) if not callable(getattr(found, m, None))]:
        raise DIDRError(f"{key}: {name!r} has no method {' and no method '.join(missing)}. {see}")
    return _complete(kind, found)


def _complete(kind: str, component: type[Any]) -> type[Any]:
    for name, default in OPTIONAL[kind].items():
        if not hasattr(component, name):
            setattr(component, name, default)
    if kind == "rewards" and not issubclass(component.Config, Placed):
        own = component.Config
        named = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        component.Config = type("Config", (own, Placed), named)
    return component


def _module(name: str) -> ModuleType:
    """A module by its name, or by the path of its file. A file keeps one module per path for the life of the process."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = expanded(name).resolve()
    alias = f"didr_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module  # pydantic looks the names of annotations up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]


WORLD = Path(__file__).parents[1] / "world" / "files"


class Strict(BaseModel):
    """Base of every section: frozen, no unknown keys, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def component(kind: str) -> BeforeValidator:
    """For a field that names a component of ``kind``; see :func:`configured`."""
    return BeforeValidator(partial(configured, kind))


def configured(kind: str, value: Any) -> Any:
    """A name, or a mapping with ``name``, as that component's own Config.

    Raises:
        ValueError: it has no name, or options that are not the component's.
    """
    if isinstance(value, BaseModel) or value is None:
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"expected a name or a mapping with 'name', got {value!r}")
    try:
        return (own := find(kind, value["name"]).Config).model_validate(dict(value))
    except ValidationError as error:
        raise ValueError("; ".join(explain_own(e, own, value["name"]) for e in error.errors())) from None


def explain_own(error: Any, own: type[BaseModel], name: str) -> str:
    """One of pydantic's errors in words, of the options ``own`` that belong to ``name``."""
    key, value = ".".join(str(p) for p in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        known = [k for k in own.model_fields if k != "name"]
        hint = near(key.rpartition(".")[2], known, 0.5) or f" It has {', '.join(known) or 'no options'}."
        return f"{name} has no key {key!r} (value {value!r}).{hint}"
    got = "" if isinstance(value, Mapping) else f" (got {value!r})"
    return f"{name}: {key}: {error['msg'].removeprefix('Value error, ')}{got}"


class Component(Strict):
    """Base of a component's own Config: its key and its options."""

    name: str = Field(description="which one, by the name of its file; or package.module:Class, file.py:Class")

    def exported(self, folder: Path) -> Self:
        """A backbone's config, with what its `export` wrote into ``folder`` as the generator: by default a whole pipeline."""
        return self.model_copy(update={"pipeline": str(folder), "generator": None})


class Actors(Strict):
    """The pool of a reward that is scored in actors (Ray)."""

    count: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="actors; [1, 4]: one, up to four while calls are waited for and there is room; none = workers.rewards",
    )
    cpus: float | None = Field(None, ge=0, description="CPUs of each; none = workers.reward_cpus")
    gpus: float | None = Field(None, ge=0, description="GPUs of each, or a part of one; none = workers.reward_gpus")
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray's runtime_env of their own (pip, env_vars, ...): dependencies that conflict",
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds from the sending of a call after which its actor is started again and another one asked; none = no limit but "
        "workers.patience_s, which stops the run",
    )
    tries: int = Field(3, ge=1, description="actors that one call may lose before the run stops")

    @property
    def counts(self) -> tuple[int, int]:
        """Fewest and most actors."""
        fewest, most = self.count if isinstance(self.count, tuple) else (self.count or 1,) * 2
        return min(fewest, most), max(fewest, most)


class Placed(Component):
    """What every reward's own Config has beside its options, see :func:`_complete`. Written down only where it says something."""

    placement: Literal["local", "actors"] = Field(
        "local",
        description="where the model is in training: beside each trainer, or in a pool of actors (Ray) that all ask",
    )
    actors: Actors = Actors()

    @model_serializer(mode="wrap")
    def _short(self, write: Any) -> dict[str, Any]:
        tree: dict[str, Any] = write(self)
        usual = {"placement": "local", "actors": Actors().model_dump()}
        return {key: value for key, value in tree.items() if key not in usual or value != usual[key]}


class StandIn:
    """In place of a component whose code is not loaded: takes any option, and what it needs is not known."""

    needs_reward = needs_assistant = differentiable = True
    needs_reward_gradient = uses_drs = False
    steps = particles = 1

    class Config(Component, extra="allow"):
        """Options as they were given."""

    @staticmethod
    def check(*_: Any) -> None:
        """Only its own code could tell."""


_unread: ContextVar[list[str] | None] = ContextVar("_unread", default=None)


@contextmanager
def code_unread() -> Iterator[list[str]]:
    """For commands that do not train: inside, components from outside of this package are :class:`StandIn`; yields the names met."""
    names: list[str] = []
    token = _unread.set(names)
    try:
        yield names
    finally:
        _unread.reset(token)


def stand_in(name: str) -> type[StandIn] | None:
    """For ``name``, "module:Class" or "file.py:Class", inside of :func:`code_unread`; None for this package's own."""
    names = _unread.get()
    own = name.startswith("didr_core.") and not name.rpartition(":")[0].endswith(".py")
    if names is None or own:
        return None
    names += [name] if name not in names else []
    return StandIn


def build(kind: str, config: Component) -> Any:
    """The component that ``config`` describes; a reward keeps to :mod:`didr_core.config.reward_contract`."""
    made = find(kind, config.name)(config)
    if kind != "rewards":
        return made
    from didr_core.config import reward_contract  # needs torch, which a plan does not

    return reward_contract.kept(made, config.name)


def bundled(path: str) -> Path | None:
    """Where ``world://x`` lies in the bundled world (runs before 0.2 wrote ``zoo://x``); None of any other path."""
    scheme, is_address, rest = path.partition("://")
    return WORLD / rest if is_address and scheme in ("world", "zoo") else None


def locate(path: str) -> Path:
    """``world://x`` is inside the bundled world; a path that is there is that path; ``owner/model`` is what the hub's cache has of it."""
    place = bundled(path) or expanded(path)
    return place if place.exists() else hub.cached(path) or place
