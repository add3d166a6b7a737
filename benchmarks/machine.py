"""What a command and all its processes use, and what else the machine does meanwhile. Linux only.

Ray's workers run at nice 15: beside other programs they starve, and a measurement is one of those programs. So benchmarks wait for idle
cores, and say how busy others kept them all the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

IDLE = 0.15
"""Cores that may be busy on a machine that is called idle."""


def busy_seconds() -> float:
    """CPU seconds that all programs together have used since the machine started, and that a hypervisor gave to others."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def wait_until_idle(limit: float, window: float = 2.0) -> float:
    """Wait until fewer than :data:`IDLE` cores are busy, ``limit`` seconds at most. Returns how many were, at the last look."""
    deadline = time.monotonic() + limit
    while True:
        before, began = busy_seconds(), time.monotonic()
        time.sleep(window)
        cores = (busy_seconds() - before) / (time.monotonic() - began)
        if cores < IDLE or time.monotonic() >= deadline:
            return cores


def name_of(command: Sequence[str]) -> str:
    """What people call a process: Ray's actors by their class, a stage of Ray Data by its own, programs by their file.

    >>> name_of(["ray::MapWorker(MapBatches(EncoderActor)).submit"]), name_of(["/usr/bin/python", "-u", "/ray/dashboard.py", "--port=1"])
    ('EncoderActor', 'dashboard.py')
    """
    if command[0].startswith("ray::"):
        words = re.findall(r"\w+", command[0].partition(").")[0])
        return words[-1] if "MapWorker" in words else words[1]
    scripts = [Path(word).name for word in command[1:] if word.endswith(".py")]
    program = Path(command[0]).name
    return scripts[0] if scripts and program.startswith("python") else program


@dataclass
class _Used:
    process: psutil.Process
    name: str = "starting"
    cpu: float = 0.0
    held: int = 0


class Tree:
    """A process and everything that was ever seen below it: daemons may have left the tree since."""

    def __init__(self, pid: int) -> None:
        root = psutil.Process(pid)
        self._seen = {pid: _Used(root, "driver")}

    def look(self, memory: bool = False) -> None:
        """Read CPU seconds, and ``memory`` held, of all processes. What a process used by the last look before its end stays counted."""
        for used in list(self._seen.values()):
            with suppress(psutil.Error):
                for child in used.process.children(recursive=True):
                    self._seen.setdefault(child.pid, _Used(child))
        for used in self._seen.values():
            used.held = 0
            with suppress(psutil.Error):  # it has ended
                command = used.process.cmdline()
                if command and used.name != "driver":  # Ray's processes change their names as they go
                    used.name = name_of(command)
                times = used.process.cpu_times()
                used.cpu = times.user + times.system
                if memory:
                    used.held = used.process.memory_full_info().uss

    def cpu(self) -> dict[str, float]:
        """CPU seconds by name of process; the process at the root is called "driver"."""
        return self._by_name("cpu")

    def held(self) -> dict[str, float]:
        """Bytes of memory of its own (USS: what is shared, as the object store is, counts nowhere) by name, at the last look."""
        return self._by_name("held")

    def _by_name(self, what: str) -> dict[str, float]:
        total: dict[str, float] = {}
        for used in self._seen.values():
            total[used.name] = total.get(used.name, 0.0) + getattr(used, what)
        return total
