"""Run folders at an address: what is there is whole at every moment, whatever fails between, and comes back the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from didr_core import config as configs
from didr_core.data import storage
from didr_core.train import mirror
from didr_core.train.mirror import OWNER, SUMS
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError

KEEP = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing happens by itself, and nobody is waited for."""
    monkeypatch.setenv("DIDR_CACHE", str(tmp_path / "cache"))
    for name, seconds in (("LOOK_S", 1e6), ("BEAT_S", 1e6), ("DEAD_S", 0.2), ("WAIT_S", 1.0), ("LEAST_S", 0.0)):
        monkeypatch.setattr(mirror, name, seconds)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket/runs/one"


@pytest.fixture
def run(address: str) -> RunFolder:
    return RunFolder.create(configs.load("exact_2d"), address)


def checkpoint(run: RunFolder, step: int, files: tuple[str, ...] = ("a.0", "b.0")) -> None:
    """As :mod:`didr_core.train.checkpoint` leaves it, with the line of metrics before it."""
    with run.metrics_path.open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    folder = run.checkpoint(step)
    folder.mkdir()
    data = {name: f"{name} of {step}".encode() for name in files}
    for name, text in data.items():
        (folder / name).write_bytes(text)
    sums = [f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in data.items()]
    (folder / SUMS).write_text("".join(sums))
    run.prune(KEEP)


def there(address: str) -> dict[str, bytes]:
    store = storage.Store(address)
    return {name: store.read(name) or b"" for name in store.files()}


def test_of_many_runs_only_the_one_that_is_asked_for_is_brought(run: RunFolder, address: str) -> None:
    runs = address.removesuffix("/one")
    newer = RunFolder.create(run.config(), f"{runs}/two")
    for made in (run, newer):
        with made.mirrored(KEEP):
            (made.path / "report.html").write_text("large")
        shutil.rmtree(made.path)
    assert [found.path.name for found, _ in RunFolder.in_order(runs)] == ["two", "one"]
    assert not run.path.exists() and not newer.path.exists()
    assert RunFolder.find("latest", runs).path == newer.path.resolve() and (newer.path / "report.html").is_file()
    assert not run.path.exists()


def whole(address: str) -> list[int]:
    """Steps of the checkpoints there; each is all there, with the metrics up to it."""
    found = there(address)
    steps = sorted(int(name.split("/")[1][5:]) for name in found if name.endswith(SUMS))
    told = [json.loads(line)["step"] for line in found.get("metrics.jsonl", b"").splitlines()]
    for step in steps:
        sums = found[f"checkpoints/step-{step:06d}/{SUMS}"].decode().splitlines()
        for line in sums:
            assert hashlib.sha256(found[f"checkpoints/step-{step:06d}/{line[66:]}"]).hexdigest() == line[:64]
        assert step in told
    return steps


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """``failing[0] = n``: n more calls change something at the address, then all fail; -1: none does."""
    left = [-1]

    def limited(method: Any) -> Any:
        def call(*given: Any) -> Any:
            if left[0] == 0:
                raise OSError("AWS Error NETWORK_CONNECTION")
            left[0] -= left[0] > 0
            return method(*given)

        return call

    for name in ("put", "delete"):
        monkeypatch.setattr(storage.Store, name, limited(getattr(storage.Store, name)))
    yield left


def test_what_is_there_is_consistent_wherever_it_is_interrupted(
    run: RunFolder, address: str, failing: list[int]
) -> None:
    """Checkpoints 2, 4, 6 with one more call let through each time until all is there; then the same from another machine."""
    with run.mirrored(KEEP) as kept:
        for newest, step in enumerate((2, 4, 6)):
            checkpoint(run, step)
            failing[0] = 0
            for calls in range(1, 100):
                before = whole(address)
                if kept._try():
                    break
                failing[0] = calls % 3
                after = whole(address)
                assert set(before) - set(after) == set() or step in after, "an old one goes when the new one is there"
                assert newest == 0 or after, "there always is one to go on from"
            failing[0] = -1
            kept.flush()
            assert whole(address) == [2, 4, 6][max(0, newest - 1) : newest + 1]
    assert json.loads(there(address)[OWNER])["ended"]


