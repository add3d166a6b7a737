"""The Ray Tune trainable: a trial in a warm actor.

A class trainable, not a function: Tune asks for one leg at a time and gets an answer or an exception, so there is no queue to be left full
and no thread to be left waiting. Actors are reused from trial to trial (`reset_config`), with torch, the judges and the page
cache warm. A user's mistake or a diverged training is an answer too ("failed", with its reason): it ends the trial and keeps the actor.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from ray import tune

from didr_core.types import DIDRError
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.work import TrialWork


class Trial(tune.Trainable):
    """``config``: {"sweep": folder, "number": n}. Checkpoints are the run folder's own: Tune keeps none."""

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note; the work is done in :meth:`step`, where an error is the trial's."""
        self.folder, self.number = SweepFolder(Path(config["sweep"])), int(config["number"])
        self.work: TrialWork | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One leg: to the next checkpoint, or to the end and its judgement."""
        result = self.folder.result(self.number)  # it may have been over when an earlier driver died
        try:
            if result is None:
                work = self.work or self._begin()
                result = work.leg()
                if result is None:
                    looked = work.glance() if work.options.scheduler == "asha" else {}
                    return {"number": self.number, "step": work.step, **looked}
                self._close("finished")
        except DIDRError as error:
            step = self.work.step if self.work else 0
            result = self.folder.end(self.number, status="failed", reason=str(error), step=step)
            self._close("failed", str(error))
        keep = ("step", "gain", "distance", "score", "status")
        return {"number": self.number, **{k: result[k] for k in keep if result.get(k) is not None}, "done": True}

    def _begin(self) -> TrialWork:
        if self.folder.options().workers == 1:
            self.work = TrialWork(self.folder, self.number)
        else:
            from pipelines.sweeps.group import GroupWork

            self.work = GroupWork(self.folder, self.number)
        self.work.begin()
        return self.work

    def cleanup(self) -> None:
        """Stopped by a scheduler, or the sweep is ending."""
        self._close("interrupted", "stopped by the sweep")

    def _close(self, status: str, message: str | None = None) -> None:
        if self.work is not None:
            self.work.close(status, message)
        self.work = None
        gc.collect()
        torch.cuda.empty_cache()
