"""What is kept of prompts: bit for bit what would be made again, never that of other prompts or weights, damage mended, memory flat."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data import feed, precompute, prompts
from didr_core.data.cache import Kept, read_columns, write_columns
from didr_core.data.feed import LocalFeed, PromptEncoder, RewardPreparer
from didr_core.data.prompts import open_prompts
from didr_core.types import Batch, DIDRError


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


def kept(toy: Path, folder: Path, *overrides: str) -> Config:
    return configs.load(str(toy), ["workers.train=1", f"data.cache={folder}", *overrides])


def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (PromptEncoder, RewardPreparer):
        monkeypatch.setattr(kind, "__init__", lambda *_: pytest.fail("a model was loaded again"))


def assert_same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.ids, a.prompts, a.index.tolist()) == (b.ids, b.prompts, b.index.tolist())
        assert a.baseline is not None and b.baseline is not None and torch.equal(a.baseline, b.baseline)
        assert a.spread is not None and b.spread is not None and torch.equal(a.spread, b.spread)
        for x, y in ((a.condition.tensors, b.condition.tensors), (a.reward_inputs, b.reward_inputs)):
            assert x.keys() == y.keys() and all(torch.equal(v, y[k]) and v.dtype == y[k].dtype for k, v in x.items())


def test_kept_batches_are_the_feeds_own_and_are_made_once(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(LocalFeed(configs.load(str(toy), ["workers.train=1"])))
    first = list(LocalFeed(kept(toy, tmp_path / "c")))
    nothing_loads(monkeypatch)
    other = kept(toy, tmp_path / "c", "drp.beta=0.01", "generator.lr=1", "roles.rank=4")
    for made in (first, list(LocalFeed(other))):
        assert_same(wanted, made)
    assert [b.index[0].item() for b in LocalFeed(other, start=32)] == [32, 40]


def test_what_embeddings_and_baselines_depend_on(toy: Path) -> None:
    def keys(kind: Any, *overrides: str) -> str:
        return str(kind.key(configs.load(str(toy), overrides)))

    text = [(), ("seed=1",), ("reward.path=elsewhere",), ("roles.dtype=bfloat16",), ("backbone.resolution=64",)]
    assert len({keys(PromptEncoder, *o) for o in text}) == 1
    assert keys(PromptEncoder, "backbone.text_dtype=bfloat16") != keys(PromptEncoder)
    start = [
        *((), ("seed=1",), ("reward.path=elsewhere",), ("roles.dtype.generator=bfloat16",), ("baseline.samples=3",)),
        *(("roles.generator=lora",), ("train.micro_batch=4",), ("backbone.text_dtype=bfloat16",)),
    ]
    assert len({keys(RewardPreparer, *o) for o in start}) == len(start)
    # not on the adapters and updates of the same start, nor on where prompts come from
    for same in ("roles.rank=4", "data.column=text", "drp.beta=0.01", "train.batch=4", "workers.train=1"):
        assert keys(RewardPreparer, same) == keys(RewardPreparer)


def test_changed_weights_or_prompts_are_never_taken_for_the_old(tmp_path: Path) -> None:
    """Text encoder, start, reward and prompts are overwritten in place; each is seen, and only what follows from it is made again."""
    toy = toy_recipe(tmp_path)
    config = kept(toy, tmp_path / "c")
    pipeline, (encoder, preparer) = Path(config.backbone.pipeline), (PromptEncoder, RewardPreparer)

    def change(file: Path) -> tuple[bool, bool]:
        before = [kind.key(config) for kind in (encoder, preparer)]
        state = load_file(file)
        name = next(n for n, v in state.items() if v.is_floating_point() and v.dim() == 2)
        save_file(state | {name: state[name] + 0.01}, file)
        return tuple(kind.key(config) != old for kind, old in zip((encoder, preparer), before, strict=True))  # type: ignore[return-value]

    unet = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    assert change(next((pipeline / "text_encoder_2").glob("*.safetensors"))) == (True, True)
    assert change(unet) == (False, True)
    assert change(next(Path(config.reward.path).glob("*.safetensors"))) == (False, True)
    old = next(iter(LocalFeed(config)))
    shard = sorted(Path(config.data.prompts).glob("*.parquet"))
    for file in shard:
        table = pq.read_table(file)
        texts = [p + " at night" for p in table.column("prompt").to_pylist()]
        pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", pa.array(texts)), file)
    prompts._window.cache_clear()  # of this process, which a new run is not
    new = next(iter(LocalFeed(config)))
    assert new.prompts == [p + " at night" for p in old.prompts]
    assert not torch.equal(new.condition.tensors["pooled"], old.condition.tensors["pooled"])
    assert_same([new], [next(iter(LocalFeed(configs.load(str(toy), ["workers.train=1"]))))])


@pytest.mark.parametrize("damage", ["cut", "rot"])
def test_a_damaged_file_is_made_again_with_a_word(
    toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = kept(toy, tmp_path / "c")
    index, wanted = open_prompts(config), list(LocalFeed(config))
    file = Kept(RewardPreparer, config).path(feed.samples(config, index, 8, 8))
    whole = file.read_bytes()
    file.write_bytes(whole[:99] if damage == "cut" else whole[:70] + bytes([whole[70] ^ 255]) + whole[71:])
    if damage == "cut":  # precompute looks at footers
        assert list(precompute.absent(config, index, feed.stages(config), 8, 0)) == [1]
    with caplog.at_level(logging.WARNING):
        assert_same(wanted, list(LocalFeed(config)))
    assert [f"{file} is damaged" in r.getMessage() for r in caplog.records] == [True]
    assert read_columns(file).keys() == {"reward/text", "baseline", "spread"}


def test_precompute_makes_what_is_missing_and_no_more(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kept(toy, tmp_path / "c", "workers.precompute=true")
    index, said = open_prompts(config), []
    _ = list(LocalFeed(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})))
    precompute.precompute(config, index, 8, lambda *s: said.append(s))
    assert said == [("encoding prompts", n, 4) for n in range(4)]  # of six steps two were there
    nothing_loads(monkeypatch)
    precompute.precompute(config, index, 0, lambda *_: pytest.fail("nothing was missing"))
    assert len(list(LocalFeed(config))) == 6


def test_a_disk_that_is_too_small_is_named_after_the_first_block(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kept(toy, tmp_path / "c", "workers.precompute=true")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DIDRError, match=r"data\.cache=.*c'.* GB are free.*workers\.precompute=false"):
        precompute.precompute(config, open_prompts(config), 0, lambda *_: None)
    assert len(list((tmp_path / "c").rglob("*.parquet"))) == 2  # one block, both stages


def test_who_precomputes(toy: Path) -> None:
    def said(*overrides: str) -> tuple[bool, str | None]:
        config = configs.load(str(toy), ["output=runs", *overrides])
        return config.precomputed, config.cache and str(config.cache.relative_to(Path.cwd()))

    gpu = ("workers.train=1", "workers.train_gpus=0.7", "workers.reward_gpus=0.2")
    assert said() == (False, None) and said("workers.precompute=true") == (True, "runs/cache")
    assert said(*gpu) == (True, "runs/cache") and said(*gpu, "data.cache=here") == (True, "here")
    assert said(*gpu, "workers.precompute=false") == (False, None)
    assert said("workers.train=2", *gpu[1:]) == (False, None) and said("data.cache=here") == (False, "here")


class Cheap:
    """A stage of wide rows, 64 KiB a sample."""

    reads = ("prompt",)

    def __init__(self, config: Config) -> None:
        pass

    @staticmethod
    def key(config: Config) -> str:
        return "cheap"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "condition/x": np.ones((len(batch["index"]), 128, 128), np.float32)}


def test_memory_does_not_grow_with_the_prompts(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """320 MiB of embeddings go to the disk and back; a few blocks of 8 MiB are alive at once."""
    config = kept(toy, tmp_path / "c", "train.batch=128", "train.steps=40", "algorithm=diff_instruct")
    monkeypatch.setattr(feed, "PromptEncoder", Cheap)
    process, seen = psutil.Process(), []
    before = process.memory_info().rss
    precompute.precompute(config, open_prompts(config), 0, lambda *_: seen.append(process.memory_info().rss))
    for batch in LocalFeed(config):
        assert bool(batch.condition.tensors["x"].all())
        seen.append(process.memory_info().rss)
    assert len(seen) == 80 and (max(seen) - before) / 2**20 < 150


def test_columns_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    wide[0, 0, :3] = np.nan, np.inf, -0.0
    told = {"a": wide, "b": wide[:, 0, 0], "c": np.arange(3), "h": wide.astype(np.float16), "k": wide[:, 1, 1] > 0}
    told |= {"m": wide > 0, "e": np.broadcast_to(wide[:1], wide.shape), "t": wide.transpose(0, 2, 1)}
    write_columns(tmp_path / "x.parquet", told)
    read = read_columns(tmp_path / "x.parquet")
    assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in read.items()} == {
        k: (v.dtype, v.shape, np.ascontiguousarray(v).tobytes()) for k, v in told.items()
    }
