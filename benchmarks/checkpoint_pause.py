"""How long does a checkpoint hold training back? The copy that a step waits for, beside the whole of it: copy, files, sums, disk.

    python -m benchmarks.checkpoint_pause                  # recipe tiny, and a state of 1 GB; a minute
    python -m benchmarks.checkpoint_pause --bytes 10e9 --folder /mnt/disk

Medians of `--times` checkpoints after the first, which also makes the memory that copies are kept in.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from didr_core import config as configs
from didr_core.train.checkpoint import Saver
from didr_core.train.distributed import Single
from didr_core.train.learner import Learner


def state_of(size: float) -> Any:
    """Stands for a learner whose state has so many bytes: a network, its average, and an optimizer's two moments."""
    parts = {name: torch.randn(int(size / 16)) for name in ("generator", "ema", "exp_avg", "exp_avg_sq")}
    tree = {name: {str(n): row for n, row in enumerate(t.chunk(100))} for name, t in parts.items()}
    return SimpleNamespace(fsdp=False, parallel=Single(), state_dict=lambda: tree)


def measure(learner: Any, folder: Path, times: int) -> tuple[float, float, float]:
    """Seconds that training waits at the first checkpoint and (median) at later ones, and (median) until one is on the disk."""
    pauses, wholes = [], []
    with Saver(learner) as saver:
        for n in range(times + 1):
            began = time.perf_counter()
            saver.save(folder / f"step-{n}", {})
            pauses.append(time.perf_counter() - began)
            saver.wait()
            wholes.append(time.perf_counter() - began)
    return pauses[0], statistics.median(pauses[1:]), statistics.median(wholes[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_pause")
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to be measured")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print("| state | pause, first | pause | written after | pause / written |\n|---|---|---|---|---|")
    tiny = Learner(configs.load("tiny"))
    for name, learner in (("recipe `tiny`", tiny), (f"{given.bytes / 1e9:g} GB", state_of(given.bytes))):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            first, pause, whole = measure(learner, Path(folder), given.times)
        print(f"| {name} | {first:.3f} s | {pause:.3f} s | {whole:.2f} s | {pause / whole:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
