"""Checkpoints: everything a resume needs, in one folder, written whole or not at all, and looked over before it is read.

    generator.0.safetensors   tensors of one part of the learner's state, by name; of a network that is split, the rows of worker 0
    generator.1.safetensors   the rows of worker 1
    state.json                what is no tensor: counts, rates, the version of this layout
    SHA256SUMS                of every file, state.json last; `sha256sum -c SHA256SUMS` finds damage, too

All workers write into a hidden folder beside it, which gets its name when every file is there. Read back, it fits any number of workers.
Nothing in it is pickled: loading one runs no code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves_with_path, tree_map_with_path

from didr_core.config.files import mapping
from didr_core.config.provenance import versions
from didr_core.data.storage import disk
from didr_core.networks import fsdp, optim
from didr_core.train.learner import Learner
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError

Parts = Iterable[tuple[str, dict[str, Tensor]]]  # tensors by name, by part of the learner's state
SUMS, STATE = "SHA256SUMS", "state.json"
LAYOUT = 2
"""Of these folders; 1, until 0.2, was a torch file `state.pt`, beside it a folder `shards`."""


class Saver:
    """Writes the checkpoints of a learner while it trains on: a copy is taken, a thread writes it, one at a time.

    Where networks are split, every rank has one and calls it equally often. A context manager: at the end of the block all is written.
    """

    def __init__(self, learner: Learner, apart: bool = False) -> None:
        """``apart``: ranks may have disks of their own (:class:`RunFolder`)."""
        self.learner, self._apart = learner, apart
        self._header = {"layout": LAYOUT, "didr": versions().get("didr", "unknown")}
        # a group of its own, and on CPUs: its calls come from a thread, between those of training
        self._group = torch.distributed.new_group(backend="gloo") if learner.fsdp else None
        self._first = self._group is None or learner.parallel.rank == 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}  # kept: new memory costs more than the copying

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, folder: Path, extra: dict[str, Any], then: Callable[[], None] = lambda: None) -> None:
        """Copy the state of now to the host's memory; write it to ``folder``, then call ``then``, while training goes on.

        Args:
            extra: plain data (numbers, strings, lists, dicts).

        Raises:
            DIDRError: the one before could not be written; see :meth:`wait`.
        """
        self.wait()
        leaves = {_name(path): leaf for path, leaf in tree_leaves_with_path(self.learner.state_dict())}
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        plain = {name: leaf for name, leaf in leaves.items() if name not in tensors}
        state = self._header | {"extra": extra, "learner": plain}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self._pending = self._thread.submit(
            self._write, folder, list(self._own(tensors)), json.dumps(state), size, then
        )

    def wait(self, block: bool = True) -> None:
        """Until the last checkpoint is whole; without ``block``: only look whether it is there, or has failed.

        Raises:
            DIDRError: no room on the disk; names path, bytes needed and free. What was there before is untouched.
        """
        if self._pending is not None and (block or self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()

    def _own(self, tensors: dict[str, Tensor]) -> Parts:
        """What this worker writes, a part at a time, copied: its rows of what is split; the first worker also the rest."""
        for part, names in itertools.groupby(tensors, lambda name: name.partition("/")[0]):
            own = {}
            for name in names:
                value = tensors[name].detach()
                if fsdp.is_sharded(value):
                    value = value.to_local()
                elif not self._first:
                    continue
                if name not in self._copies:
                    self._copies[name] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
                own[name] = self._copies[name].copy_(value)
            if own:
                yield part, own

    def _write(self, folder: Path, parts: Parts, state: str, size: int, then: Callable[[], None]) -> None:
        partial = folder.with_name(f".{folder.name}.part")
        sums: dict[str, str] = {}
        failure: Exception | None = None
        try:
            with disk("checkpoint", folder, size):
                partial.mkdir(parents=True, exist_ok=True)
                for part, tensors in parts:
                    file = partial / f"{part}.{self.learner.parallel.rank}.safetensors"
                    save_file(tensors, file)
                    sums[file.name] = _settled(file)
        except Exception as error:  # every worker hears of it
            failure = error
        everyone = [(sums, failure)]
        if self._group is not None:
            everyone *= self.learner.parallel.world_size
            torch.distributed.all_gather_object(everyone, (sums, failure), group=self._group)
        try:
            for found, failed in everyone:
                if failed:
                    raise failed
                sums |= found
            if self._first:
                with disk("checkpoint", folder, size):
                    _publish(partial, folder, sums, state)
                then()
            elif self._apart and not any((p / name).exists() for p in (partial, folder) for name in everyone[0][0]):
                with suppress(OSError):  # on a disk that the first worker does not see; a neighbour may be quicker
                    os.replace(partial, folder)
                then()
        finally:
            if self._first:  # on a full disk every byte counts
                shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restore ``learner`` exactly, whatever number of workers wrote the checkpoint; returns ``extra``.

    Raises:
        DIDRError: no checkpoint there, a damaged one (see :func:`verify`), or one of another model.
    """
    files = verify(folder)
    state = mapping((folder / STATE).read_bytes(), f"checkpoint {folder}: {STATE}")
    with fits(folder), torch.no_grad():
        for part in ("generator_opt", "assistant_opt"):
            if f"{part}.0.safetensors" in files:
                optim.begin(getattr(learner, part))
            else:  # it had not begun: the assistant's head start
                getattr(learner, part).state.clear()
        tree = learner.state_dict()
        live = {_name(path): leaf for path, leaf in tree_leaves_with_path(tree) if isinstance(leaf, Tensor)}
        for name, value in _tensors(folder, files):
            fsdp.fill(live.pop(name), value)
        if live:
            raise ValueError(f"it has no {', '.join(list(live)[:3])}")
        learner.load_state_dict(tree_map_with_path(lambda path, leaf: state["learner"].get(_name(path), leaf), tree))
    return state["extra"]  # type: ignore[no-any-return]


