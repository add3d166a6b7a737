"""A run at an address (``s3://bucket/runs/first``): it works in a folder of this machine, and a thread keeps that and the address alike.

- **Never half a checkpoint.** Its files go up first, and :data:`SUMS` when all are there that it names: without it nothing is a
  checkpoint. The metrics up to its step go up before it, older checkpoints go away after it.
- **What changed here goes up, what changed there comes down**, small files by themselves, weights when they are asked for
  (:func:`fetch`). A file has one writer; so the driver and the trainers of other machines each have a mirror, and see what the other does.
- **One owner.** ``owner.json`` is counted up by the driver of the run as long as it lives. Who finds another's looks whether it still
  counts; who finds another in its own place ends. Storage cannot lock: of two that start in one moment, the first stops at its next count.
- **A server that is gone** for a while is asked again, in the background; training goes on.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import posixpath
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from didr_core.config import redacted
from didr_core.config.files import cache_folder, held, replaced
from didr_core.data.storage import WAIT_S, Store, Version, open_filesystem, patiently, reached
from didr_core.types import DIDRError

SUMS = "SHA256SUMS"
OWNER, OWN = "owner.json", ".owner"  # there; here: the name of the last driver of this folder
CHECKPOINTS, LARGE = "checkpoints/", ("checkpoints/", "export/")
STEP = re.compile(r"(checkpoints/step-\d+)/(.+)")
NONE: Version = (-1, 0)
"""Of a file that is not there."""
LOOK_S, BEAT_S, DEAD_S, LEAST_S = 5.0, 15.0, 60.0, 60.0
"""How often files are compared; how often the owner counts; how long another's count stands still until it is taken for dead; how long a
server is asked again where a run has failed."""


class Mirror:
    """Keeps ``folder`` and ``address`` alike while its block runs; where there is no address, it does nothing.

    Args:
        keep: checkpoints that are left at the address; the driver's mirror alone has it, and owns the run.
        say: takes sentences for the user.
    """

    def __init__(self, folder: Path, address: str, keep: int = 0, say: Callable[[str], object] | None = None) -> None:
        self.folder, self.keep, self.address = folder, keep, address
        self.say = say or (lambda text: None)
        self.where = redacted(address).partition("?")[0]
        self._name, self._count, self._failing = secrets.token_hex(8), 0, 0.0  # since when the server has not answered
        self._known: dict[str, tuple[Version, Version]] = {}  # small files: here and there, when both were the same
        self._sent: dict[str, Version] = {}  # files of checkpoints
        self._whole: dict[str, bytes] = {}  # their sums, by the checkpoint's folder
        self._lost: DIDRError | None = None
        self._lock, self._done, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._beat)]

    def __enter__(self) -> Mirror:
        if not self.address:
            return self
        with reached("--output", self.address):
            self.store = Store(self.address)
            ours = bool(self.keep) and self._claim()
            there = self._there()
            if ours:  # nobody has written there since: what is here is the newest
                self._known = {name: (NONE, version) for name, version in there.items() if not name.startswith(LARGE)}
            else:
                adopt(self.store, self.folder, there)
                self._known = {
                    name: (_version(self.folder / name), there[name]) for name in self._here() if name in there
                }
        (self.folder / OWN).write_text(self._name if self.keep else "")
        for thread in self._threads if self.keep else self._threads[:1]:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.address:
            return
        self._done.set()
        self._threads[0].join()
        try:
            self.flush(WAIT_S if error is None else LEAST_S)
        except DIDRError as failed:
            if error is None:
                raise
            self.say(str(failed))  # the first error is on its way
        finally:
            self._over.set()
        if self.keep and not self._lost:
            self._threads[1].join()
            with suppress(Exception):  # then the next driver watches it for a while
                self.store.put(OWNER, self._owner(ended=True))

    def flush(self, seconds: float = WAIT_S) -> None:
        """Until both are the same.

        Raises:
            DIDRError: the server did not answer for so long, or another process has taken the run over.
        """
        late = time.monotonic() + seconds
        while self.address and not self._try():
            if time.monotonic() > late:
                raise DIDRError(
                    f"storage {self.where}: did not answer for {seconds:.0f} s. What is not there yet is in {self.folder} on "
                    f"{platform.node()}: `didr align --resume {self.where}` on that machine brings it there."
                )
            time.sleep(0.5)

    def _look(self) -> None:
        pause = LOOK_S
        while not self._done.wait(pause) and not self._lost:
            began = time.monotonic()
            with suppress(DIDRError):  # said, and raised again by :meth:`flush`
                self._try()
            # a twentieth of the time at most, but where the server is asked again
            pause = LOOK_S if self._failing else min(12 * LOOK_S, max(LOOK_S, 20 * (time.monotonic() - began)))

    def _try(self) -> bool:
        """Compare once; False where something is still missing."""
        try:
            with self._lock:
                complete = self._compare()
        except DIDRError:
            raise
        except Exception as error:  # what file systems of fsspec may raise is anything
            if not self._failing:
                self._failing = time.monotonic()
                reason = redacted((str(error).splitlines() or [type(error).__name__])[0])[:200]
                self.say(f"storage {self.where}: does not answer ({reason}); what is new waits in {self.folder}")
            return False
        if self._failing:
            self.say(f"storage {self.where}: answers again, after {time.monotonic() - self._failing:.0f} s")
            self._failing = 0.0
        return complete

    def _compare(self) -> bool:
        if self._lost:
            raise self._lost
        with ExitStack() as stack:
            steps = [p for p in (self.folder / CHECKPOINTS).glob("step-*") if p.name[5:].isdigit()]
            # opened now: they may be removed soon, which open files survive; and metrics that are read later are there up to them
            opened = [_opened(step, stack) for step in sorted(steps, key=_number, reverse=True)]
            there = self._small_files()
            complete = [self._checkpoint(name, files, there) for name, files in opened]
        if self.keep:
            self._prune(there)
        return all(complete)

    def _small_files(self) -> dict[str, Version]:
        """Send and fetch them; returns what is there."""
        here = {name: _version(self.folder / name) for name in self._here()}
        there = self._there()
        for name in sorted(here.keys() | self._known.keys() | {n for n in there if not n.startswith(LARGE)}):
            was_here, was_there = self._known.get(name, (None, None))
            if name in here and here[name] != was_here:
                self._up(name, here[name])
            elif name not in here and was_here is not None:
                self.store.delete(name)
                del self._known[name]
            elif name in there and there[name] != was_there:
                self._known[name] = (down(self.store, name, self.folder), there[name])
        return there

    def _up(self, name: str, version: Version) -> None:
        with suppress(FileNotFoundError), (self.folder / name).open("rb") as file:  # it may be gone again
            self.store.put(name, file)
            self._known[name] = (version, self.store.version(name))

    def _checkpoint(self, name: str, files: dict[str, IO[bytes]], there: Iterable[str]) -> bool:
        """Send a checkpoint, or those of its files that lie here; False where other machines have not sent theirs yet."""
        sums = files.pop(SUMS).read() if SUMS in files else b""
        if sums and self._whole.get(name) != sums and f"{name}/{SUMS}" in there:
            if self.store.read(f"{name}/{SUMS}") == sums:
                self._whole[name] = sums
            else:
                self.store.delete(f"{name}/{SUMS}")  # another one of this step: its files are not mixed with ours
        if sums and self._whole.get(name) == sums:
            return True
        for file, source in files.items():
            version = _of(os.fstat(source.fileno()))
            if self._sent.get(file := f"{name}/{file}") != version:
                self.store.put(file, source)
                if (arrived := self.store.version(file)[0]) != version[0]:
                    raise OSError(f"{file}: of {version[0]:,} bytes {arrived:,} arrived")
                self._sent[file] = version
        if sums:
            if {f"{name}/{file}" for file in named(sums)} - self.store.files(name).keys():
                return False
            self.store.put(f"{name}/{SUMS}", sums)
            self._whole[name] = sums
        return True

    def _prune(self, there: Iterable[str]) -> None:
        """Leave the newest checkpoints, there and here; of those there only the sums come here, weights when they are asked for.

        What is half there and older than the newest whole one was left by a kill.
        """
        found = {m[1] for name in there if (m := STEP.match(name))}
        kept = sorted({m[1] for n in there if (m := STEP.match(n)) and m[2] == SUMS} | self._whole.keys(), key=_number)[
            -self.keep :
        ]
        for name in found - set(kept):
            if kept and _number(name) < _number(kept[-1]):
                self.store.delete(f"{name}/{SUMS}")
                self.store.delete(name)
                self._whole.pop(name, None)
                shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in kept:
            if not (self.folder / name).is_dir():
                down(self.store, f"{name}/{SUMS}", self.folder)

    def _here(self) -> list[str]:
        names = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        return [name for name in names if not hidden(name) and not name.startswith(CHECKPOINTS)]

    def _there(self) -> dict[str, Version]:
        return {name: version for name, version in self.store.files().items() if not hidden(name)}

    def _claim(self) -> bool:
        """Become the owner, once nobody else is; True where this folder's last driver was the last owner.

        Raises:
            DIDRError: another process owns it and lives.
        """
        found, last = owner(self.store), self.folder / OWN
        ours = not found or (last.is_file() and found["name"] == last.read_text())  # a new run, else
        late = time.monotonic() + DEAD_S
        if found and not ours and not found["ended"]:
            self.say(f"run {self.where}: looking for {DEAD_S:.0f} s whether the process on {found['host']} lives")
            while time.monotonic() < late:
                time.sleep(DEAD_S / 12)
                if (now := owner(self.store)) != found and not now.get("ended", True):
                    raise DIDRError(
                        f"run {self.where}: a process on {now['host']} is training in it. Wait for it, or stop it first."
                    )
        self.store.put(OWNER, self._owner())
        return ours

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(Exception):  # :meth:`_look` says it
                found = owner(self.store)
                if found and found["name"] != self._name:
                    self._lost = DIDRError(
                        f"run {self.where}: was taken over by a process on {found['host']}, so this one stops."
                    )
                    (self.folder / "stop").touch()
                    self.say(str(self._lost))
                    return
                self.store.put(OWNER, self._owner())

    def _owner(self, ended: bool = False) -> bytes:
        self._count += 1
        told = {"name": self._name, "host": platform.node(), "pid": os.getpid(), "count": self._count, "ended": ended}
        return json.dumps(told).encode()


def local_copy(address: str, key: str = "--output") -> Path:
    """The folder in which this machine keeps what lies at ``address``, which ``key`` gave."""
    _, path = open_filesystem(address, key)
    return cache_folder() / address.partition("://")[0] / posixpath.normpath(f"/{path}").lstrip("/")


def adopt(store: Store, folder: Path, there: Mapping[str, Version]) -> None:
    """Make ``folder`` what is ``there``, but for weights; those that are here already, and the same, stay."""
    sums = {n.rpartition("/")[0]: store.read(n) for n in there if n.startswith(CHECKPOINTS) and n.endswith(f"/{SUMS}")}
    for step in (folder / CHECKPOINTS).glob("*"):
        path = step / SUMS
        if not path.is_file() or path.read_bytes() != sums.get(f"{CHECKPOINTS}{step.name}"):
            shutil.rmtree(step)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        name = path.relative_to(folder).as_posix()
        same = name.startswith(LARGE) and path.stat().st_size == there.get(name, NONE)[0]
        if not (hidden(name) or name.startswith(CHECKPOINTS) or same):
            path.unlink()
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    for name in there:
        if not name.startswith(LARGE) or (name.endswith(f"/{SUMS}") and not (folder / name).is_file()):
            down(store, name, folder)


def refresh(address: str, folder: Path) -> None:
    """:func:`adopt` what is at ``address``, but where the last driver that wrote there worked in ``folder``.

    Raises:
        DIDRError: it cannot be read.
    """
    with reached("--resume", address):
        store, last = Store(address), folder / OWN
        if not last.is_file() or owner(store).get("name") != last.read_text():
            adopt(store, folder, {name: version for name, version in store.files().items() if not hidden(name)})


def fetch(address: str, folder: Path, name: str) -> None:
    """Bring what is in the folder ``name`` there and not here; several processes of a machine may ask for it at once.

    Raises:
        DIDRError: the server did not answer for :data:`WAIT_S`.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    with held(folder / name), reached("--resume", address):
        store = Store(address)
        for file in patiently(store.filesystem, store.root, lambda: store.files(name)):
            if not (folder / file).is_file():
                patiently(store.filesystem, store.root, functools.partial(down, store, file, folder))


