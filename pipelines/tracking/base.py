"""What a run says to its trackers, and several trackers as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from pipelines.tracking.address import reason

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(AbstractContextManager["Tracker"]):
    """What a run says to its tracker; this one tracks nothing. No method raises because a server is away."""

    run_id: str | None = None
    page = ""
    """Where a browser shows the run, and how to get there."""
    title = "nothing"
    _warned = False

    def params(self, tree: Mapping[str, Any]) -> None:
        """The resolved config, once; nested keys become ``a.b``."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One step's numbers."""

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """Alarms that ring at this step."""

    def final(self, values: Mapping[str, float]) -> None:
        """Numbers that a run has once, at its end; not tied to a step."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder to keep with the run."""

    def model(self, export: Path, weights: bool) -> None:
        """The exported pipeline, with its weights or without."""

    def status(self, status: Status) -> None:
        """How the run will end, before it has."""

    def close(self, status: Status = "FINISHED") -> None:
        """Hand over what waits and end the run; further calls do nothing."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _try(self, call: Callable[..., Any], *args: Any, **named: Any) -> bool:
        """Whether the call went through. The first failure is warned of; a training never stops because of its log book."""
        try:
            call(*args, **named)
        except Exception as error:
            if not self._warned:
                warnings.warn(
                    f"{self.title} is not answering ({reason(error)}); training goes on, and metrics.jsonl has everything",
                    stacklevel=3,
                )
            self._warned = True
            return False
        return True


class Several(Tracker):
    """Each is told everything. The first is MLflow's, or tracks nothing: its run is the one that run.json names."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers
        self.run_id, self.page = trackers[0].run_id, trackers[0].page


def _tell_all(name: str) -> Callable[..., None]:
    def tell(self: Several, *values: Any) -> None:
        for tracker in self.trackers:
            getattr(tracker, name)(*values)

    return tell


for _name in ("params", "metrics", "alarms", "final", "tags", "artifact", "model", "status", "close"):
    setattr(Several, _name, _tell_all(_name))
