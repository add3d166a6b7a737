"""Prompt shards as a Ray Data stream: read -> encoder actors -> reward-model actors -> the ranks of the training group.

Ray Data keeps no iterator state, so the place in the stream is ours: one number, samples consumed by all ranks. From it follow

- a schedule of sample indices ``[cursor, batch * steps)``, read a chunk at a time by cheap tasks (row groups, never whole shards);
- blocks of exactly what a rank takes for a step, in order through every stage (`preserve_order`), dealt out in turn by
  `streaming_split(equal=True)`: step k, rank r gets samples ``k * batch + r * share ...`` whatever the size of the actor pools.

The training loop checks the index of every batch, so a change of that behaviour in Ray is an error, not a silent reshuffle.
Nothing materialises on the driver, and back-pressure bounds what is made ahead of the trainers (:data:`AHEAD_BYTES`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset, ExecutionOptions, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from didr_core.config import Config
from didr_core.data import feed
from didr_core.data.cache import Kept
from didr_core.data.feed import Columns, PromptEncoder, RewardPreparer, columns, to_batch
from didr_core.data.precompute import SAYS, absent, require_room
from didr_core.data.prompts import PromptIndex
from didr_core.train.patience import Calls
from didr_core.types import Batch
from pipelines.cluster.resources import Need

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


class EncoderActor(PromptEncoder):
    """:class:`didr_core.data.feed.PromptEncoder` as a Ray Data actor."""

    def __init__(self, config: Config, calls: Path | None = None) -> None:
        torch.set_num_threads(1)
        self.calls = Calls(calls, "a prompt encoder")
        with self.calls.at("loading"):
            super().__init__(config)

    def __call__(self, batch: Columns) -> Columns:
        """See there."""
        with self.calls.at(f"encoding {len(batch['prompt'])} prompts"):
            return super().__call__(batch)


class RewardActor(RewardPreparer):
    """:class:`didr_core.data.feed.RewardPreparer` as a Ray Data actor."""

    def __init__(self, config: Config, calls: Path | None = None) -> None:
        torch.set_num_threads(1)
        self.calls = Calls(calls, f"the reward actor of {config.reward and config.reward.name!r}")
        with self.calls.at("loading"):
            super().__init__(config)

    def __call__(self, batch: Columns) -> Columns:
        """See there."""
        with self.calls.at(f"scoring the start's pictures of {len(batch['prompt'])} prompts"):
            return super().__call__(batch)


class KeptEncoder(Kept):
    """The same, for `data.cache`."""

    def __init__(self, config: Config, *calls: Path) -> None:
        super().__init__(EncoderActor, config, *calls)


class KeptReward(Kept):
    """The same, for `data.cache`."""

    def __init__(self, config: Config, *calls: Path) -> None:
        super().__init__(RewardActor, config, *calls)


def prompt_stream(
    config: Config,
    index: PromptIndex,
    cursor: int,
    encoder: Need,
    reward: Need,
    stages: tuple[type[Any], type[Any]] | None = None,
    calls: Path | None = None,
) -> Dataset:
    """The run's remaining samples as a dataset of training columns, one block a rank and step.

    Args:
        cursor: samples that all ranks together have consumed; a multiple of ``train.batch``.
        encoder: what an encoder actor reserves. reward: what a reward-model actor reserves.
        stages: the two actor classes, called with the config (tests put cheap ones here).
        calls: folder in which they say what they are at; given to them, too.
    """
    stages = stages or ((KeptEncoder, KeptReward) if config.cache else (EncoderActor, RewardActor))
    # or a stage's error were lost in what Ray wraps it in
    ray.data.DataContext.get_current().raise_original_map_exception = True
    total = config.sizes.total_prompts
    source = SampleSchedule(index, config.seed, cursor, total, config.train.batch)
    share = config.sizes.share
    stream = ray.data.read_datasource(source, override_num_blocks=max(1, source.tasks))
    stream = stream.repartition(target_num_rows_per_block=share)
    stream = _actors(stream, stages[0], config, share, config.workers.encoders, encoder, calls)
    if config.needs_reward:
        stream = _actors(stream, stages[1], config, share, config.workers.rewards, reward, calls)
    return stream


def _actors(
    stream: Dataset, stage: type[Any], config: Config, share: int, size: int, need: Need, calls: Path | None
) -> Dataset:
    return stream.map_batches(
        stage,
        fn_constructor_args=(config, calls) if calls else (config,),
        batch_size=share,
        batch_format="numpy",
        zero_copy_batch=False,
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=IN_FLIGHT),
        **need.options(),
    )


def precompute(
    config: Config,
    index: PromptIndex,
    cursor: int,
    encoder: Need,
    reward: Need,
    say: Callable[[str, int, int], None],
    calls: Path | None = None,
) -> None:
    """:func:`didr_core.data.precompute.precompute` by the actors of :func:`prompt_stream`, which are gone when it returns.

    Raises:
        DIDRError: it would not fit on the disk. RayError: what a stage raised, or its death.
    """
    share, stages = config.sizes.share, feed.stages(config)
    todo = list(absent(config, index, stages, share, cursor))
    if not todo:
        return
    stream = prompt_stream(config, index, todo[0] * share, encoder, reward, calls=calls).select_columns(["index"])
    stream.context.execution_options = execution_options()
    last = config.sizes.total_prompts // share
    for number, _ in zip(range(todo[0], last), stream.iter_batches(batch_size=share), strict=True):
        if number == todo[0]:
            require_room(config, stages, feed.samples(config, index, number * share, share), len(todo) - 1)
        say(SAYS, number + 1 - todo[0], last - todo[0])


def execution_options() -> ExecutionOptions:
    """Order kept, and a bound on what lies ahead of the trainers."""
    options = ExecutionOptions()
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
    return options


def batches(shard: Any, share: int) -> Iterator[Batch]:
    """Training batches of one rank from its dataset shard."""
    rows: Iterable[Columns] = shard.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=1)
    for row in rows:
        yield to_batch(row)
