"""Files that are replaced whole: a kill at any moment leaves the old file or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from didr_core.config.passwords import redacted


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


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` as the whole of ``path``, in UTF-8, passwords of addresses left out: such files are shown and shared."""
    with replaced(path) as partial:
        partial.write_text(redacted(text), encoding="utf-8")
