"""The small files of a run folder: an empty, cut or foreign one is named in one line with what to do, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from didr_core import config as configs
from didr_core.config.files import held
from didr_core.export.sample import OneStep
from didr_core.train.loop import outcome
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines.report.page import write_report

DAMAGES = {
    "empty": b"",
    "cut": b'{"step": 1, "ti',
    "foreign": b"[1, 2]\n",
    "binary": b"\x80\x05\x95\xff\xfe\x00\n",
}
ROWS = b'{"step": 1}\n{"step": 2}\n'


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    found = RunFolder.create(configs.load("exact_2d"), str(tmp_path / "run"))
    found.metrics_path.write_bytes(ROWS)
    return found


def refused(do: Callable[[], object], *expected: str) -> None:
    with pytest.raises(DIDRError) as error:
        do()
    said = str(error.value)
    assert "\n" not in said and all(text in said for text in expected), said


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_json(run: RunFolder, damage: str) -> None:
    (run.path / "run.json").write_bytes(DAMAGES[damage])

    def resume() -> None:
        with outcome(RunFolder.find(str(run.path))):
            pass

    for read in (run.info, resume, lambda: write_report(run.path)):
        refused(read, str(run.path / "run.json"), "Write {} into it to go on")
    (run.path / "run.json").write_text("{}")  # the advice helps
    resume()
    assert run.info()["status"] == "finished"


def test_threads_that_write_run_json_at_once_lose_nothing(run: RunFolder) -> None:
    def write(name: str) -> None:
        for n in range(30):
            run.update(**{f"{name}{n}": n})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, "ab"))
    assert {f"{name}{n}" for name in "ab" for n in range(30)} <= run.info().keys()


@pytest.mark.parametrize("damage", DAMAGES)
def test_config_yaml(run: RunFolder, damage: str) -> None:
    path = run.path / "config.yaml"
    (run.path / "model_index.json").write_text("{}")  # as an export folder
    path.write_bytes(DAMAGES[damage])
    for read in (run.config, lambda: OneStep(run.path)):
        refused(read, str(path), "Restore it")
    refused(lambda: write_report(run.path), str(path)) if damage != "cut" else None  # the report shows what there is


def test_a_config_cut_between_two_lines_is_not_filled_up_with_defaults(run: RunFolder) -> None:
    path = run.path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_text("".join(lines[:kept]))
        if not any(line.startswith("evaluation:") for line in lines[:kept]):
            refused(run.config, str(path), "Restore it")
    path.unlink()
    refused(run.config, str(path), "is missing", "Restore it")


@pytest.mark.parametrize("damage", ["cut", "foreign", "binary", "keyless"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "alarms.jsonl"])
def test_lines(run: RunFolder, name: str, damage: str) -> None:
    path = run.path / name
    path.write_bytes(ROWS + (DAMAGES | {"keyless": b'{"a": 1}'})[damage].rstrip() + b"\n" + ROWS)
    for read in (lambda: read_lines(path), lambda: run.forget_after(1), lambda: write_report(run.path)):
        refused(read, f"{path}, line 3: ", "Remove that line")
    path.write_bytes(ROWS + b'{"step": 3, "ti')  # what a kill leaves
    assert [row["step"] for row in read_lines(path)] == [1, 2]
    path.write_bytes(b"")
    assert read_lines(path) == []


def test_what_a_kill_left_half_written_is_removed_by_the_next_start(run: RunFolder) -> None:
    """As export, replaced files and grids name them; not what a living process writes, and an export that was taken away comes back."""
    for name in (".export.41.part", ".export.42.part", ".export.41.old", "export"):
        (run.path / name / "unet").mkdir(parents=True)
    (run.path / "grids").mkdir()
    for name in (".run.0a1b2c3d.part.json", "grids/.step-1.0a1b2c3d.part.png"):
        (run.path / name).write_text("{")
    with held(run.path / ".export.42.part"), outcome(run):
        there = {path.name for path in run.path.rglob("*")}
    assert ".export.42.part" in there and "export" in there
    assert not {name for name in there if name.endswith(".old") or ".41." in name or "0a1b2c3d" in name}
    (run.path / "export").rename(run.path / ".export.41.old")
    with outcome(run):
        pass
    assert (run.path / "export" / "unet").is_dir() and not list(run.path.glob(".export*"))


def test_a_signal_while_the_run_is_marked_as_running_marks_it_as_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, update = RunFolder.create(configs.load("tiny"), str(tmp_path / "run")), RunFolder.update

    def stopped(self: RunFolder, **values: Any) -> None:
        update(self, **values)
        if values.get("status") == "running":
            raise KeyboardInterrupt("stopped (SIGTERM)")

    monkeypatch.setattr(RunFolder, "update", stopped)
    with pytest.raises(KeyboardInterrupt), outcome(run):
        raise AssertionError("not reached")
    info = run.info()
    assert info["status"] == "interrupted" and "SIGTERM" in info["message"]