def test_a_checkpoint_that_is_removed_while_it_is_sent_arrives(
    run: RunFolder, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may be quicker than the network for ever."""
    put = storage.Store.put

    def slow(store: storage.Store, name: str, source: Any) -> None:
        shutil.rmtree(run.checkpoint(2), ignore_errors=True)
        put(store, name, source)

    with run.mirrored(KEEP) as kept:
        checkpoint(run, 2)
        monkeypatch.setattr(storage.Store, "put", slow)
        kept.flush()
        assert whole(address) == [2]


def test_a_server_that_is_gone_is_asked_again_and_both_is_said(run: RunFolder, failing: list[int]) -> None:
    said: list[str] = []
    with run.mirrored(KEEP, said.append) as kept:
        checkpoint(run, 2)
        failing[0] = 0
        assert not kept._try() and not kept._try()
        assert (
            len(said) == 1 and "does not answer (AWS Error NETWORK_CONNECTION)" in said[0] and str(run.path) in said[0]
        )
        failing[0] = -1
        kept.flush()
        assert len(said) == 2 and "answers again" in said[1]
        failing[0] = 0
        (run.path / "scores.json").write_text("{}")
        with pytest.raises(DIDRError, match=f"did not answer for 0 s.* is in {run.path} on .*--resume file://"):
            kept.flush(0)
        failing[0] = -1


def test_another_machine_goes_on_and_fetches_weights_when_it_needs_them(
    run: RunFolder, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.mirrored(KEEP):
        checkpoint(run, 2)
        checkpoint(run, 4)
        (run.path / "export").mkdir()
        (run.path / "export" / "unet.bin").write_text("weights")
        run.stop_path.touch()
    monkeypatch.setenv("DIDR_CACHE", str(tmp_path / "other"))
    other = RunFolder.find(address)
    assert other.path != run.path and other.config() == run.config() and other.last_step() == 4
    assert not (other.checkpoint(4) / "a.0").exists() and not (other.path / "export").exists()
    with other.mirrored(KEEP) as kept:
        other.stop_path.unlink()
        other.fetch("checkpoints/step-000004")
        assert (other.checkpoint(4) / "a.0").read_bytes() == b"a.0 of 4"
        checkpoint(other, 6)
        kept.flush()
        assert whole(address) == [4, 6] and "stop" not in there(address)
        assert (other.fetch("export") / "unet.bin").read_text() == "weights"
    monkeypatch.setenv("DIDR_CACHE", str(tmp_path / "cache"))
    with RunFolder.find(address).mirrored(KEEP):  # the first one again, which is behind by now
        assert run.checkpoints() == [4, 6] and [row["step"] for row in lines(run)] == [2, 4, 6]
        assert run.checkpoint(4).joinpath("a.0").exists(), "what is the same is not thrown away"


def lines(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def test_the_machine_that_was_last_there_brings_what_it_could_not(
    run: RunFolder, address: str, failing: list[int]
) -> None:
    with pytest.raises(DIDRError, match="did not answer"), run.mirrored(KEEP):
        checkpoint(run, 2)
        failing[0] = 0
    failing[0] = -1
    assert whole(address) == []
    with RunFolder.find(address).mirrored(KEEP):
        assert run.last_step() == 2
    assert whole(address) == [2]


def test_one_driver_at_a_time(run: RunFolder, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.lock(), pytest.raises(DIDRError, match="file://.*: another process is training in it"):
        run.mirrored(KEEP)
    said: list[str] = []
    first = run.mirrored(KEEP, said.append)
    with pytest.raises(DIDRError, match="was taken over by a process on"), first:
        first.flush()
        monkeypatch.setenv("DIDR_CACHE", str(tmp_path / "other"))
        other = RunFolder.find(address)
        count = iter(range(1000))
        told = mirror.owner
        with monkeypatch.context() as patch:
            patch.setattr(mirror, "owner", lambda store: told(store) | {"count": next(count)})
            with pytest.raises(DIDRError, match="a process on .* is training in it"), other.mirrored(KEEP):
                pass
        with other.mirrored(KEEP):  # it counts no more: dead
            monkeypatch.setattr(mirror, "BEAT_S", 0.0)
            first._beat()
            assert run.stop_path.exists() and "taken over" in said[-1]
            checkpoint(run, 2)
            with pytest.raises(DIDRError, match="taken over"):
                first.flush()
            assert whole(address) == []


def test_trainers_on_other_machines_and_the_driver_see_each_other(
    run: RunFolder, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with a part each of a checkpoint: it is whole when both have sent theirs. The driver has names, no weights."""
    with run.mirrored(KEEP) as driver:
        driver.flush()
        sides = []
        for name in ("trainer", "neighbour"):
            monkeypatch.setenv("DIDR_CACHE", str(tmp_path / name))
            sides.append(run.here(run.owner))
        one, two = sides
        assert one.apart and two.apart and one.path != run.path and not run.here("").apart
        with one.mirrored() as first, two.mirrored() as second:
            assert one.info() == run.info()
            checkpoint(one, 2, ("a.0", "a.1"))
            (one.checkpoint(2) / "a.1").unlink()
            two.checkpoint(2).mkdir(parents=True)
            (two.checkpoint(2) / "a.1").write_bytes(b"a.1 of 2")
            assert not first._try() and whole(address) == []
            assert second._try() and first._try() and whole(address) == [2]
            driver.flush()
            assert run.last_step() == 2 and lines(run) == [{"step": 2}] and not (run.checkpoint(2) / "a.0").exists()
            run.stop_path.touch()
            driver.flush()
            first.flush()
            assert one.stop_path.exists()
            run.stop_path.unlink()
            driver.flush()
        assert whole(address) == [2]


def test_a_new_run_asks_for_an_empty_address(run: RunFolder, address: str, tmp_path: Path) -> None:
    with run.mirrored(KEEP):
        pass
    with pytest.raises(DIDRError, match="belongs to run 'one' .*--resume file://"):
        RunFolder.create(configs.load("exact_2d"), address)
    (tmp_path / "bucket" / "files").mkdir()
    (tmp_path / "bucket" / "files" / "thesis.txt").touch()
    with pytest.raises(DIDRError, match="not empty"):
        RunFolder.create(configs.load("exact_2d"), f"file://{tmp_path}/bucket/files")
    with pytest.raises(DIDRError, match="no run folder of that name"):
        RunFolder.find("none", f"file://{tmp_path}/bucket")


def test_any_file_system_of_fsspec() -> None:
    address = "fsspec+memory:///runs/two"
    run = RunFolder.create(configs.load("exact_2d"), address)
    with run.mirrored(KEEP):
        checkpoint(run, 2)
        checkpoint(run, 4)
        checkpoint(run, 6)
    assert whole(address) == [4, 6] and json.loads(there(address)["run.json"])["name"] == "two"


def test_kinds_of_addresses_are_named() -> None:
    with pytest.raises(DIDRError, match="Expected s3, gs, abfs"):
        RunFolder.at("--output", "ftp://host/runs")


def test_keys_in_an_address_are_not_written(tmp_path: Path) -> None:
    secret = "s3://key:topsecret@bucket/shards?region=us-east-1"
    config = configs.load("exact_2d", [f"data.prompts={secret}", f"output={secret}"])
    run = RunFolder.create(config, str(tmp_path / "run"), f"didr align --output {secret}")
    assert not [path for path in run.path.rglob("*") if path.is_file() and "topsecret" in path.read_text()]
    assert "topsecret" not in RunFolder.at("output", secret).place
    storage.open_filesystem(run.config().data.prompts)  # with the environment's, then
