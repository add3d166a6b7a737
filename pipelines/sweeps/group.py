"""A trial of several workers: Ray Train inside a Ray Tune trial.

The trial's actor drives `TorchTrainer.fit` in a thread, exactly as `didr align` does, and answers Tune from what rank 0 writes into the run
folder. A scheduler that stops the trial ends its actor, and with it all it started.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from didr_core.data.prompts import open_prompts
from didr_core.export.sample import trained_generator
from didr_core.train.observer import Observer
from didr_core.types import DIDRError
from pipelines.cluster.group import fit_until_done
from pipelines.cluster.members import Members
from pipelines.cluster.remote import elsewhere, in_thread
from pipelines.cluster.resources import train_need
from pipelines.cluster.session import cluster_view, prepare_environment
from pipelines.cluster.watch import POLL_S
from pipelines.sweeps.folder import SweepFolder
from pipelines.sweeps.work import bench_of, checkpoints, conclude, opened


class _Log(Observer):
    """What the driver tells of a restart goes to the trial's own log."""

    def note(self, text: str, style: str = "") -> None:
        """To stdout, which Ray keeps."""
        print(text, flush=True)


def legs(folder: SweepFolder, number: int) -> Iterator[dict[str, Any]]:
    """:func:`pipelines.sweeps.work.legs`, trained by a Ray Train worker group and judged by a process with a trainer's resources.

    Raises:
        DIDRError: a mistake of the user's, or workers that died too often.
    """
    began, looks = time.time(), folder.options().scheduler != "none"
    with opened(folder, number) as (config, run):
        prepare_environment()
        view = cluster_view()
        need = train_need(config.workers, view)
        group = in_thread(fit_until_done, Members(config, run, view, print), run, open_prompts(config), _Log())
        setup_seconds = round(time.time() - began, 3)
        for step in checkpoints(config, run.last_step()):
            last = step == config.train.steps  # then the group draws a grid and ends
            while not group.done() and (last or run.last_step() < step):
                time.sleep(POLL_S)
            if group.done():
                group.result()
            if (reached := run.last_step()) < step:
                raise DIDRError(f"the worker group ended at step {reached} of {config.train.steps} and gave no reason")
            if not last:
                yield {"step": step, **(elsewhere(need, _glance, folder, number) if looks else {})}
        result = elsewhere(need, _conclude, folder, number, began, setup_seconds)
    yield result


def _trained(folder: SweepFolder, number: int) -> nn.Module:
    network = trained_generator(folder.config_of(number), folder.trial(number))[1]
    return network.to(bench_of(folder).evaluator.device)


def _glance(folder: SweepFolder, number: int) -> dict[str, Any]:
    return bench_of(folder).glance(_trained(folder, number))


def _conclude(folder: SweepFolder, number: int, started: float, setup_seconds: float) -> dict[str, Any]:
    judging = time.time()
    return conclude(folder, number, _trained(folder, number), started, setup_seconds, judging)
