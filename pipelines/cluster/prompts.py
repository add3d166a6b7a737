"""Prompt shards as a Ray Data stream: read -> encoder actors -> reward-model actors -> the ranks of the training group.

Ray Data keeps no iterator state, so the place in the stream is ours: one number, samples consumed by all ranks. From it follow

- a schedule of sample indices ``[cursor, batch * steps)``, read a chunk at a time by cheap tasks (row groups, never whole shards);
- blocks of exactly what a rank takes for a step, in order through every stage (`preserve_order`), dealt out in turn by
  `streaming_split(equal=True)`: step k, rank r gets samples ``k * batch + r * share ...`` whatever the size of the actor pools.

The training loop checks the index of every batch, so a change of that behaviour in Ray is an error, not a silent reshuffle.
Nothing materialises on the driver, and back-pressure bounds what is made ahead of the trainers (:data:`AHEAD_BYTES`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from didr_core.config import Config
from didr_core.data.prompts import Columns, PromptIndex, columns
from pipelines.cluster.pool import Pool
from pipelines.cluster.resources import Need

if (
    os.environ.get("RAY_DATA_DISABLE_PROGRESS_BARS") == "1"
):  # the session is quiet; Ray Data sets its level when it is imported
    logging.getLogger("ray.data").setLevel(logging.ERROR)

CHUNK = 2048
"""Samples that a reading task takes at least; more where the run would need more than :data:`MOST_CHUNKS` tasks."""
MOST_CHUNKS = 1000
AHEAD_BYTES = 2**30
"""Object-store memory that the stream may hold ahead of the trainers."""
IN_FLIGHT = 2
"""Blocks an actor has at hand: one at work, one waiting."""


class SampleSchedule(Datasource):
    """Sample indices ``[start, total)`` of the endless stream, read as ``{index, id, prompt}``."""

    def __init__(self, index: PromptIndex, seed: int, start: int, total: int, batch: int) -> None:
        super().__init__()
        # Once in the object store: a corpus of many shards has an index of megabytes, and every reading task needs it.
        self._index = ray.put(index)
        self._seed, self._start, self._total = seed, start, total
        whole = max(CHUNK, -(-(total - start) // MOST_CHUNKS))
        self.chunk = -(-whole // batch) * batch

    @property
    def tasks(self) -> int:
        """How many reading tasks there are."""
        return -(-(self._total - self._start) // self.chunk)

    def get_name(self) -> str:
        """For Ray's dashboard."""
        return "ReadPrompts"

    def estimate_inmemory_data_size(self) -> int | None:
        """About a hundred bytes a prompt."""
        return 100 * (self._total - self._start)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a chunk, in order."""
        tasks = []
        for first in range(self._start, self._total, self.chunk):
            last = min(first + self.chunk, self._total)
            metadata = BlockMetadata(
                num_rows=last - first, size_bytes=100 * (last - first), input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(_Reader(self._index, self._seed, first, last), metadata))
        return tasks


class _Reader:
    """Reads one chunk; the row-group cache of the process that runs it serves the next one."""

    __name__ = "read_prompts"

    def __init__(self, index: Any, seed: int, first: int, last: int) -> None:
        self.index, self.seed, self.first, self.last = index, seed, first, last

    def __call__(self) -> Iterable[pa.Table]:
        index: PromptIndex = ray.get(self.index)
        batch = columns(index.read(np.arange(self.first, self.last), self.seed))
        return [pa.table({k: v.tolist() if v.dtype == object else v for k, v in batch.items()})]


class _Stage:
    """A stage of :mod:`didr_core.data.feed` as a Ray Data actor, which says what it is at.

    Opens its configuration and imports what it needs when it is made: the stream passes through helper processes of Ray's, one after the
    other, and torch would take a second of each.
    """

    def __init__(
        self, tree: Mapping[str, Any], calls: Path | None, who: str, of: str, pools: Sequence[Pool] = ()
    ) -> None:
        import torch

        from didr_core.data import feed
        from didr_core.train.patience import Calls

        torch.set_num_threads(1)
        config, given = Config(**tree), {}
        if pools:
            from pipelines.cluster.scoring import placed

            given = {"reward": placed(config, pools)}
        self.calls = Calls(None if pools else calls, who)  # where it only waits for a pool, that says what it is at
        with self.calls.at("loading"):
            self.stage = feed.stage(getattr(feed, of), config, **given)


class EncoderActor(_Stage):
    """:class:`didr_core.data.feed.PromptEncoder`, or what is kept of it."""

    def __init__(self, tree: Mapping[str, Any], calls: Path | None = None) -> None:
        super().__init__(tree, calls, "a prompt encoder", "PromptEncoder")

    def __call__(self, batch: Columns) -> Columns:
        """See there."""
        with self.calls.at(f"encoding {len(batch['prompt'])} prompts"):
            return self.stage(batch)


class RewardActor(_Stage):
    """:class:`didr_core.data.feed.RewardPreparer`, or what is kept of it; the reward is in ``pools`` where there are any."""

    def __init__(self, tree: Mapping[str, Any], calls: Path | None = None, pools: Sequence[Pool] = ()) -> None:
        super().__init__(tree, calls, f"the reward actor of {tree['reward']['name']!r}", "RewardPreparer", pools)

    def __call__(self, batch: Columns) -> Columns:
        """See there."""
        with self.calls.at(f"scoring the start's pictures of {len(batch['prompt'])} prompts"):
            return self.stage(batch)


def prompt_stream(
    config: Config,
    index: PromptIndex,
    cursor: int,
    encoder: Need,
    reward: Need,
    stages: tuple[type[Any], type[Any]] = (EncoderActor, RewardActor),
    calls: Path | None = None,
    pools: Sequence[Pool] = (),
) -> Dataset:
    """The run's remaining samples as a dataset of training columns, one block a rank and step.

    Args:
        cursor: samples that all ranks together have consumed; a multiple of ``train.batch``.
        encoder: what an encoder actor reserves. reward: what a reward-model actor reserves.
        stages: the two actor classes, called with the configuration as a plain tree (tests put cheap ones here).
        calls: folder in which they say what they are at; given to them, too. pools: of the reward, given to the second where there are any.
    """
    # or a stage's error were lost in what Ray wraps it in
    ray.data.DataContext.get_current().raise_original_map_exception = True
    total = config.sizes.total_prompts
    source = SampleSchedule(index, config.seed, cursor, total, config.train.batch)
    share = config.sizes.share
    stream = ray.data.read_datasource(source, override_num_blocks=max(1, source.tasks))
    stream = stream.repartition(target_num_rows_per_block=share)
    stream = _actors(stream, stages[0], config, share, config.workers.encoders, encoder, calls)
    if config.needs_reward:
        stream = _actors(stream, stages[1], config, share, config.workers.rewards, reward, calls, pools)
    return stream


def _actors(
    stream: Dataset,
    stage: type[Any],
    config: Config,
    share: int,
    size: int,
    need: Need,
    calls: Path | None,
    pools: Sequence[Pool] = (),
) -> Dataset:
    return stream.map_batches(
        stage,
        fn_constructor_args=(config.model_dump(mode="json"), *([calls] if calls else [])),
        fn_constructor_kwargs={"pools": pools} if pools else None,
        batch_size=share,
        batch_format="numpy",
        zero_copy_batch=False,
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=IN_FLIGHT),
        **need.options(),
    )


def execution_options() -> ExecutionOptions:
    """Order kept, and a bound on what lies ahead of the trainers."""
    options = ExecutionOptions()
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
    return options
