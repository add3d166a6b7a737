"""Checkpoints: everything a resume needs, in one folder, written whole or not at all.

state.pt      all of it, or all but what is split over workers; it comes last: without it the folder is no checkpoint
shards/       what is split, written by all workers (:mod:`didr_core.networks.fsdp`)
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from didr_core.config.files import replaced
from didr_core.networks import fsdp, optim
from didr_core.train.learner import Learner
from didr_core.types import DIDRError

FILE = "state.pt"


class Saver:
    """Writes the checkpoints of a learner. Where its networks are split, every rank has one and calls it equally often."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._writer = fsdp.Writer() if learner.fsdp else None
        self._folder, self._bytes = Path(), 0  # of what is being written

    def save(self, folder: Path, extra: dict[str, Any], then: Callable[[], None] = lambda: None) -> None:
        """Write the state of now to ``folder``; ``then`` is called when it is there. What is split is written while training goes on.

        Args:
            extra: plain data (numbers, strings, lists, dicts).

        Raises:
            DIDRError: no room on the disk; names path, bytes needed and free. What was there before is untouched. Of what is
                written in the background, the next call or :meth:`wait` says so.
        """
        self.wait()
        tree = {"learner": self.learner.state_dict(), "extra": extra}
        size = _bytes(tree)
        if self._writer is None:
            with _words(folder, size):
                _write(folder, tree)
            then()
            return
        rest, split = fsdp.take_out(tree)
        first = self.learner.parallel.rank == 0
        file = io.BytesIO()
        if first:  # a copy: training goes on
            torch.save(rest, file)

        def complete() -> None:
            if first:
                _write(folder, file)
                then()

        self._folder, self._bytes = folder, size
        with _words(folder, size):
            self._writer.start(folder, split, complete)

    def wait(self) -> None:
        """Until the last checkpoint is whole.

        Raises:
            DIDRError: see :meth:`save`.
        """
        if self._writer is None:
            return
        try:
            with _words(self._folder, self._bytes):
                self._writer.wait()
        except DIDRError:  # on a full disk every byte counts
            if self.learner.parallel.rank == 0:
                shutil.rmtree(self._folder / fsdp.FOLDER, ignore_errors=True)
            raise


def save(folder: Path, learner: Learner, extra: dict[str, Any]) -> None:
    """A checkpoint, now: see :class:`Saver`."""
    saver = Saver(learner)
    saver.save(folder, extra)
    saver.wait()


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restore ``learner`` exactly, whatever number of workers wrote the checkpoint; returns ``extra``.

    Raises:
        DIDRError: no checkpoint there, or one of another model.
    """
    with _damage(folder):
        state = _read(folder, mmap=False)
        tree = state["learner"]
        if learner.fsdp or (folder / fsdp.FOLDER).is_dir():
            optimizers = {"generator_opt": learner.generator_opt, "assistant_opt": learner.assistant_opt}
            for name, optimizer in optimizers.items():
                if tree[name]["state"]:  # else it had not begun: the assistant's head start
                    optim.begin(optimizer)
            live = learner.state_dict()
            for name, value in tree.items():
                if name in optimizers:
                    value["state"] = fsdp.put_back(folder, value["state"], live[name]["state"])
                else:
                    tree[name] = fsdp.put_back(folder, value, live[name])
        learner.load_state_dict(tree)
    return state["extra"]  # type: ignore[no-any-return]


def read(folder: Path, name: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one network, whole: ``name`` is "generator" or "ema", ``like`` its state before.

    Raises:
        DIDRError: no checkpoint there, or one of another model.
    """
    with _damage(folder):
        tree: dict[str, Tensor] = _read(folder, mmap=True)["learner"][name]
        return fsdp.put_back(folder, tree, like) if (folder / fsdp.FOLDER).is_dir() else tree


def _read(folder: Path, mmap: bool) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise DIDRError(f"checkpoint {folder}: {FILE} is missing")
    # to the CPU: beside the networks a GPU has no room for a second copy
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # type: ignore[no-any-return]


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DIDRError(f"checkpoint {folder}: does not fit this recipe, or is damaged ({str(error)[:200]})") from error


def _write(folder: Path, tree: Any) -> None:
    """``folder/state.pt``, atomically; ``tree`` may be one that is serialised already."""
    with replaced(folder / FILE) as partial, partial.open("wb") as file:
        if isinstance(tree, io.BytesIO):
            file.write(tree.getbuffer())
        else:
            torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _words(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch reports a short write as RuntimeError
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "PytorchStreamWriter" in str(error)
        if isinstance(error, OSError) and not full:
            raise DIDRError(
                f"checkpoint {folder}: cannot write ({error}). Check permissions of the output folder."
            ) from error
        if not full:
            raise
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise DIDRError(
            f"checkpoint {folder}: the disk is full: about {needed:,} bytes needed, {free:,} free. Earlier checkpoints are kept; "
            "free some space and continue with `didr align --resume`."
        ) from error


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(v) for v in value)
    return 0
