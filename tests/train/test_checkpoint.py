"""What lies in a checkpoint, and what is said of a damaged one; resumes: test_resume.py, splitting: tests/networks/test_sharding.py."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import sdxl_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_learner import batch, learner, saved

from didr_core.train import checkpoint
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, loop
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder
from didr_core.types import Batch, DIDRError

ROOT = Path(__file__).resolve().parents[2]
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
        saved(subject, run.checkpoint(step), {"n": step})
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
    of_a_neighbour = half.with_name(".step-000004.part")  # who may be ahead of the worker that publishes
    of_a_neighbour.mkdir()
    saved(subject, run.checkpoint(3), {"n": 3}, then=lambda: run.prune(2))
    assert run.checkpoints() == [2, 3] and list((run.path / "checkpoints").glob(".*")) == [of_a_neighbour]
    assert checkpoint.load(run.checkpoint(3), subject) == {"n": 3}


def test_it_is_written_while_training_goes_on_and_holds_the_moment_of_its_copy(
    run: RunFolder, subject: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, at_it, files = threading.Event(), threading.Event(), []

    def slow(tensors: dict[str, torch.Tensor], file: Path) -> None:
        files.append(file.parent.name)
        at_it.set()
        assert go.wait(600)
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    fresh, saver = Learner(subject.config), checkpoint.Saver(subject)
    checkpoint.load(run.checkpoint(2), subject)
    expected = {k: v.detach().clone() for k, v in subject.generator_weights.values.items()}
    saver.save(run.checkpoint(3), {"n": 3})
    assert at_it.wait(600)
    subject.step(batch(subject))  # nobody waits
    saver.wait(block=False)
    assert run.checkpoints() == [1, 2]
    second = threading.Thread(target=saver.save, args=(run.checkpoint(4), {"n": 4}))
    second.start()
    assert set(files) == {".step-000003.part"}  # one at a time: the next one waits
    go.set()
    second.join(600)
    saver.wait()
    checkpoint.load(run.checkpoint(3), fresh)
    assert all(torch.equal(v, expected[k]) for k, v in fresh.generator_weights.values.items())
    assert run.checkpoints() == [1, 2, 3, 4] and checkpoint.load(run.checkpoint(4), fresh) == {"n": 4}
    now = subject.generator_weights.values
    assert all(torch.equal(v, now[k]) for k, v in fresh.generator_weights.values.items())
    assert any(not torch.equal(v, expected[k]) for k, v in now.items())


def test_a_disk_that_fills_stops_the_next_step(
    run: RunFolder, subject: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the next checkpoint alone, which may be hours away."""
    train = subject.config.train.model_copy(update={"checkpoint_every": 2})
    learner = Learner(subject.config.model_copy(update={"train": train}))
    journal, data = Journal(run, learner.config, learner, ""), batch(learner)

    def batches() -> Iterator[Batch]:
        for step in range(6):
            if step == 2:
                assert journal.saver._pending is not None
                wait([journal.saver._pending])
            yield dataclasses.replace(data, index=torch.arange(4) + 4 * step)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(run.path / "checkpoints")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DIDRError, match="the disk is full"):
        loop(learner, batches(), journal, Observer())
    assert learner.step_count in (2, 3) and run.checkpoints() == []  # 2: the disk was quicker than the loop


KILLED = """
import signal, sys, os
from pathlib import Path
from didr_core.train import checkpoint
from didr_core.train.run_folder import RunFolder
from small_learner import batch, learner, saved

of, run, written = learner(Path(sys.argv[1])), RunFolder(Path(sys.argv[2])), []
of.step(batch(of))
saved(of, run.checkpoint(1), {"n": 1})
of.step(batch(of))
real = checkpoint.save_file
def save_file(tensors, file):
    real(tensors, file)
    written.append(file)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_file
saved(of, run.checkpoint(2), {"n": 2}, then=lambda: run.prune(1))
"""


def test_a_kill_while_it_is_written_keeps_the_older_one(subject: Learner, tmp_path: Path) -> None:
    run, models = RunFolder(tmp_path / "run"), sdxl_folder(tmp_path / "models")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", KILLED, str(models), str(run.path)]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=path), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run.checkpoints() == [1]
    assert len(list((run.path / "checkpoints" / ".step-000002.part").iterdir())) == 3
    assert checkpoint.load(run.checkpoint(1), subject) == {"n": 1}


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
        saved(subject, run.checkpoint(3), {"n": 3}, then=lambda: pruned.append(1))
    monkeypatch.undo()
    said = str(error.value)
    assert re.search(rf"{run.checkpoint(3)}: the disk is full: about [\d,]+ bytes needed, [\d,]+ free", said)
    assert "\n" not in said and run.checkpoints() == [1, 2] and not pruned
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert checkpoint.load(run.checkpoint(run.last_step()), subject) == {"n": 2}
