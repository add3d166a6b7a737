"""A process that does not answer is named after half the patience, and ends the run after all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from didr_core.train import patience as module
from didr_core.train.observer import Observer
from didr_core.train.patience import Calls, Patience, running
from didr_core.types import DIDRError, StepReport

ROOT = Path(__file__).resolve().parents[2]


class Lines(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        self.said.append(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_silence_of_the_training_is_told_then_ends_it(clock: list[float]) -> None:
    lines = Lines()
    patience = Patience(lines, 100)
    patience.step(StepReport(7, {}))
    for seconds, said in ((45, 0), (51, 1), (60, 2)):
        clock[0] = 1000 + seconds
        patience.look()
        assert len(lines.said) == said
    assert lines.said[0] == "the training (its last news: step 7) has not answered for 51 s; at 100 s the run stops"
    patience.stage("exporting")  # news
    clock[0] = 1000 + 60 + 40
    patience.look()
    assert lines.said[2:] == ["exporting"]
    clock[0] = 1000 + 60 + 101
    with pytest.raises(DIDRError, match=r"its last news: exporting\) has not answered for 101 s.*patience_s=100\)"):
        patience.look()


ACTOR = """
import sys, time
from pathlib import Path
from didr_core.train.patience import Calls
calls = Calls(Path(sys.argv[1]), sys.argv[2])
with calls.at("a first call"):
    pass
with calls.at("encoding 4 prompts"):
    print("at it", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", ACTOR, str(tmp_path / "calls"), "a prompt encoder"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "at it\n"
    yield process
    process.kill()
    process.wait()


def test_an_actor_that_hangs_is_named_and_a_dead_one_is_not(
    tmp_path: Path, actor: subprocess.Popen[str], clock: list[float]
) -> None:
    idle = Calls(tmp_path / "calls", "another")
    with idle.at("work"):
        pass
    lines = Lines()
    patience = Patience(lines, 100, tmp_path / "calls")
    os.kill(actor.pid, signal.SIGSTOP)  # a hang that no thread of its own could tell
    patience.look()
    for seconds in (30, 60):
        clock[0] = 1000 + seconds
        patience.step(StepReport(seconds, {}))  # the trainers live on what was made ahead
        patience.look()
    assert len(lines.said) == 1 and lines.said[0].startswith(f"a prompt encoder (process {actor.pid} on ")
    assert lines.said[0].endswith("encoding 4 prompts, has not answered for 60 s; at 100 s the run stops")
    clock[0] = 1000 + 101
    with pytest.raises(DIDRError, match="encoding 4 prompts, has not answered for 101 s, so the run was stopped"):
        patience.look()
    os.kill(actor.pid, signal.SIGKILL)
    actor.wait()
    assert list(running(tmp_path / "calls")) == [] and len(list((tmp_path / "calls").iterdir())) == 1
    clock[0] = 1000 + 130  # another actor does its work again
    patience.look()


def test_calls_that_come_and_go_are_no_hang(tmp_path: Path, clock: list[float]) -> None:
    calls = Calls(tmp_path, "an encoder")
    lines = Lines()
    patience = Patience(lines, 100, tmp_path)
    for call in range(10):
        clock[0] += 30
        with calls.at("encoding"):
            patience.step(StepReport(call, {}))
            patience.look()
    assert lines.said == []


@pytest.mark.parametrize("hang", ["time.sleep(600)", "threading.Lock().acquire() and None or held.acquire()"])
def test_a_hang_in_the_main_thread_ends_with_the_sentence(hang: str) -> None:
    held = module.threading.Lock()
    held.acquire()
    before = signal.getsignal(signal.SIGUSR1)
    began = time.monotonic()
    with pytest.raises(DIDRError, match=r"its last news: step 3\) has not answered for \d+ s"):
        patience = Patience(Lines(), 3.0)
        with patience.watching():
            patience.step(StepReport(3, {}))
            eval(hang, {"time": time, "threading": module.threading, "held": held})
    assert time.monotonic() - began < 300 and signal.getsignal(signal.SIGUSR1) is before


DEAF = """
import signal, time
from didr_core.train import patience
from didr_core.train.observer import Observer
class Said(Observer):
    def stuck(self, error):
        print("stuck:", error, flush=True)
patience.GRACE_S = 0.2
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with patience.Patience(Said(), 0.5).watching():
    time.sleep(600)
"""


def test_code_that_hears_no_exception_is_ended_with_its_process() -> None:
    done = subprocess.run([sys.executable, "-c", DEAF], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("stuck: the training (its last news: its start) has not")
