"""Find a component by its key: the file's name in `algorithms/`, `backbones/` or `rewards/`, or ``package.module:Class`` from elsewhere.

A component is one class with a nested ``Config`` (a :class:`didr_core.config.Strict`), built as ``Class(config)``. A new file is a new key:
nothing has to be registered.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

from didr_core.contracts import DIDRError

KINDS = ("algorithms", "backbones", "rewards")


def names(kind: str) -> list[str]:
    """The bundled keys of ``kind``."""
    package = importlib.import_module(f"didr_core.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def find(kind: str, name: str) -> type[Any]:
    """The component class behind ``name``.

    Raises:
        DIDRError: unknown key (names the nearest), or a module without a component class.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise DIDRError(
                f"{kind}: cannot import {name!r} ({error}). Expected 'package.module:Class' on PYTHONPATH."
            ) from error
        if not hasattr(found, "Config"):
            raise DIDRError(f"{kind}: {name!r} has no nested Config class. See the README of didr_core/{kind}.")
        return found  # type: ignore[no-any-return]
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DIDRError(f"{kind}: unknown name {name!r}; known: {', '.join(known)}.{hint}")
    module = importlib.import_module(f"didr_core.{kind}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "Config"):
            return value
    raise DIDRError(f"{kind}: didr_core/{kind}/{name}.py defines no class with a nested Config.")
