"""Plans on disk: making one takes seconds, and it follows from things that can be hashed.

A plan is kept under the hash of all that decides it: the resolved config, what lies in the folders and files that its models are named by,
this package's own source, and the versions of what it is made with. Change any of them, and it is made again. Components of the user's
own decide plans by code that nobody hashed, so their plans are not kept. Files that are damaged are ignored, and so is a folder that cannot
be written: a plan is made, then.

``DIDR_CACHE`` names the folder (default: ``didr`` in ``XDG_CACHE_HOME``, or in ``~/.cache``); empty, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import didr_core
from didr_core.config import Config, files, hub, locate

MOST = 200
"""Plans that are kept; the oldest go."""
SMALL = 2**20
"""Bytes of a JSON file of a model whose content is hashed; of other files, size and time of the last change are."""
MADE_WITH = ("torch", "diffusers", "transformers", "peft", "accelerate")
OWN_CODE = re.compile(r'"(name|estimator)":"[^"]*:')

Tree = dict[str, Any]
_HERE: dict[str, Tree] = {}  # of this process


def kept(config: Config, make: Callable[[], Tree]) -> Tree:
    """What ``make`` gives for ``config``, from this process, the disk, or made now. It is JSON; what is empty is not written."""
    key = key_of(config)
    if key not in _HERE:
        home = folder()
        path = home / f"{key}.json" if home and not OWN_CODE.search(config.model_dump_json()) else None
        _HERE[key] = (path and _read(path)) or make()
        if path and _HERE[key]:
            _write(path, _HERE[key])
    return _HERE[key]


def folder() -> Path | None:
    """Where plans are kept; None: nowhere."""
    try:
        return files.cache_folder() / "plans" if os.environ.get("DIDR_CACHE", "given") else None
    except RuntimeError:  # nobody's home
        return None


def key_of(config: Config) -> str:
    """The hash of all that decides the plan of ``config``."""
    told = hashlib.sha256()
    for part in _deciding(config):
        told.update(f"{len(part)}:".encode() + part)
    return told.hexdigest()


def _deciding(config: Config) -> Iterator[bytes]:
    yield config.model_dump_json().encode()
    for name in ("python", *MADE_WITH):
        yield (platform.python_version() if name == "python" else metadata.version(name)).encode()
    source = Path(didr_core.__file__).parent
    for path in sorted(p for p in source.rglob("*") if p.suffix in (".py", ".yaml")):
        yield str(path.relative_to(source)).encode()
        yield path.read_bytes()
    models = config.model_dump(mode="json", include={"algorithm", "backbone", "reward", "judge"})
    for text in sorted({text for _, text in hub.texts("", models) if text}):
        yield from _there(locate(text))


def _there(path: Path) -> Iterator[bytes]:
    """Of a file: its size and time. Of a folder: which JSON files it has, and what they say."""
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path] if path.is_file() else []:
        state = file.stat()
        yield str(file).encode()
        small = file.suffix == ".json" and state.st_size <= SMALL
        yield file.read_bytes() if small else f"{state.st_size} {state.st_mtime_ns}".encode()


def _read(path: Path) -> Tree | None:
    try:
        digest, text = path.read_text(encoding="utf-8").split("\n", 1)
        return dict(json.loads(text)) if digest == hashlib.sha256(text.encode()).hexdigest() else None
    except (OSError, ValueError):  # not there, not ours to read, or damaged
        return None


def _write(path: Path, tree: Tree) -> None:
    text = json.dumps(tree)
    try:
        with files.replaced(path) as partial:
            partial.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
        oldest_last = sorted(path.parent.glob("[!.]*.json"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in oldest_last[MOST:]:
            old.unlink(missing_ok=True)
    except OSError:  # not ours to write, or full
        return
