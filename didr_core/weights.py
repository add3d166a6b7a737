"""Cheap looks at weights folders before anything is loaded, and loading without noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from didr_core.contracts import DIDRError


def check_folder(key: str, folder: Path, file: str, field: str, expected: Sequence[str]) -> dict[str, object]:
    """The JSON ``file`` of ``folder``, whose ``field`` must be one of ``expected`` and beside which weights must lie.

    Raises:
        DIDRError: missing folder, missing or broken file, another class of model.
    """
    path = folder / file
    if not folder.is_dir():
        raise DIDRError(
            f"{key}={str(folder)!r}: no such folder. Expected a folder with {file} ({' or '.join(expected)})."
        )
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} is missing (found: {found}). Expected {' or '.join(expected)} saved by save_pretrained."
        )
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} is not valid JSON ({error}). Was the download cut short?"
        ) from error
    if content.get(field) not in expected:
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} says {field}={content.get(field)!r}; expected {' or '.join(expected)}."
        )
    return content  # type: ignore[no-any-return]


def quiet() -> None:
    """Switch off the loading bars and advice of transformers and diffusers: our own lines say what is happening."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
