"""Files that are replaced whole: a kill leaves the old file or the new one, never half of one. Damage is named when they are read."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from didr_core.config.passwords import redacted
from didr_core.types import DIDRError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new path beside ``path`` (same suffix, hidden) to write to: renamed to ``path`` after the block, removed where the block fails.

    Folders above ``path`` are made. Two processes may write the same file at once: the later one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def expanded(path: str | Path) -> Path:
    """With the home folder in place of a leading ``~`` or ``~user``, as shells have it; of a user that there is none, as it stands."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where this machine keeps what can be had again: ``DIDR_CACHE``, else ``didr`` in ``XDG_CACHE_HOME`` or in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(os.environ.get("DIDR_CACHE") or f"{home}/didr")


def claimed(folder: Path, name: str) -> str:
    """The name of a new, empty folder in ``folder``, nobody else's: ``<name>-<yyyymmdd-hhmmss>``, and a number where that is taken."""
    own = stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    taken = 0
    while True:
        try:
            (folder / own).mkdir()
            return own
        except FileExistsError:
            taken += 1
            own = f"{stamp}-{taken}"


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` as the whole of ``path``, in UTF-8, passwords of addresses left out: such files are shown and shared."""
    with replaced(path) as partial:
        partial.write_text(redacted(text), encoding="utf-8")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Marks ``folder`` as being written, until the block or this process ends: :func:`clear_partials` leaves it alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def clear_partials(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left in ``folder``: ``.<name>.<...>.part``, files or folders. Of ``.old``, too, which is put back where
    the kill came between taking it away and putting the new one there."""
    for path in (*folder.glob(f".{name}.*.part*"), *folder.glob(f".{name}.*.old")):
        if path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its writer lives
                continue
            finally:
                os.close(descriptor)
        target = folder / path.name[1:].rsplit(".", 2)[0]
        if path.suffix == ".old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as people type it: a key given twice is an error, and 010, 1:30 and 2026-01-01 are no numbers and dates but text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"{name!r} is given twice, in lines {lines[name]} and {line}; keep one of them")
            lines[name] = line
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":int", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """What YAML says.

    Raises:
        yaml.YAMLError: it cannot be read, or gives a key twice.
    """
    return yaml.load(text, _Loader)


def typed(text: str) -> Any:
    """A value as typed after ``KEY=``: lists, mappings and quoted text are YAML, so are numbers, true, false and null; all else is text.

    Raises:
        yaml.YAMLError: a mapping that cannot be read.
    """
    text = text.strip()
    if text[:1] in ("[", "{", "'", '"'):
        try:
            return read_yaml(text)
        except yaml.YAMLError:
            if text[0] == "{":
                raise
            return text  # a name with brackets in it
    tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))
    plain = tag.rpartition(":")[2] in ("null", "bool", "int", "float")
    return _Loader("").construct_object(yaml.ScalarNode(tag, text)) if plain else text


def mapping(text: bytes, where: str, fix: str = "", parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """What the ``text`` of a file says: a JSON object, or with :func:`read_yaml` a YAML mapping.

    Raises:
        DIDRError: it is empty, cut short, not UTF-8, or says something else; begins with ``where`` it stands, ends with ``fix``.
    """
    try:
        if b"\0" in text:
            raise UnicodeDecodeError("utf-8", text, text.index(b"\0"), 0, "a zero byte")
        found = parse(text.decode("utf-8-sig"))
        wrong = "" if isinstance(found, dict) else f"expected a mapping at the top, got {type(found).__name__}"
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
    except (ValueError, yaml.YAMLError) as error:
        wrong = f"not valid {'JSON' if parse is json.loads else 'YAML'}: {redacted(' '.join(str(error).split()))}"
    if wrong:
        raise DIDRError(f"{where}: {wrong if text.strip() else 'the file is empty'}. {fix}".rstrip(". ") + ".")
    return found  # type: ignore[no-any-return]
