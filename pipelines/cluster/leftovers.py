"""What a killed driver left running. Ray's agents outlive a `kill -9` of the driver by minutes, and hold a quarter of a gigabyte.

A driver writes down itself and every process that descends from it, with their start times, beside its other files. The next one in that
folder ends those that are still there where the driver is not, and nothing else: a process that has got the same number since has another
start time, and a driver that lives on (a notebook, say) still uses what it started.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from didr_core.config.files import mapping, replace_text
from didr_core.types import DIDRError

RECORD = ".processes.json"
SAME_S = 1.0
"""A start time is read in whole ticks from a clock that is set now and then."""
LOOK_S = 10.0


def looked_after(folder: Path) -> Callable[[], None]:
    """End what an earlier driver in ``folder`` left; the caller holds its lock. What it returns writes down this driver's descendants."""
    path = folder / RECORD
    end_leftovers(path)
    known: set[tuple[int, float]] = set()
    looked = float("-inf")

    def look() -> None:
        nonlocal looked
        if time.monotonic() - looked < LOOK_S:
            return
        looked = time.monotonic()
        if not (found := set(_started())) <= known:
            known.update(found)
            record = {"host": platform.node(), "driver": _known(psutil.Process()), "processes": sorted(known)}
            replace_text(path, json.dumps(record) + "\n")

    return look


def end_leftovers(path: Path) -> list[int]:
    """Kill the processes that ``path`` records, where they are still those; returns their numbers."""
    ended: list[psutil.Process] = []
    record: dict[str, object] = {}
    with suppress(OSError, DIDRError):  # none, or cut short: then nobody can say whose they are
        record = mapping(path.read_bytes(), str(path))
    if record.get("host") == platform.node() and _living(record.get("driver")) is None:
        for known in record.get("processes") or ():  # type: ignore[attr-defined]
            with suppress(psutil.Error):
                process = _living(known)
                if process is not None and process.uids().real == os.getuid():
                    process.kill()
                    ended.append(process)
    psutil.wait_procs(ended, timeout=10)
    path.unlink(missing_ok=True)
    return [process.pid for process in ended]


def _started() -> Iterator[tuple[int, float]]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            yield _known(process)


def _known(process: psutil.Process) -> tuple[int, float]:
    return process.pid, process.create_time()


def _living(known: Any) -> psutil.Process | None:
    """The process that :func:`_known` told of, if it still runs."""
    with suppress(psutil.Error, TypeError, ValueError):
        pid, began = known
        process = psutil.Process(pid)
        if abs(process.create_time() - began) <= SAME_S and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
