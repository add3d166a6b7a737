"""`didr explain`: what a key of a recipe means, what it may be, and what a recipe makes of it."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Column, Table

from didr_core import config as configs
from didr_core.config import registry
from didr_core.train.alarms import SENTENCES
from didr_core.types import DIDRError
from pipelines.cli.show import say_unread

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Key(NamedTuple):
    """One key: its dotted path, what is known of it, and its value in a recipe."""

    path: str
    info: FieldInfo
    value: Any
    about: str

    @property
    def allowed(self) -> str:
        """Types and bounds in words: ``a number > 0``."""
        bounds = [
            f"{sign} {getattr(rule, name)}"
            for rule in self.info.metadata
            for name, sign in _BOUNDS.items()
            if getattr(rule, name, None) is not None
        ]
        first, *rest = _in_words(self.info.annotation).split(", ")
        return ", ".join([" ".join([first, *bounds]), *rest])

    @property
    def meaning(self) -> str:
        """Its description; of an alarm's threshold the alarm's sentence; else what its section or component says of itself."""
        name = self.path.rpartition(".")[2]
        return self.info.description or next((s for s in SENTENCES.values() if f"{{{name}:" in s), self.about)


def explain(key: str | None, recipe: str, overrides: Sequence[str]) -> None:
    """Print the key, or all keys below it, or all there are.

    Raises:
        DIDRError: no such key.
    """
    out = Console(highlight=False, markup=False)
    with registry.code_unread() as unread:
        config = configs.load(recipe, overrides)
        found = [k for k in keys(config) if not key or k.path == key or k.path.startswith(f"{key}.")]
    if not found:
        known = {k.path for k in keys(config)}
        near = difflib.get_close_matches(str(key), known | {path.rpartition(".")[0] for path in known}, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DIDRError(f"explain {key}: no such key in recipe {recipe!r}.{hint} `didr explain` lists all.")
    key_column = Column("key", overflow="fold")  # never cut
    table = Table(key_column, f"in {config.name}", "may be", "what it is", box=None, header_style="bold")
    for k in found:
        table.add_row(k.path, str(k.value), k.allowed, k.meaning)
    out.print(table)
    say_unread(out, unread)


def keys(model: BaseModel, above: str = "") -> Iterator[Key]:
    """All keys of ``model``; sections and components that are not there stand for themselves."""
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from keys(value, f"{above}{name}.")
        else:
            yield Key(f"{above}{name}", info, value, inspect.getdoc(type(model)) or "")


def _in_words(kind: Any) -> str:
    """``int | Literal["auto"] | None`` as "an integer, auto or none"."""
    words = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none"}
    if kind in words:
        return words[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(str(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_in_words(part) for part in parts)
    if origin is typing.Annotated:
        return _in_words(parts[0])
    if origin is tuple:
        return f"list of {_in_words(parts[0])}"
    if origin is dict:
        return f"mapping to {_in_words(parts[1])}"
    return "section" if isinstance(kind, type) and issubclass(kind, BaseModel) else str(kind)