def read(folder: Path, part: str) -> dict[str, Tensor]:
    """The weights of one network, whole: ``part`` is "generator" or "ema" (the generator, where no average is kept).

    Raises:
        DIDRError: no checkpoint there, or a damaged one (see :func:`verify`).
    """
    files = verify(folder, part)
    with fits(folder):
        found = {name.partition("/")[2]: value for name, value in _tensors(folder, files)}
    return found if found or part == "generator" else read(folder, "generator")


@contextmanager
def fits(folder: Path) -> Iterator[None]:
    """Inside, what an intact checkpoint holds is loaded into networks; a DIDRError where these are others."""
    try:
        yield
    except (LookupError, RuntimeError, ValueError, SafetensorError) as error:
        raise DIDRError(f"checkpoint {folder}: does not fit this recipe ({str(error)[:200]})") from error


def verify(folder: Path, part: str = "") -> list[str]:
    """Names of the files of a checkpoint, of one ``part`` alone where given, after their sums have been compared.

    Raises:
        DIDRError: a file is missing or damaged; names it, and the newest older checkpoint to go on from. Or it is of another layout.
    """
    state = {"layout": 1, "didr": "0.2.0"}
    files = []
    if (folder / SUMS).is_file() or not (folder / "state.pt").is_file():
        try:
            files = _files(folder, part)
        except _Damage as damage:
            way = "No older checkpoint is intact: start a new run."
            run = RunFolder(folder.parents[1])
            for older in map(run.checkpoint, reversed(run.checkpoints())):
                with suppress(_Damage):
                    if older != folder and _files(older):
                        way = f"Move that folder away and repeat the command: it goes on from {older.name}, which is intact."
                        break
            raise DIDRError(f"checkpoint {folder}: damaged: {damage}. {way}") from damage
        state = mapping((folder / STATE).read_bytes(), f"checkpoint {folder}: {STATE}")
    if state.get("layout") != LAYOUT:
        raise DIDRError(
            f"checkpoint {folder}: of layout {state.get('layout')}; this version reads layout {LAYOUT}. Go on with DIDR "
            f"{state.get('didr')}, which reads it, or with the version in run.json."
        )
    return files


class _Damage(Exception):
    """Which file, and what is wrong with it."""


def _files(folder: Path, part: str = "") -> list[str]:
    """See :func:`verify`. By worker: SHA256SUMS has them in that order."""
    file = SUMS
    try:
        lines = (folder / SUMS).read_text().splitlines()
        if not all(re.fullmatch(r"[0-9a-f]{64}  [\w.-]+", line) for line in lines) or STATE not in "".join(lines[-1:]):
            raise _Damage(f"{SUMS} is cut short, or no list of sums")
        sums = {line[66:]: line[:64] for line in lines if not part or line[66:].startswith((f"{part}.", STATE))}
        for file, expected in sums.items():
            if _sum(folder / file) != expected:
                size = (folder / file).stat().st_size
                raise _Damage(f"{file} ({size:,} bytes) is not what was written: its SHA-256 differs")
    except FileNotFoundError as error:
        raise _Damage(f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise _Damage(f"{file} cannot be read ({error})") from error
    return list(sums)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    """Of a leaf of the learner's state: "ema/conv_in.weight", "generator_opt/state/0/exp_avg", "step_count"."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _tensors(folder: Path, files: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, whole, on the CPU; one at a time: every worker reads them, and not all of them have room for all."""
    with ExitStack() as stack:
        holders: dict[str, list[Any]] = {}
        for file in files:
            if file != STATE:
                opened = stack.enter_context(safe_open(folder / file, "pt"))
                for name in opened.keys():  # noqa: SIM118  (no dict)
                    holders.setdefault(name, []).append(opened)
        for name, rows in holders.items():
            parts = [opened.get_tensor(name) for opened in rows]
            yield name, torch.cat(parts) if len(parts) > 1 else parts[0].clone()  # the file may go away


def _publish(partial: Path, folder: Path, sums: dict[str, str], state: str) -> None:
    """Add what makes the files a checkpoint, and give the folder its name."""
    (partial / STATE).write_text(state)
    sums[STATE] = _settled(partial / STATE)
    (partial / SUMS).write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
    _settled(partial / SUMS)
    if (folder / SUMS).is_file():  # the same step again
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _settled(path: Path) -> str:
    """The sum of a file that is on the disk from now on."""
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors gives it to its owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sum(path)
