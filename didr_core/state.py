"""Checkpoints: everything a resume needs, in one folder, written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from didr_core.contracts import DIDRError
from didr_core.learner import Learner

FILE = "state.pt"


def save(folder: Path, learner: Learner, extra: dict[str, Any]) -> None:
    """Write ``folder/state.pt`` atomically. ``extra`` must be plain data (numbers, strings, lists, dicts).

    Raises:
        DIDRError: no room on the disk; names path, bytes needed and free. What was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (FILE + ".part")
    state = {"learner": learner.state_dict(), "extra": extra}
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / FILE)
    except (OSError, RuntimeError) as error:
        # torch reports a short write as RuntimeError
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "write" in str(error).lower()
        if isinstance(error, OSError) and not full:
            raise DIDRError(
                f"checkpoint {folder}: cannot write ({error}). Check permissions of the output folder."
            ) from error
        if not full:
            raise
        needed, free = _bytes(state), shutil.disk_usage(folder).free
        raise DIDRError(
            f"checkpoint {folder}: the disk is full: about {needed:,} bytes needed, {free:,} free. Earlier checkpoints are kept; "
            "free some space and continue with `didr align --resume`."
        ) from error


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restore ``learner`` exactly; returns ``extra``.

    Raises:
        DIDRError: no checkpoint there, or one of another model.
    """
    path = folder / FILE
    if not path.is_file():
        raise DIDRError(f"checkpoint {folder}: {FILE} is missing")
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True
        )  # beside the networks a GPU has no room for a second copy
        learner.load_state_dict(state["learner"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise DIDRError(f"checkpoint {path}: does not fit this recipe, or is damaged ({str(error)[:200]})") from error
    return state["extra"]  # type: ignore[no-any-return]


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(v) for v in value)
    return 0
