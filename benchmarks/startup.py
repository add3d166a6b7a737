"""Where the time goes between `didr align` and the end of its first training step: wall-clock and CPU seconds, by stage and by process.

    python -m benchmarks.startup                  # recipe tiny through Ray, in a throw-away folder
    python -m benchmarks.startup --local          # arguments go to `didr align` as they are

The run is stopped after its first step. Stages are its own progress lines. On a busy machine compare CPU seconds, not wall-clock.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import psutil

EVERY_S = 0.1


class Usage(threading.Thread):
    """CPU seconds of a process and of all that was ever seen below it, sampled until :meth:`stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.began = time.monotonic()
        self.known = {pid: psutil.Process(pid)}
        self.rows: dict[int, tuple[str, float, float]] = {}  # name, first seen after, CPU seconds
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            for process in list(self.known.values()):
                with contextlib.suppress(psutil.Error):
                    self.known |= {p.pid: p for p in process.children() if p.pid not in self.known}
                    seen = self.rows.get(process.pid, ("", self.seconds, 0.0))[1]
                    times = process.cpu_times()
                    self.rows[process.pid] = _name(process), seen, times.user + times.system

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def cpu(self) -> float:
        """CPU seconds of all of them so far."""
        return sum(row[2] for row in list(self.rows.values()))


def _name(process: psutil.Process) -> str:
    """What Ray calls its worker, or the program."""
    words = process.cmdline() or [process.name()]
    named = [Path(w).stem for w in words if w.endswith(".py")]
    named += [words[i + 1] for i, w in enumerate(words[:-1]) if w == "-m"]
    return words[0].split()[0] if words[0].startswith("ray::") else (named or [Path(words[0]).name])[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until the first step, print both tables; returns 0, or the run's own exit status where it came to no step."""
    more = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "pipelines.cli.main", "align", *more, "--output", str(run)]
        stages = [("importing, preflight", 0.0, 0.0)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            usage = Usage(child.pid)
            usage.start()
            reader = threading.Thread(target=_read, args=(child, usage, stages), daemon=True)
            reader.start()
            while child.poll() is None and not _stepped(run):
                time.sleep(EVERY_S / 2)
            usage.stop()
            stages.append(("", usage.seconds, usage.cpu))
            child.terminate()  # lets the step end
            child.wait()
        if not usage.rows or not _stepped(run):
            return child.returncode or 1
    print(f"{'stage':<40}{'at, s':>9}{'s':>9}{'CPU s':>9}")
    for (name, wall, cpu), (_, wall_after, cpu_after) in pairwise(stages):
        print(f"{name:<40}{wall:>9.1f}{wall_after - wall:>9.1f}{cpu_after - cpu:>9.1f}")
    print(f"{'first step done':<40}{usage.seconds:>9.1f}{'':>9}{usage.cpu:>9.1f}")
    print(f"\n{'process':<40}{'from, s':>9}{'':>9}{'CPU s':>9}")
    for name, seen, cpu in sorted(usage.rows.values(), key=lambda row: -row[2]):
        print(f"{name[:39]:<40}{seen:>9.1f}{'':>9}{cpu:>9.1f}")
    return 0


def _read(child: subprocess.Popen[str], usage: Usage, stages: list[tuple[str, float, float]]) -> None:
    """The run's progress lines: `tiny  starting Ray` begins a stage."""
    assert child.stderr is not None
    for line in child.stderr:
        name, _, stage = line.strip().partition("  ")
        if stage and " " not in name:
            stages.append((stage, usage.seconds, usage.cpu))
        elif not line.startswith("run "):
            print(line, end="", file=sys.stderr)


def _stepped(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


if __name__ == "__main__":
    sys.exit(main())
