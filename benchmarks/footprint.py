"""How long a command takes and how much memory it and all its descendants hold at most.

    python -m benchmarks.footprint -- make demo

Memory is the sum of proportional set sizes (PSS: a shared page counts once, whoever shares it), sampled once a second; Linux only.
On a machine with other work the seconds are an upper bound.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

EVERY_S = 1.0


def tree_bytes(root: psutil.Process, known: dict[int, psutil.Process]) -> int:
    """PSS in bytes of ``root`` and of everything that was ever seen below it: daemons may have left the tree since."""
    for process in (root, *known.values()):
        try:
            known |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    total = 0
    for process in (root, *known.values()):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            known.pop(process.pid, None)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    command = [a for a in (sys.argv[1:] if arguments is None else arguments) if a != "--"]
    if not command or command[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    began, peak, peak_at = time.monotonic(), 0, 0.0
    known: dict[int, psutil.Process] = {}
    with subprocess.Popen(command) as child:
        root = psutil.Process(child.pid)
        while child.poll() is None:
            if (held := tree_bytes(root, known)) > peak:
                peak, peak_at = held, time.monotonic() - began
            time.sleep(EVERY_S)
    seconds = time.monotonic() - began
    print(
        f"{seconds:.0f} s, at most {peak / 2**30:.2f} GiB (after {peak_at:.0f} s), exit {child.returncode}: {' '.join(command)}"
    )
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
