"""A killed driver's processes: the next driver in that folder ends them, by number and start time, and nothing else."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.cluster.leftovers import RECORD, end_leftovers, looked_after

DRIVER = """
import subprocess, sys, time
from pathlib import Path
from pipelines.cluster.leftovers import looked_after
record = looked_after(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '600'])"])
while len(__import__("psutil").Process(child.pid).children()) < 1:
    time.sleep(0.01)
record()
time.sleep(600)
"""


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    process = subprocess.Popen(["sleep", "600"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_killed_driver_started_is_ended_by_the_next(tmp_path: Path, sleeper: psutil.Process) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 100
    while not (tmp_path / RECORD).exists():
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    left = [pid for pid, _ in json.loads((tmp_path / RECORD).read_text())["processes"]]
    assert len(left) == 2 and all(map(alive, left)), "child and grandchild outlive it"
    looked_after(tmp_path)
    assert not any(map(alive, left)) and not (tmp_path / RECORD).exists()
    assert alive(sleeper.pid), "somebody else's"


def test_a_driver_that_lives_on_keeps_what_it_started(tmp_path: Path, sleeper: psutil.Process) -> None:
    looked_after(tmp_path)()  # one run in this process, then another in its folder
    assert [sleeper.pid, sleeper.create_time()] in json.loads((tmp_path / RECORD).read_text())["processes"]
    looked_after(tmp_path)
    assert alive(sleeper.pid)


@pytest.mark.parametrize("change", ["start time", "host", "cut", "foreign"])
def test_another_process_of_that_number_is_left_alone(tmp_path: Path, sleeper: psutil.Process, change: str) -> None:
    began = sleeper.create_time() - (60 if change == "start time" else 0)
    host = "elsewhere" if change == "host" else platform.node()
    text = json.dumps({"host": host, "processes": [[sleeper.pid, began]]})
    text = {"cut": text[:-9], "foreign": "[1]"}.get(change, text)
    (tmp_path / RECORD).write_text(text)
    assert end_leftovers(tmp_path / RECORD) == [] and alive(sleeper.pid)
