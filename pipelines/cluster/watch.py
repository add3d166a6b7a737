"""The driver's view of a run: it follows the files that rank 0 writes, and tells the progress line and MLflow.

Files rather than messages, because they survive what a training may go through (a worker group that is restarted, a driver that is
resumed), and because the driver is the one process that lives as long as the MLflow run does.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import StepReport

POLL_S = 0.3


class Follower:
    """Reads ``metrics.jsonl``, ``alarms.jsonl`` and ``stage.json`` as they grow, and hands them to an observer.

    A step is handed on once, also when a restarted worker group takes it again.
    """

    def __init__(self, run: RunFolder, observer: Observer, step: int = 0) -> None:
        self.run, self.observer, self.step = run, observer, step
        self._offset, self._file = 0, -1
        self._stage: Any = None
        run.stage_path.unlink(missing_ok=True)  # of an earlier driver's worker group

    def look(self) -> None:
        """Hand on what is new."""
        for row in self._rows():
            step = int(row.pop("step"))
            row.pop("time", None)
            if step <= self.step:
                continue
            self.step = step
            ringing = tuple(r["alarm"] for r in read_lines(self.run.alarms_path) if r["step"] == step)
            metrics = {k: float("nan") if v is None else float(v) for k, v in row.items()}
            self.observer.step(StepReport(step, metrics, ringing))
        with contextlib.suppress(FileNotFoundError, ValueError):  # between a replace and the next look
            stage = json.loads(self.run.stage_path.read_text())
            if stage != self._stage:
                self._stage = stage
                self.observer.stage(*stage)

    def _rows(self) -> list[dict[str, Any]]:
        """Complete lines since the last look; from the beginning when the file was replaced."""
        try:
            now = self.run.metrics_path.stat()
        except FileNotFoundError:
            return []
        if now.st_ino != self._file or now.st_size < self._offset:
            self._file, self._offset = now.st_ino, 0
        if now.st_size == self._offset:
            return []
        with self.run.metrics_path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
