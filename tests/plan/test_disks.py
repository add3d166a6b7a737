"""Disks without room: said before anything starts, of the disk where things really go."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import toy_recipe

from didr_core import config as configs
from didr_core.plan.preflight import LEAST_FREE
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError
from pipelines.align import align
from pipelines.cluster.disks import RAY_FREE, check_disks

Fill = Callable[[Path, int], None]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Fill:
    """``fill(folder, free)``: the disk at ``folder`` has that many bytes free, everywhere else there is room."""
    full: dict[Path, int] = {}

    def usage(path: Any) -> Any:
        return SimpleNamespace(free=next((f for p, f in full.items() if Path(path).is_relative_to(p)), 2**40))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return full.__setitem__


def test_the_disk_of_output_counts_and_not_that_of_the_recipe(toy: Path, tmp_path: Path, fill: Fill) -> None:
    small = tmp_path / "small"
    small.mkdir()
    fill(small, 1000)
    with pytest.raises(
        DIDRError, match=f"--output='{small}/run': 1,000 bytes free on its disk.* at least {LEAST_FREE:,}"
    ):
        align(str(toy), output=str(small / "run"), local=True)
    assert not list(small.iterdir())
    with pytest.raises(DIDRError, match=f"output='{small}'"):
        align(str(toy), [f"output={small}"], local=True)
    fill(tmp_path / "large", 2**40)
    (tmp_path / "file").touch()
    with pytest.raises(DIDRError, match="is a file. Expected a folder"):
        align(str(toy), output=str(tmp_path / "file" / "run"), local=True)
    with pytest.raises(DIDRError, match="--output='ftp://host/run'.* Expected s3, gs"):
        align(str(toy), output="ftp://host/run", local=True)


def test_a_resume_needs_room_for_one_more_checkpoint(toy: Path, tmp_path: Path, fill: Fill) -> None:
    run = RunFolder.create(configs.load(str(toy)), str(tmp_path / "run"))
    run.checkpoint(2).mkdir()
    with (run.checkpoint(2) / "generator.0.safetensors").open("wb") as file:
        file.truncate(3 * LEAST_FREE)
    fill(tmp_path, 2 * LEAST_FREE)
    with pytest.raises(DIDRError, match=f"{2 * LEAST_FREE:,} bytes free .* at least {3 * LEAST_FREE:,}"):
        align(resume=str(run.path), local=True)
    assert run.info()["status"] == "interrupted", "as it was"


def test_the_disks_of_mlflow_and_of_ray(tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = configs.load("tiny").tracking
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("runs", "books", "ray"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, 2**40)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    check_disks(tracking, tmp_path / "runs", ray=True)
    fill(tmp_path / "ray", RAY_FREE - 1)
    with pytest.raises(DIDRError, match=f"RAY_TMPDIR='{tmp_path}/ray': {RAY_FREE - 1:,} bytes free"):
        check_disks(tracking, tmp_path / "runs", ray=True)
    check_disks(tracking, tmp_path / "runs", ray=False)
    fill(tmp_path / "runs", 5)
    with pytest.raises(DIDRError, match=f"tracking.uri='{tmp_path}/runs': 5 bytes free"):
        check_disks(tracking, tmp_path / "runs", ray=False)
    elsewhere = tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/books/mlflow.db"})
    check_disks(elsewhere, tmp_path / "runs", ray=False)
