"""What each Ray Train worker runs: the loop of :mod:`didr_core.train.loop` on its share of the stream. Rank 0 writes the run folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import ray.train
import ray.train.torch
import torch

from didr_core.config import Config
from didr_core.data.feed import LocalFeed, ahead, to_batch
from didr_core.data.prompts import Columns
from didr_core.evaluate.finish import Say, finish, looker
from didr_core.train import distributed
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, loop
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder
from didr_core.types import Batch, Parallel
from pipelines.cluster.pool import Pool
from pipelines.cluster.remote import users_mistake
from pipelines.cluster.scoring import placed
from pipelines.report.figures import save_grid


class Reporter(Observer):
    """`ray.train.report` at checkpoints only: it is a barrier, so all ranks call it equally often."""

    def checkpoint(self, step: int) -> None:
        """Tell Ray Train; the checkpoint itself is the run folder's affair."""
        ray.train.report({"step": step})


def train_worker(settings: Mapping[str, Any]) -> None:
    """`train_loop_per_worker`. ``settings``: those of :func:`_train`, and ``owner``, the driver's name in the run folder."""
    ranks = distributed.current()
    try:
        rest = dict(settings)
        run = rest.pop("run").here(rest.pop("owner"))
        with ExitStack() as stack:
            if (
                run.apart and not ray.train.get_context().get_local_rank()
            ):  # the first of a machine that is not the driver's
                stack.enter_context(run.mirrored())
                stack.enter_context(run.lock())
            _train(ranks, run=run, **rest)
    except Exception as error:
        if mistake := users_mistake(error):  # Ray hands it to the driver, which could not read what it cannot import
            raise mistake from error
        raise


def _train(
    ranks: Parallel, config: Config, run: RunFolder, step: int, corpus: str, pools: Sequence[Pool], profile: bool
) -> None:
    torch.set_num_threads(config.train.threads)
    first = ranks.rank == 0
    stage: Say = run.stage if first else lambda *_: None
    todo = step < config.train.steps
    stream: Iterable[Batch] = ()
    if (
        todo and not config.precomputed
    ):  # the actors start when the first batch is asked for: let them load their models while we load ours
        stream = ahead(batches(ray.train.get_dataset_shard("train"), config.sizes.share), run.stop_path.exists)
    stage("loading networks", 0, 0)
    device = ray.train.torch.get_device()
    for pool in pools:
        pool.share_with(ranks.rank, ranks.world_size, lambda text: run.stage(text, 0, 0))
    reward = placed(config, pools) if pools else None
    if reward:
        reward.load(device)
    learner = Learner(config, device=device, parallel=ranks, reward=reward)
    journal = Journal(run, config, learner, corpus)
    journal.restore(step)
    if todo and config.precomputed:  # after our own: two threads that import transformers at once see half of it
        cursor = step * config.train.batch
        stream = ahead(LocalFeed(config, cursor, rank=ranks.rank, world_size=ranks.world_size))
    look = looker(learner, config, run, save_grid) if first and config.evaluation.every else None
    stage("waiting for the first prompts", 0, 0)
    loop(learner, stream, journal, Reporter(), writes=first, look=look, profile=profile)
    learner.gather()
    finish(learner, config, run, stage, save_grid)


def batches(shard: Any, share: int) -> Iterator[Batch]:
    """Training batches of one rank from its dataset shard."""
    rows: Iterable[Columns] = shard.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=1)
    for row in rows:
        yield to_batch(row)
