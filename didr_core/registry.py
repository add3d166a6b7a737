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
from pathlib import Path
from types import ModuleType
from typing import Any

from didr_core.contracts import DIDRError

KINDS = ("algorithms", "backbones", "rewards")
PLAIN = {"full_size"}  # public modules beside the components, which are none


def names(kind: str) -> list[str]:
    """The bundled keys of ``kind``."""
    package = importlib.import_module(f"didr_core.{kind}")
    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_") and m.name not in PLAIN
    )


def find(kind: str, name: str) -> type[Any]:
    """The component class behind ``name``.

    Raises:
        DIDRError: unknown key (names the nearest), or a module without a component class.
    """
    if ":" in name:
        module_name, _, attribute = name.rpartition(":")
        try:
            found = getattr(_module(module_name), attribute)
        except (ImportError, AttributeError, SyntaxError, OSError) as error:
            raise DIDRError(
                f"{kind}: cannot import {name!r} ({error}). Expected 'package.module:Class' on PYTHONPATH, or 'path/to/file.py:Class'."
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


def _module(name: str) -> ModuleType:
    """A module by its name, or by the path of its file. A file keeps one module per path for the life of the process."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).expanduser().resolve()
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