def down(store: Store, name: str, folder: Path) -> Version:
    """Bring a file here, whole or not at all; its version here."""
    with replaced(folder / name) as partial:
        store.get(name, partial)
    return _version(folder / name)


def owner(store: Store) -> dict[str, Any]:
    """What the last driver said of itself; empty where there was none."""
    return json.loads(store.read(OWNER) or b"{}")  # type: ignore[no-any-return]


def named(sums: bytes) -> list[str]:
    """The files that a list of SHA-256 sums names."""
    return [line[66:] for line in sums.decode().splitlines()]


def hidden(name: str) -> bool:
    """Whether a file is of one machine alone: locks, half-written files, Ray's; or of the storage."""
    return name == OWNER or name.startswith("ray/") or any(part.startswith(".") for part in name.split("/"))


def _number(step: Path | str) -> int:
    return int(Path(step).name.removeprefix("step-"))


def _opened(step: Path, stack: ExitStack) -> tuple[str, dict[str, IO[bytes]]]:
    """A checkpoint's name and files; none of one that is just being removed."""
    with suppress(FileNotFoundError):
        files: dict[str, IO[bytes]] = {
            p.name: stack.enter_context(p.open("rb")) for p in step.iterdir() if not hidden(p.name)
        }
        return f"{CHECKPOINTS}{step.name}", files
    return f"{CHECKPOINTS}{step.name}", {}


def _version(path: Path) -> Version:
    try:
        return _of(path.stat())
    except FileNotFoundError:
        return NONE


def _of(file: os.stat_result) -> Version:
    return file.st_size, file.st_mtime_ns
