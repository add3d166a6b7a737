"""From a recipe to a :class:`Config`: YAML with one ``base:`` each, ``--set a.b=c`` on top, mistakes in words that name the nearest key."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from didr_core.config.files import expanded, mapping, read_yaml, typed
from didr_core.config.passwords import redacted
from didr_core.config.registry import Component, explain_own, near
from didr_core.config.schema import Config
from didr_core.types import DIDRError


def _recipes() -> Path:
    """Named recipes belong to the package `pipelines`, wherever it is installed; it is found, not imported."""
    package = importlib.util.find_spec("pipelines")
    return Path(next(iter((package and package.submodule_search_locations) or ["pipelines"]))) / "recipes"


RECIPES = _recipes()
RENAMED = {
    "backbone.decode_checkpointing": "backbone.decode_gradient_checkpointing",
    "roles.checkpointing": "roles.gradient_checkpointing",
    "roles.shard": "roles.fsdp",
    "drp.checkpointing": "drp.gradient_checkpointing",
    "generator.clip": "generator.max_grad_norm",
    "assistant.clip": "assistant.max_grad_norm",
    "train.ema": "train.ema_decay",
    "drp.split": "drp.split_noise",
}
"""Keys by the names they had before, and by today's."""
REDEFINED = {"drp.split": " It was a time and is a noise level now, sigma / alpha: leave it out for the default."}
"""Of these, what changed its meaning with its name, and how: old values are not carried over."""


def load(recipe: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """A recipe's name (in `pipelines/recipes`) or a YAML file's path; on top ``a.b=c`` overrides, then ``values`` by dotted key.

    Raises:
        DIDRError: unknown recipe or key (names the nearest), or a value out of its range.
    """
    return _validate_with(_read(str(recipe)), overrides, values, f"recipe {str(recipe)!r}")


def recorded(path: Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """The configuration that a run or an export wrote down, whatever version wrote it: renamed keys are read by their old names, too.

    Raises:
        DIDRError: it is missing or damaged, or see :func:`load`.
    """
    restore = "Restore it: run.json has the command that made it, export/config.yaml all but tracking and folders"
    if not path.is_file():
        raise DIDRError(f"{path}: is missing. {restore}.")
    tree = mapping(path.read_bytes(), str(path), restore, read_yaml)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        if isinstance(below := tree.get(section), dict) and key in below:
            value = below.pop(key)
            if old not in REDEFINED:
                below[new.partition(".")[2]] = value
    if "evaluation" not in tree:  # the last section of an export: defaults would stand in for what a cut took
        raise DIDRError(f"{path}: cut short, 'evaluation' is not in it. {restore}.")
    return _validate_with(tree, overrides, values, str(path))


def validate(tree: Mapping[str, Any], where: str = "config") -> Config:
    """A plain tree to a Config, with errors in words."""
    given = flatten(tree)
    if old := next((key for key in RENAMED if key in given), None):
        now = RENAMED[old] + "'." + REDEFINED.get(old, "")
        raise DIDRError(f"{where}: {old!r} (value {given[old]!r}) is now called '{now}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise DIDRError(redacted("\n".join(_explain(e, where) for e in error.errors()))) from error


def dump(config: Config) -> dict[str, Any]:
    """The resolved tree, as plain YAML/JSON values; `validate(dump(c)) == c`, but for passwords in addresses: they are hidden."""
    return json.loads(redacted(json.dumps(config.model_dump(mode="json"), ensure_ascii=False)))  # type: ignore[no-any-return]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``, for trackers and tables."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(recipe: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if recipe in seen:
        raise DIDRError(f"recipe {recipe!r}: `base:` goes in a circle: {' -> '.join((*seen, recipe))}")
    path = expanded(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        hint = near(recipe, known)
        raise DIDRError(f"recipe: unknown {recipe!r}; known: {', '.join(known)}, or a path ending in .yaml.{hint}")
    tree = mapping(path.read_bytes(), f"recipe {recipe!r}", parse=read_yaml)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise DIDRError(f"recipe {recipe!r}: base={base!r}: expected the name or the file of one recipe")
    beside = path.parent / expanded(base)
    return _merge(_read(str(beside) if beside.is_file() else base, (*seen, recipe)), tree)


def _validate_with(
    tree: dict[str, Any], overrides: Sequence[str], values: Mapping[str, Any] | None, where: str
) -> Config:
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise DIDRError(f"--set {item!r}: expected KEY=VALUE, e.g. --set drp.beta=0.5")
        try:
            _assign(tree, key.strip(), typed(text))
        except yaml.YAMLError as error:
            raise DIDRError(
                f"--set {item!r}: {' '.join(str(error).split())}. Expected KEY={{name: value, ...}}."
            ) from error
    for key, value in (values or {}).items():
        _assign(tree, key, copy.deepcopy(value))  # a later key may lie inside this value
    return validate(tree, where)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``; a component whose name changes replaces the whole section."""
    merged = dict(base)
    for key, value in top.items():
        old: Any = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        same = both and value.get("name", old.get("name")) == old.get("name")
        merged[key] = _merge(dict(old), value) if same else value
    return merged


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    if not rest:
        named = isinstance(value, str) and head in ("algorithm", "reward", "judge", "backbone")
        tree.update(_merge(tree, {head: {"name": value} if named else value}))
        return
    below = tree.setdefault(head, {})
    if not isinstance(below, dict):
        tree[head] = below = {"name": below} if isinstance(below, str) else {}
    _assign(below, rest, value)


def _explain(error: Any, where: str) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys()
        last = near(key.rpartition(".")[2], [k.rpartition(".")[2] for k in known])
        hint = near(key, known, 0.5) or last or " See `didr config show`."
        return f"{where}: unknown key {key!r} (value {error['input']!r}).{hint}"
    if error["type"] == "missing":
        return f"{where}: {key!r} is missing; it has no default."
    return explain_own(error, Config, where)


def _known_keys(model: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in (model or Config).model_fields.items():
        keys.append(prefix + name)
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel) and part is not Component:
                keys += _known_keys(part, f"{prefix}{name}.")
    return keys
