"""Part "prompts": Parquet shards of captions, train and held-out, disjoint in facts (so also in captions)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from didr_core.world.captions import sample_facts, write_caption

SEED = 5
POINTS = 64


def unique_captions(count: int, held_out: bool, seed: int) -> list[str]:
    """That many different captions of training (held_out False) or held-out facts."""
    rng = np.random.default_rng(seed)
    captions: dict[str, None] = {}
    attempts = 0
    while len(captions) < count:
        attempts += 1
        if attempts > 200 * count:
            raise ValueError(
                f"the grammar does not hold {count} different captions with held_out={held_out}; ask for fewer"
            )
        captions[write_caption(sample_facts(rng, held_out=held_out), rng)] = None
    return list(captions)


def write_shards(captions: list[str], folder: Path, shards: int, name: str) -> None:
    """Columns ``id`` and ``prompt`` (strings), spread round-robin over shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        rows = range(shard, len(captions), shards)
        table = pa.table({"id": [f"{name}-{row:05d}" for row in rows], "prompt": [captions[row] for row in rows]})
        pq.write_table(table, folder / f"{name}-{shard:03d}.parquet", compression="zstd")


def read_shards(folder: Path) -> list[str]:
    """All prompts of a folder of shards, in file order."""
    return [prompt for path in sorted(folder.glob("*.parquet")) for prompt in pq.read_table(path)["prompt"].to_pylist()]


def build(folder: Path, world: Path, train: int = 6000, held_out: int = 2000, shards: int = 4) -> None:
    """Write train and held-out shards under ``world``/prompts, and the prompts of recipe `exact_2d`, which mean nothing."""
    write_shards(unique_captions(train, False, SEED), world / "prompts" / "train", shards, "train")
    held = unique_captions(held_out, True, SEED + 1)
    write_shards(held, world / "prompts" / "heldout", max(2, shards // 2), "heldout")
    points = range(POINTS)
    table = pa.table({"id": [f"point-{i:02d}" for i in points], "prompt": [f"point {i}" for i in points]})
    (world / "exact_2d").mkdir(exist_ok=True)
    pq.write_table(table, world / "exact_2d" / "prompts.parquet", compression="zstd")
