"""`--resume latest` and `auto`: which run, or sweep, is gone on with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy import toy_recipe

from didr_core import config as configs
from didr_core.train.run_folder import AUTO, LATEST, RunFolder, settings
from didr_core.types import DIDRError, NoAnswerError
from pipelines import align as job
from pipelines import sweep as sweeping
from pipelines.sweeps.folder import SweepFolder, SweepOptions


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy_recipe(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def begin(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`didr align --local --resume auto` with a training that a kill ends, or with one that finishes."""
    finished = False

    def train(*_: Any) -> None:
        if not finished:
            raise KeyboardInterrupt("killed")

    monkeypatch.setattr(job, "train_and_finish", train)
    monkeypatch.setattr(job, "write_report", lambda *_: None)

    def go(*overrides: str, finish: bool = False, resume: str | None = AUTO) -> RunFolder:
        nonlocal finished
        finished = finish
        options: dict[str, Any] = {"output": str(tmp_path), "resume": resume, "local": True, "command": "didr align"}
        try:
            return job.align(toy, ["tracking.uri=none", *overrides], **options)
        except SystemExit:
            return max(RunFolder.in_order(str(tmp_path)), key=lambda pair: pair[1]["since"])[0]

    return go


def test_auto_goes_on_with_the_newest_unfinished_run_of_the_same_settings(begin: Any, tmp_path: Path) -> None:
    first = begin()
    assert first.path.parent == tmp_path and first.info()["status"] == "interrupted"
    assert begin().path == first.path and begin("train.steps=9").path == first.path, "more steps are no other run"
    assert first.config().train.steps == 9 and not first.info().get("resumed")
    other = begin("drp.beta=0.77")
    assert other.path != first.path and other.config().drp.beta == 0.77
    assert begin().path == first.path, "not the newer one, which began with other settings"
    assert begin(finish=True).info()["status"] == "finished"
    assert begin().path not in (first.path, other.path), "a finished one is not gone on with"


def test_auto_leaves_a_run_that_another_process_trains(begin: Any) -> None:
    first = begin()
    with first.lock():
        assert begin().path != first.path


def test_what_a_resume_may_change_is_not_among_the_settings(toy: str) -> None:
    plain = settings(configs.load(toy))
    for free in ("workers.train=1", "train.steps=3", "output=elsewhere", "evaluation.every=7", "train.micro_batch=2"):
        assert settings(configs.load(toy, [free])) == plain, free
    for own in ("drp.beta=0.9", "seed=5", "train.batch=6"):
        assert settings(configs.load(toy, [own])) != plain, own


def test_a_run_out_of_memory_goes_on_with_less_at_once(toy: str, tmp_path: Path) -> None:
    config = configs.load(toy, ["workers.train=1", "train.batch=8", "train.micro_batch=8"])
    run = RunFolder.create(config, str(tmp_path / "run"))
    with pytest.raises(DIDRError, match="train.micro_batch=8 does not divide"):
        run.config(["workers.train=2"])
    less = ["workers.train=2", "train.micro_batch=2", "roles.gradient_checkpointing=true", "train.compile=none"]
    found = run.config(less)
    assert (found.train.micro_batch, found.roles.gradient_checkpointing, found.train.compile) == (2, True, "none")
    with pytest.raises(DIDRError, match=r"--set 'train.batch=4': a resumed run must go on as it began"):
        run.config(["train.batch=4"])


def test_latest_is_the_newest_run_and_an_error_where_there_is_none(toy: str, tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match=r"run 'latest': no run folder.*: none"):
        RunFolder.find(LATEST, str(tmp_path))
    runs = [RunFolder.create(configs.load(toy), str(tmp_path / name)) for name in ("b", "a")]
    assert RunFolder.find(LATEST, str(tmp_path)).path == runs[1].path
    runs[0].update(started=runs[1].info()["started"] + 1)
    assert RunFolder.find(LATEST, str(tmp_path)).path == runs[0].path
    assert job._begun(toy, (), str(tmp_path), LATEST)[0] == RunFolder(runs[0].path)


def test_sweeps_go_on_alike(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DIDRError, match="no sweep of that name"):
        SweepFolder.find(LATEST, str(tmp_path))
    asked = SweepOptions(recipe="tiny", space="smoke", trials=2, name="s", overrides=["tracking.uri=none"])

    def go(options: SweepOptions = asked, resume: str | None = AUTO) -> SweepFolder:
        return sweeping._new(options, str(tmp_path), resume=resume)

    first = go()
    assert go() == first and SweepFolder.find(LATEST, str(tmp_path)) == first
    nameless = SweepOptions(recipe="tiny", space="smoke", trials=2, overrides=["tracking.uri=none"], concurrent=2)
    assert go(nameless) == first
    with first.lock():
        assert go(nameless) != first
    assert go(SweepOptions(recipe="tiny", space="smoke", trials=3, overrides=["tracking.uri=none"])) != first
    first.update(status="finished")
    with pytest.raises(DIDRError, match="that sweep exists"):
        go()


def test_a_ray_that_never_is_there_ends_the_run_with_a_word(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def never(*_: Any) -> Iterator[None]:
        time.sleep(60.0)
        yield

    monkeypatch.setattr(job, "ray_session", never)
    run = tmp_path / "run"
    with pytest.raises(
        NoAnswerError, match=r"\(its last news: starting Ray\) has not answered for \d+ s.*patience_s=1\)"
    ):
        job.align(toy, ["tracking.uri=none", "workers.patience_s=1"], output=str(run), address="local")
    assert RunFolder(run).info()["status"] == "failed"
