"""The Ray Tune trainable: a trial in a warm actor.

A class trainable, not a function: Tune asks for one leg at a time and gets an answer or an exception, so there is no queue to be left full
and no thread to be left waiting. Actors are reused from trial to trial (`reset_config`), with torch, the judges and the page
cache warm. A user's mistake or a diverged training is an answer too ("failed", with its reason): it ends the trial and keeps the actor.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import tune

from didr_core.types import DIDRError
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.work import TrialWork


class Trial(tune.Trainable):
    """``config``: {"sweep": folder, "number": n, "resources": one bundle}."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """What the trial's own process reserves."""
        return tune.PlacementGroupFactory([dict(config["resources"])])

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note; the work is done in :meth:`step`, where an error is the trial's."""
        self.folder, self.number = SweepFolder(Path(config["sweep"])), int(config["number"])
        self.work: Any = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One leg: to the next checkpoint, or to the end and its judgement."""
        if known := self.folder.result(self.number):  # it was over when an earlier driver died
            return self._answer(known)
        try:
            if self.work is None:
                self.work = _work(self.folder, self.number)
                self.work.begin()
            work = self.work
            every = work.config.train.checkpoint_every
            if work.step < work.steps:
                work.advance(min((work.step // every + 1) * every, work.steps))
            if work.step < work.steps:
                looked = work.glance() if work.plan.scheduler == "asha" else {}
                return {"number": self.number, "step": work.step, **looked}
            result = work.finish()
            self._close("finished")
        except DIDRError as error:
            result = self.folder.end(
                self.number, status="failed", reason=str(error), step=self.work.step if self.work else 0
            )
            self._close("failed", str(error))
        return self._answer(result)

    def _answer(self, result: dict[str, Any]) -> dict[str, Any]:
        keep = ("step", "gain", "distance", "score", "status")
        return {"number": self.number, **{k: result[k] for k in keep if result.get(k) is not None}, "done": True}

    def cleanup(self) -> None:
        """Stopped by a scheduler, or the sweep is ending."""
        self._close("interrupted", "stopped by the sweep")

    def _close(self, status: str, message: str | None = None) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.close(status, message)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Checkpoints are the run folder's own."""
        return {"number": self.number, "time": time.time()}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""


def _work(folder: SweepFolder, number: int) -> Any:
    if folder.plan().workers == 1:
        return TrialWork(folder, number)
    from pipelines.sweeps.group import GroupWork

    return GroupWork(folder, number)
