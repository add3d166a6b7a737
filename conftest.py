"""What every test shares: a time limit per test, so that a hang (Ray's favourite failure) fails with a traceback instead of waiting.

The limit is half an hour: four processes share two cores, and a test that is slow there is none that hangs. `@pytest.mark.timeout(seconds)`
sets another. It needs SIGALRM, so it acts in the main thread of a POSIX system; elsewhere pytest's `faulthandler_timeout` is what is left.
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
from hypothesis import HealthCheck, settings

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small models: threads cost more than they give, on a shared machine above all

os.environ.setdefault("DIDR_CACHE", "")  # tests plan anew
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # and ask no hub but their own
for _name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "WANDB__SERVICE_WAIT"):
    os.environ.setdefault(_name, "300")  # seconds: how fast a crowded machine is, is not what is tested
settings.register_profile("didr", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("didr")

LIMIT_S = 1800.0


class TestTookTooLong(BaseException):
    """Raised inside the test. A BaseException, so that code under test which retries on Exception cannot swallow it."""


def limit_of(item: pytest.Item) -> float:
    """Seconds."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else LIMIT_S


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
