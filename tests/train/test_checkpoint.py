"""What lies in a checkpoint, and what is said of a damaged one; resumes: test_learner.py, splitting: tests/networks/test_sharding.py."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import sdxl_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_learner import batch, learner

from didr_core.train import checkpoint
from didr_core.train.learner import Learner
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError

DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda file: _flip(file),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "foreign": lambda file: file.write_bytes(pickle.dumps({"something": "else"})),
}


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    return learner(sdxl_folder(tmp_path_factory.mktemp("checkpoint") / "pipeline"), train={"assistant_warmup": 1})


@pytest.fixture(scope="module")
def written(subject: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 1 and 2; tests damage copies of it."""
    run = RunFolder(tmp_path_factory.mktemp("written"))
    for step in (1, 2):
        subject.step(batch(subject))
        checkpoint.Saver(subject).save(run.checkpoint(step), {"n": step})
    return run.path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(written, tmp_path / "run")))


FILES = ["generator.0.safetensors", "assistant_opt.0.safetensors", "scale.0.safetensors", "state.json", "SHA256SUMS"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_with_the_checkpoint_to_go_on_from(
    run: RunFolder, subject: Learner, file: str, damage: str
) -> None:
    DAMAGES[damage](run.checkpoint(2) / file)
    before = {name: p.detach().clone() for name, p in subject.generator_net.named_parameters()}
    with pytest.raises(DIDRError) as error:
        checkpoint.load(run.checkpoint(2), subject)
    said = str(error.value)
    assert f"{run.checkpoint(2)}: damaged: {file}" in said and "\n" not in said
    assert "it goes on from step-000001, which is intact" in said
    assert all(torch.equal(p, before[name]) for name, p in subject.generator_net.named_parameters())  # not touched
    run.checkpoint(2).rename(run.path / "checkpoints" / "step-000002.damaged")  # what it says helps
    assert checkpoint.load(run.checkpoint(run.last_step()), subject) == {"n": 1}


def test_without_an_older_intact_one_it_says_so(run: RunFolder, subject: Learner) -> None:
    for step in (1, 2):
        _flip(run.checkpoint(step) / "ema.0.safetensors")
    with pytest.raises(DIDRError, match=r"ema\.0\.safetensors .* No older checkpoint is intact: start a new run"):
        checkpoint.load(run.checkpoint(2), subject)
    with pytest.raises(DIDRError, match="No older checkpoint is intact"):  # an export looks at what it needs
        checkpoint.read(run.checkpoint(2), "ema")
    assert checkpoint.read(run.checkpoint(2), "generator")


def test_sums_are_those_that_sha256sum_takes(run: RunFolder) -> None:
    folder = run.checkpoint(2)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: value for value, name in (line.split("  ") for line in lines)}
    assert sums.keys() | {"SHA256SUMS"} == {p.name for p in folder.iterdir()}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in sums.items())


def test_parts_are_plain_safetensors_and_nothing_is_pickled(run: RunFolder, subject: Learner) -> None:
    checkpoint.load(run.checkpoint(2), subject)
    found = load_file(run.checkpoint(2) / "assistant.0.safetensors")
    assert len(found) == len(subject.assistant_weights.values)
    for name, value in subject.assistant_weights.values.items():
        assert torch.equal(found[f"assistant/{name}"], value)
    assert json.loads((run.checkpoint(2) / "state.json").read_text())["layout"] == checkpoint.LAYOUT
    assert {p.suffix for p in run.checkpoint(2).iterdir()} == {".safetensors", ".json", ""}


def test_an_optimizer_that_has_not_begun_is_restored_so(run: RunFolder, subject: Learner) -> None:
    fresh = Learner(subject.config)
    checkpoint.load(run.checkpoint(1), fresh)  # a head start of one step
    assert not fresh.generator_opt.state and fresh.assistant_opt.state and fresh.step_count == 1
    checkpoint.load(run.checkpoint(2), fresh)
    assert fresh.generator_opt.state


