"""The Ray Tune trainable: a trial in a warm actor.

A class trainable, not a function: Tune asks for one leg at a time and gets an answer or an exception. What would go wrong again is an
answer too ("failed", with its reason): it ends the trial and keeps the actor, which is reused for the next one (`reset_config`).
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import torch
from ray import tune

from didr_core.train.run_folder import read_lines
from pipelines.cluster.remote import users_mistake
from pipelines.sweeps import work
from pipelines.sweeps.folder import SweepFolder, drives_group


class Trial(tune.Trainable):
    """``config``: {"sweep": folder, "number": n}. Checkpoints are the run folder's own: Tune keeps none."""

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note; the work is done in :meth:`step`, where an error is the trial's."""
        self.folder, self.number = SweepFolder(Path(config["sweep"])), int(config["number"])
        self.legs: Any = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One leg: to the next checkpoint, or to the end and its judgement."""
        result = self.folder.result(self.number)  # it may have been over when an earlier driver died
        if result is None:
            self.legs = self.legs or self._begin()
            try:
                result = next(self.legs)
            except Exception as error:
                mistake = users_mistake(error)
                if not mistake:  # a process died: Tune tries again
                    raise
                rows = read_lines(self.folder.trial(self.number).metrics_path)
                step = rows[-1]["step"] if rows else 0
                result = self.folder.end(self.number, status="failed", reason=str(mistake), step=step)
        over = "status" in result
        if over:
            self.cleanup()
        keep = ("step", "gain", "distance", "score", "status")
        return {"number": self.number, **{k: result[k] for k in keep if result.get(k) is not None}, "done": over}

    def _begin(self) -> Any:
        if not drives_group(self.folder.config(), self.folder.options().workers):
            return work.legs(self.folder, self.number)
        from pipelines.sweeps import group

        return group.legs(self.folder, self.number)

    def cleanup(self) -> None:
        """The trial is over, or stopped by a scheduler: its folder and its memory are free."""
        if self.legs is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self.legs.throw(KeyboardInterrupt("stopped by the sweep"))
        self.legs = None
        gc.collect()
        torch.cuda.empty_cache()
