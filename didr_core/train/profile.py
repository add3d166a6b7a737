"""Where the time of a step goes: what `didr align --profile` prints.

A :class:`Profile` takes the place of the `phase` hook of :class:`didr_core.train.learner.Learner`, which the loop enters, too. Each moment
counts for one row alone, that of the innermost phase which has one, so the rows add up to the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ROWS = {
    "TA update": "TA",
    "generator update": "generator",
    "proxy": "proxy",
    "reward": "reward",
    "decoder": "decode",
    "averaging": "averaging",
    "data wait": "data wait",
    "report": "report",
    "checkpoint": "checkpoint",
    "step": "other",
}
"""The row of a phase; the others count for the phase around them. Backward passes through decoder and reward belong to the proxy."""


class Profile:
    """Wall seconds of every step by row, and the process's CPU seconds, of one worker.

    On CUDA the host waits for the device at both ends of a phase: the numbers of the run stay the same, its pace may not. Without a
    profile nothing waits.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.steps: list[dict[str, float]] = []
        self.cpu: list[float] = []
        self._rows: list[str] = []  # of the phases that we are in
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Inside, time counts for the row of ``phase``."""
        if phase not in ROWS or not (self._rows or phase == "step"):
            yield
            return
        if phase == "step":
            self.steps.append(dict.fromkeys(ROWS.values(), 0.0))
            self.cpu.append(-time.process_time())
        self._charge()
        self._rows.append(ROWS[phase])
        try:
            yield
        finally:
            self._charge()
            self._rows.pop()
            if phase == "step":
                self.cpu[-1] += time.process_time()

    def _charge(self) -> None:
        """The time since the last call counts for the row that we are in."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._rows:
            self.steps[-1][self._rows[-1]] += now - self._since
        self._since = now

    def summary(self) -> dict[str, Any]:
        """Means over the steps after the first, which waits for what is being started: plain data, in seconds."""
        counted = slice(1 if len(self.steps) > 1 else 0, None)
        steps, cpu = self.steps[counted], self.cpu[counted]
        return {
            "steps": [sum(step.values()) for step in steps],
            "first": sum(self.steps[0].values()) if self.steps else 0.0,
            "cpu": sum(cpu) / max(len(steps), 1),
            "rows": {row: sum(step[row] for step in steps) / max(len(steps), 1) for row in ROWS.values()},
        }


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a :meth:`Profile.summary`; the last row is the step, the sum of the others."""
    whole = sum(summary["rows"].values())
    rows = [[name, f"{s:.4f}", f"{100 * s / whole:.1f} %"] for name, s in summary["rows"].items()]
    return ["part of a step", "s", "share"], [*rows, ["step", f"{whole:.4f}", "100.0 %"]]