def test_one_of_another_model_does_not_fit(run: RunFolder, subject: Learner) -> None:
    other = Learner(subject.config.model_copy(update={"roles": subject.config.roles.model_copy(update={"rank": 2})}))
    with pytest.raises(DIDRError, match=r"does not fit this recipe \(expected a tensor of"):
        checkpoint.load(run.checkpoint(2), other)


def test_the_layout_before_and_one_to_come_are_named_with_the_version_that_reads_them(
    run: RunFolder, subject: Learner
) -> None:
    old = run.checkpoint(3)
    old.mkdir()
    torch.save({"learner": {}, "extra": {}}, old / "state.pt")
    assert run.last_step() == 3  # not passed over for an older one
    with pytest.raises(DIDRError, match=r"of layout 1; this version reads layout 2\. Go on with DIDR 0\.2\.0"):
        checkpoint.load(old, subject)
    new = run.checkpoint(2)
    text = json.dumps(json.loads((new / "state.json").read_text()) | {"layout": 3, "didr": "9.1"})
    sums = (new / "SHA256SUMS").read_text().splitlines()[:-1]
    (new / "state.json").write_text(text)
    (new / "SHA256SUMS").write_text("\n".join([*sums, f"{hashlib.sha256(text.encode()).hexdigest()}  state.json\n"]))
    with pytest.raises(DIDRError, match=r"of layout 3; .*Go on with DIDR 9\.1"):
        checkpoint.load(new, subject)


def test_a_kill_while_writing_leaves_no_checkpoint_and_is_cleared_away(run: RunFolder, subject: Learner) -> None:
    half = run.path / "checkpoints" / ".step-000003.part"
    half.mkdir()
    (half / "generator.0.safetensors").write_bytes(b"half")
    (half / "generator.7.safetensors").write_bytes(b"of a worker that is no more")
    assert run.checkpoints() == [1, 2]
    checkpoint.Saver(subject).save(run.checkpoint(3), {"n": 3}, then=lambda: run.prune(2))
    assert run.checkpoints() == [2, 3] and not list((run.path / "checkpoints").glob(".*"))
    assert checkpoint.load(run.checkpoint(3), subject) == {"n": 3}


@pytest.mark.parametrize("place", ["a part", "the second part", "state.json", "SHA256SUMS", "fsync", "rename"])
def test_a_disk_that_fills_costs_the_new_checkpoint_alone(
    run: RunFolder, subject: Learner, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    pruned: list[int] = []
    calls = {"a part": 0, "the second part": 1}

    def full(
        real: Callable[..., Any], wanted: Callable[..., bool], error: type[Exception] = OSError
    ) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            if wanted(*arguments):
                raise (
                    OSError(errno.ENOSPC, "No space left on device")
                    if error is OSError
                    else error("I/O error: No space left on device (os error 28)")
                )
            return real(*arguments, **named)

        return write

    if place in calls:
        left = iter([False] * calls[place] + [True] * 9)
        monkeypatch.setattr(checkpoint, "save_file", full(save_file, lambda *_: next(left), SafetensorError))
    elif place == "fsync":
        monkeypatch.setattr(os, "fsync", full(os.fsync, lambda *_: True))
    elif place == "rename":
        monkeypatch.setattr(os, "replace", full(os.replace, lambda *_: True))
    else:
        monkeypatch.setattr(Path, "write_text", full(Path.write_text, lambda path, *_: path.name == place))
    with pytest.raises(DIDRError) as error:
        checkpoint.Saver(subject).save(run.checkpoint(3), {"n": 3}, then=lambda: pruned.append(1))
    monkeypatch.undo()
    said = str(error.value)
    assert re.search(rf"{run.checkpoint(3)}: the disk is full: about [\d,]+ bytes needed, [\d,]+ free", said)
    assert "\n" not in said and run.checkpoints() == [1, 2] and not pruned
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert checkpoint.load(run.checkpoint(run.last_step()), subject) == {"n": 2}
