"""What every test shares: a time limit per test, so that a hang (Ray's favourite failure) fails with a traceback instead of waiting.

The default limit is 300 s, 600 s for tests marked `ray` or `slow`: three processes share two cores. `@pytest.mark.timeout(seconds)` sets
another. It needs SIGALRM, so it acts in the main thread of a POSIX system; elsewhere pytest's `faulthandler_timeout` is what is left.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
from collections.abc import Generator

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small models: threads cost more than they give, on a shared machine above all

os.environ.setdefault("DIDR_CACHE", "")  # tests plan anew
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # and ask no hub but their own

LIMIT_S = 300.0
LONG_LIMIT_S = 600.0


class TestTookTooLong(BaseException):
    """Raised inside the test. A BaseException, so that code under test which retries on Exception cannot swallow it."""


def limit_of(item: pytest.Item) -> float:
    """Seconds."""
    marker = item.get_closest_marker("timeout")
    if marker:
        return float(marker.args[0])
    is_long = item.get_closest_marker("ray") or item.get_closest_marker("slow")
    return LONG_LIMIT_S if is_long else LIMIT_S


def pytest_collection_finish() -> None:
    """The libraries' million objects stay: to look through them again and again was a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Covers set-up, call and tear-down together: a fixture that starts a cluster may hang too."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return (yield)
    seconds = limit_of(item)

    def too_long(signum: int, frame: object) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        raise TestTookTooLong(f"{item.nodeid} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
