"""What preflight says that is no mistake, and what a resumed run compares with its beginning."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_models import prompt_shards

from didr_core import config as configs
from didr_core.networks import tokenizers
from didr_core.plan.preflight import preflight
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError


def prompts(folder: Path, texts: list[str], name: str = "a.parquet") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"prompt": texts}), folder / name)
    return folder


def test_a_run_that_ends_in_its_warm_up_is_told_so() -> None:
    said: list[str] = []
    preflight(configs.load("tiny", ["train.steps=20"]), note=said.append)
    assert said == ["train.steps=20 is not over train.assistant_warmup=20: the generator stays as it is."]


@pytest.mark.parametrize(
    ("estimator", "algorithm", "told"), [("hybrid", "didr", True), ("ode", "didr", False), ("shift", "dmdr", False)]
)
def test_a_gate_that_an_estimator_has_no_use_for_is_said(estimator: str, algorithm: str, told: bool) -> None:
    said: list[str] = []
    preflight(configs.load("tiny", [f"drp.estimator={estimator}", f"algorithm={algorithm}"]), note=said.append)
    assert [text.split(",")[0] for text in said] == [f"drp.snr_gate=true weakens drp.estimator={estimator}"] * told


def test_prompts_that_are_cut_are_counted_by_who_reads_them(tmp_path: Path) -> None:
    """The bundled tokenizer has a token a word, and reads 18 words."""
    texts = ["a red ring", "a red ring " * 7, "a red ring " * 6, "ring"]
    said: list[str] = []
    preflight(configs.load("tiny", [f"data.prompts={prompts(tmp_path / 'p', texts)}", "judge=null"]), note=said.append)
    assert said == [
        "of the first 4 prompts, longer than what is read of them: 1 by the encoder (20 tokens); 1 by the reward (20 tokens). "
        "The rest is cut off."
    ]
    prompts(tmp_path / "p", texts[2:], "b.parquet")
    (tmp_path / "p" / "a.parquet").rename(tmp_path / "p" / "val.parquet")
    (tmp_path / "p" / "b.parquet").rename(tmp_path / "p" / "train.parquet")
    preflight(configs.load("tiny", [f"data.prompts={tmp_path / 'p'}"]), note=said.append)
    assert "several splits are read together: 1 train, 1 val" in said[1] and "of the first 6 prompts" in said[2]


def test_a_cluster_is_not_judged_by_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: SimpleNamespace(total_memory=16e9))
    monkeypatch.setattr("didr_core.plan.advice.check", lambda config, gigabytes: asked.append(gigabytes))
    preflight(configs.load("tiny"), here=False, gpus=False)
    assert asked == []
    preflight(configs.load("tiny"), here=False)
    assert asked == [16.0]


def test_short_prompts_need_no_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tokenizers.longer_than(tmp_path, 77, ["x" * 75, "é" * 37]) == 0  # there is none: bytes bound tokens
    with pytest.raises(DIDRError, match="no tokenizer there"):
        tokenizers.longer_than(tmp_path, 77, ["x" * 76])


def test_held_out_prompts_among_training_prompts_are_refused_unless_told(tmp_path: Path) -> None:
    train = prompts(tmp_path / "p", ["a red ring", "a blue ring", "ring"])
    (tmp_path / "held.txt").write_text("A red  ring\na green ring\n")
    sets = [f"data.prompts={train}", f"data.heldout={tmp_path / 'held.txt'}"]
    with pytest.raises(DIDRError, match=r"1 of 2 held-out prompts are among the 3 training prompts, e.g. 'a red ring'"):
        preflight(configs.load("tiny", sets))
    index = preflight(configs.load("tiny", [*sets, "data.allow_overlap=true"]))
    assert index.overlap == "1 of 2 held-out prompts are among the 3 training prompts"
    assert preflight(configs.load("tiny")).overlap == "0 of 2,000 held-out prompts are among the 6,000 training prompts"
    assert not preflight(configs.load("tiny", ["data.heldout=null"])).overlap


def test_a_resumed_run_reads_the_prompts_that_it_began_with(tmp_path: Path) -> None:
    folder = prompt_shards(tmp_path / "p", shards=1, rows=3)
    config = configs.load("tiny", [f"data.prompts={folder}", f"output={tmp_path}"])
    run = RunFolder.create(config, str(tmp_path / "run"))
    before = preflight(config)
    assert run.same_start(before.digest) == "" == run.same_start(preflight(config).digest)
    shutil.copy(folder / "shard-000.parquet", tmp_path / "kept")
    pq.write_table(pq.read_table(folder), folder / "shard-000.parquet", compression="none")
    assert preflight(config).digest == before.digest  # other bytes, the same texts
    table = pq.read_table(folder)
    pq.write_table(table.set_column(1, "prompt", pa.array(["x", "y", "z"])), folder / "shard-000.parquet")
    after = preflight(config)
    assert after.fingerprint == before.fingerprint
    with pytest.raises(DIDRError, match="data.prompts holds other texts than when it began"):
        run.same_start(after.digest)
    versions = run.info()["versions"]
    run.update(versions=versions | {"torch": "1.0", "numpy": "1.0"})
    told = run.same_start(before.digest)
    assert f"torch 1.0 -> {versions['torch']}" in told and "numpy" not in told
