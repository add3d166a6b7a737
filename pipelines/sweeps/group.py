"""A trial of several workers: Ray Train inside a Ray Tune trial.

The trial's actor drives `TorchTrainer.fit` in a thread, exactly as `didr align` does, and answers Tune from what rank 0 writes into the run
folder. Nothing is passed through a queue, so nothing can be left in one: Ray's `TuneReportCallback` leaves a trial RUNNING for ever when
its driver function returns before the queue is drained. A scheduler that stops the trial ends its actor, and with it all it started.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from torch import nn

from didr_core.data.prompts import open_prompts
from didr_core.export.sample import trained_generator
from didr_core.types import DIDRError
from pipelines.cluster.group import fit_until_done
from pipelines.cluster.remote import elsewhere
from pipelines.cluster.resources import train_need
from pipelines.cluster.session import cluster_view, prepare_environment
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.work import TrialWork, bench_of, conclude

POLL_S = 0.3


class _Log:
    """What the driver tells of a restart goes to the trial's own log."""

    def stage(self, text: str) -> None:
        """Nobody watches."""

    def note(self, text: str, style: str = "") -> None:
        """To stdout, which Ray keeps."""
        print(text, flush=True)


class GroupWork(TrialWork):
    """:class:`TrialWork` whose steps are taken by a Ray Train worker group, and whose judging by a process with a trainer's resources."""

    def _load(self) -> None:
        prepare_environment()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name=f"trial-{self.number}", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            fit_until_done(self.config, self.run, open_prompts(self.config), _Log(), cluster_view())
        except BaseException as error:
            self._error = error

    def advance(self, until: int) -> None:
        """Wait for the group to write its checkpoint of step ``until``.

        Raises:
            DIDRError: a mistake of the user's, or workers that died too often.
        """
        while self._thread.is_alive() and self.step < until:
            time.sleep(POLL_S)
        if self._error is not None:
            raise self._error
        if self.step < until:
            raise DIDRError(
                f"the worker group ended at step {self.step} of {self.config.train.steps} and gave no reason"
            )

    def glance(self) -> dict[str, Any]:
        """See :meth:`TrialWork.glance`."""
        return self._elsewhere(_glance)

    def finish(self) -> dict[str, Any]:
        """Wait for the group to end (it draws the grid), then judge."""
        self._thread.join()
        self.advance(self.config.train.steps)
        return self._elsewhere(_conclude, self.began, self.setup_seconds)

    def _elsewhere(self, function: Any, *arguments: Any) -> dict[str, Any]:
        need = train_need(self.config.workers, cluster_view())
        return dict(elsewhere(need, function, self.folder, self.number, *arguments))


def _trained(folder: SweepFolder, number: int) -> nn.Module:
    network = trained_generator(folder.config_of(number), folder.trial(number))[1]
    return network.to(bench_of(folder).evaluator.device)


def _glance(folder: SweepFolder, number: int) -> dict[str, Any]:
    return bench_of(folder).glance(_trained(folder, number))


def _conclude(folder: SweepFolder, number: int, started: float, setup_seconds: float) -> dict[str, Any]:
    judging = time.time()
    return conclude(folder, number, _trained(folder, number), started, setup_seconds, judging)
