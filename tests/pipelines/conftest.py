"""One Ray for all tests marked `ray` that need no head, driver or environment of their own: a start costs more than most of them."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from didr_core.types import DIDRError
from pipelines.cluster.resources import ClusterView
from pipelines.cluster.session import ray_session

TESTS = Path(__file__).parents[1]
CPUS = 6


@pytest.fixture(scope="session")
def ray_here() -> Iterator[ClusterView]:
    """Ray of this process with six CPU slots, whose workers find the modules in tests/. `align` and `evaluate` run in it."""
    with ExitStack() as session:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
            for last in (False, False, True):  # Ray's own limits on its start are short, for a crowded machine
                try:
                    view = session.enter_context(ray_session("local", CPUS))
                    break
                except DIDRError:
                    if last:
                        raise
        yield view
        await_readers()


def await_readers(seconds: float = 600.0) -> None:
    """Wait for the threads of abandoned streams: one that calls Ray after its shutdown ends this process (code 1, no traceback)."""
    sys.last_value = sys.last_traceback = None  # where pytest keeps what a failed test had in its hands
    gc.collect()
    end = time.monotonic() + seconds
    while [t for t in threading.enumerate() if t.name == "iter_threaded"]:
        assert time.monotonic() < end, "a stream's reader is still alive; ray.shutdown() would end this process"
        time.sleep(0.1)
