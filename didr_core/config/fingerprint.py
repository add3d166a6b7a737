"""What a component's files and options are, as a short hash: what is kept on disk is named by it, and so is never that of other weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from didr_core.config.registry import Component, find, locate

WHERE = ("placement", "actors")
"""Options that say where a reward is, and change no number."""


def digest(*parts: Any) -> str:
    """16 hex digits of plain values, and of what the files at each ``Path`` hold (of a folder: all of them, with their names)."""
    told = [_held(part) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def component(kind: str, config: Component) -> str:
    """Of a component of any kind: its options, with what a path among them leads to in place of the path, and code that is the user's."""

    def told(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: told(below, name) for name, below in value.items() if name not in WHERE}
        if isinstance(value, list):
            return [told(below) for below in value]
        if key == "name" and ":" in value:
            return digest(value, Path(inspect.getfile(find(kind, value))))
        found = isinstance(value, str) and key != "name" and value and locate(value).exists()
        return _held(locate(value)) if found else value

    return digest(told(config.model_dump(mode="json")))


def _held(path: Path) -> list[list[str]]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [[str(f.relative_to(path)) if f != path else "", _of_file(f, f.stat().st_mtime_ns)] for f in files]


@functools.lru_cache(1024)
def _of_file(path: Path, changed: int) -> str:
    """A GB takes about a second; ``changed``: nanoseconds, so that a process reads a file once for each of its states."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
