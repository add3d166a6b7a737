"""Who does not answer, and for how long: a run whose encoder, reward or trainer hangs names it and stops.

News are steps and stages, as every :class:`Observer` hears them, and calls of actors that come and go: each actor keeps a file that says
which call it is at (:class:`Calls`), locked as long as its process lives, so that neither a stopped process nor a dead one is mistaken for
the other.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from didr_core.train.observer import Observer
from didr_core.types import NoAnswerError, StepReport

GRACE_S = 30.0
"""From the exception in a thread that hangs to the end of its process: code that is not Python's hears no exception."""


class Calls:
    """What a process of many is at, in a file of its own in ``folder``; None: nobody asks."""

    def __init__(self, folder: Path | None, who: str) -> None:
        self._who, self._number, self._file = f"{who} (process {os.getpid()} on {platform.node()})", 0, None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{platform.node()}-{os.getpid()}"
            self._file = Path(f"{path}.new").open("w")  # noqa: SIM115  (open as long as the process lives)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.rename(self._file.name, path)  # seen from now on, and locked

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """Around one call."""
        self._number += 1
        self._write(json.dumps([f"{self._who}, {what},", self._number]))
        try:
            yield
        finally:
            self._write("")

    def _write(self, text: str) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk is not this file's to tell
                self._file.seek(0)
                self._file.truncate()
                self._file.write(text)
                self._file.flush()


def running(folder: Path) -> Iterator[tuple[str, int]]:
    """Who of the living is at a call, and at its how manieth; files of the dead are removed."""
    for path in (p for p in folder.glob("*") if p.suffix != ".new"):
        with suppress(OSError, ValueError), path.open() as file:  # as it is being written
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                who, number = json.loads(file.read())
                yield who, number


class Patience(Observer):
    """Passes news on to ``observer``; :meth:`look` says who has given none for half of ``seconds``, and raises after all of them."""

    def __init__(self, observer: Observer, seconds: float, folder: Path | None = None) -> None:
        self.observer, self.seconds, self.folder = observer, seconds, folder
        self.every = min(60.0, max(0.1, seconds / 20))
        self._news, self._last, self._looked = time.monotonic(), "its start", 0.0
        self._seen: dict[tuple[str, int], float] = {}

    def step(self, report: StepReport) -> None:
        """News."""
        self._news, self._last = time.monotonic(), f"step {report.step}"
        self.observer.step(report)

    def checkpoint(self, step: int) -> None:
        """News."""
        self._news, self._last = time.monotonic(), f"the checkpoint of step {step}"
        self.observer.checkpoint(step)

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """News."""
        self._news, self._last = time.monotonic(), text
        self.observer.stage(text, done, total)

    def note(self, text: str, style: str = "") -> None:
        """Passed on."""
        self.observer.note(text, style)

    def look(self) -> None:
        """Call it now and then, from any thread.

        Raises:
            NoAnswerError: somebody has not answered for ``seconds``; names whom.
        """
        now = time.monotonic()
        if now - self._looked < self.every:
            return
        self._looked = now
        # by this clock: those of other machines may differ
        calls = set(running(self.folder)) if self.folder else set()
        if calls != self._seen.keys():  # those that the training waits for are at work
            self._news = now
        self._seen = {call: self._seen.get(call, now) for call in calls}
        who, since = f"the training (its last news: {self._last})", self._news
        if self._seen and now - (first := min(self._seen.values())) >= self.seconds / 2:
            who, since = next(call[0] for call, began in self._seen.items() if began == first), first
        waited = f"{who} has not answered for {now - since:.0f} s"
        if now - since >= self.seconds:
            raise NoAnswerError(
                f"{waited}, so the run was stopped (workers.patience_s={self.seconds:g}). `--resume` goes on from the last checkpoint; "
                "where it is slow and does not hang, with a larger --set workers.patience_s."
            )
        if now - since >= self.seconds / 2:
            self.observer.stage(f"{waited}; at {self.seconds:.0f} s the run stops")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look from a thread while the block works in the main one; there :meth:`look`'s error is raised, whatever it is doing.

        Code that lets no exception through is given :data:`GRACE_S`; then :meth:`Observer.stuck` is called and the process ends.
        """
        if threading.current_thread() is not threading.main_thread():  # no other one hears signals
            yield
            return
        done, found = threading.Event(), NoAnswerError()

        def look() -> None:
            while not done.wait(self.every):
                try:
                    self.look()
                except NoAnswerError as error:
                    found.args = error.args
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                    break
            else:
                return
            if not done.wait(GRACE_S):
                self.observer.stuck(found)
                os._exit(1)

        def stop(number: int, frame: FrameType | None) -> Any:
            raise found

        before = signal.signal(signal.SIGUSR1, stop)
        self._news = time.monotonic()
        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            signal.signal(signal.SIGUSR1, before)
