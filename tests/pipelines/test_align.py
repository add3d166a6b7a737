"""Runs from end to end, on Ray and without; resumes: tests/train/test_resume.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from toy import BATCH, EVERY, STEPS, toy_recipe

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data.prompts import PromptIndex
from didr_core.evaluate.finish import train_and_finish
from didr_core.plan.preflight import preflight
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, outcome, train
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines.align import align

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing happens to, in this process."""
    config = configs.load(str(toy))
    run = RunFolder.create(config, str(tmp_path_factory.mktemp("whole") / "run"))
    with outcome(run):
        train_and_finish(config, run, PromptIndex.open(config.data.prompts))
    return run


def learned(run: RunFolder, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its path in the state."""
    return {k: v for file in run.checkpoint(step).glob("*.safetensors") for k, v in load_file(file).items()}


def steps_of(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()]


def wait_for(run: RunFolder, step: int, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not run.metrics_path.is_file() or len(read_lines(run.metrics_path)) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


def test_precomputed_equals_made_as_it_goes_bit_for_bit(toy: Path, whole: RunFolder, tmp_path: Path) -> None:
    """In one process, resumed half-way from a cache that was made for both halves."""
    cache = f"data.cache={tmp_path / 'cache'}"
    config = configs.load(str(toy), [cache, "workers.precompute=true", "evaluation.prompts=0"])
    index, run = PromptIndex.open(config.data.prompts), RunFolder.create(config, str(tmp_path / "run"))
    seen: list[str] = []
    observer = Observer()
    observer.stage = lambda text, *_: seen.append(text)  # type: ignore[method-assign]
    half = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    train(half, run, index, observer)
    assert seen.count("encoding prompts") == 4 and seen.index("loading networks") == 4
    train(config, run, index, observer)
    assert seen.count("encoding prompts") == STEPS
    expected, got = learned(whole), learned(run)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_run_scores_itself_against_its_control_and_the_teacher(toy: Path, whole: RunFolder, tmp_path: Path) -> None:
    control = f"evaluation.control={whole.path}"
    config = configs.load(str(toy), ["algorithm=diff_instruct", "train.steps=1", control, "evaluation.teacher_steps=2"])
    run = RunFolder.create(config, str(tmp_path / "run"))
    with outcome(run):
        train_and_finish(config, run, PromptIndex.open(config.data.prompts))
    models = json.loads((run.path / "scores.json").read_text())["models"]
    assert list(models) == ["start", "control", "aligned", "teacher"] and models["teacher"]["steps"] == 2
    rows = np.load(run.path / "scores.npz")
    control_itself = np.load(whole.path / "scores.npz")["aligned/latent_mean"]
    assert np.allclose(rows["control/latent_mean"], control_itself, atol=1e-3)  # an export is fp16
    assert not np.allclose(rows["start/latent_mean"], control_itself, atol=1e-3)
    with pytest.raises(DIDRError, match=r"evaluation\.control='.*nowhere': no export there"):
        preflight(configs.load(str(toy), [f"evaluation.control={tmp_path / 'nowhere'}"]))


def test_a_run_that_went_on_with_other_settings_names_both_commands_and_adds_up_its_time(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.steps=2", "train.assistant_warmup=1", "evaluation.prompts=0", "tracking.uri=''"]
    run = align(str(toy), settings, output=str(tmp_path / "run"), local=True, command="didr align --recipe toy")
    first, tracked = run.info()["seconds"], run.info()["mlflow_run_id"]
    assert 0 < first < 600
    assert "2 steps: 1 of assistant warm-up, 1 generator updates; took " in capsys.readouterr().err
    align(
        resume=str(run.path),
        overrides=["train.steps=3"],
        local=True,
        command="didr align --resume run --set train.steps=3",
    )
    align(
        resume=str(run.path), local=True, command="didr align --resume run"
    )  # changes nothing: not needed to repeat it
    commands = ["didr align --recipe toy", "didr align --resume run --set train.steps=3"]
    assert run.commands() == commands and run.info()["seconds"] > first
    assert "<pre>" + "\n".join(commands) + "</pre>" in (run.path / "report.html").read_text()
    assert ", then ".join(f"`{c}`" for c in commands) in (run.path / "export" / "README.md").read_text()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.path.parent / 'mlflow.db'}")
    assert [m.step for m in client.get_metric_history(tracked, "time/step")] == [1, 2, 3]  # in the same MLflow run
    assert run.info()["mlflow_run_id"] == tracked and client.get_run(tracked).info.status == "FINISHED"


def test_resume_with_other_prompts_is_refused(toy: Path, whole: RunFolder) -> None:
    config = configs.load(str(toy))
    learner = Learner(config)
    with pytest.raises(DIDRError, match="not those this run began with"):
        Journal(whole, config, learner, corpus="another").restore()


def assert_close_updates(config: Config, run: RunFolder, other: RunFolder) -> None:
    """Weights of the last step agree to a hundredth of how far they have moved."""
    start = Learner(config).state_dict()
    a, b = learned(run), learned(other)
    for network in ("generator", "ema", "assistant"):
        names = [n for n in a if n.startswith(f"{network}/")]
        moved = sum((a[n] - start[network][n.removeprefix(f"{network}/")]).square().sum() for n in names)
        apart = sum((a[n] - b[n]).square().sum() for n in names)
        assert moved > 0 and apart < 1e-4 * moved, (network, float(apart), float(moved))
    torch.testing.assert_close(a["scale/total"], b["scale/total"], rtol=1e-4, atol=1e-7)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_on_ray_with_two_workers_of_which_one_is_killed(
    toy: Path, whole: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole job: Ray Data, Ray Train, MLflow, report, export."""
    run = RunFolder(tmp_path / "runs" / "run")
    killed: list[int] = []

    def kill_a_worker() -> None:
        wait_for(run, EVERY + 1, 600)
        workers = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                workers += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
        killed.append(len(workers))
        os.kill(workers[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    align(
        str(toy),
        ["tracking.uri=''"],
        output=str(run.path),
        address="local",
        profile=True,
        command="didr align --recipe toy",
    )
    killer.join()
    assert killed == [2]
    assert run.info()["status"] == "finished" and run.info()["command"] == "didr align --recipe toy"
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert_close_updates(configs.load(str(toy)), whole, run)
    for name in ("grid.png", "curves.png", "report.html", "scores.json", "export/model_index.json", "export/README.md"):
        assert (run.path / name).is_file(), name
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert not (run.path / "ray").exists()
    assert json.loads(run.profile_path.read_text())["rows"]["averaging"] > 0  # rank 0's, of the second group

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.path.parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "didr"]
    (tracked,) = client.search_runs([experiment.experiment_id])  # one run, although the workers started twice
    assert tracked.info.run_id == run.info()["mlflow_run_id"] and tracked.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(tracked.info.run_id, "reward/gain")] == list(range(1, STEPS + 1))
    assert tracked.data.params["drp.beta"] == "0.5"
    assert {a.path for a in client.list_artifacts(tracked.info.run_id)} >= {"grid.png", "curves.png", "report.html"}

    said = capfd.readouterr()
    assert "a worker failed; going on from step" in said.err and "data wait" in said.err
    lines = [line for line in said.err.replace(str(tmp_path), "").splitlines() if "ray" in line.lower()]
    assert [line for line in lines if "starting Ray" not in line and "a worker failed" not in line] == []  # quiet


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_mistake_of_the_user_is_not_tried_again(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A NaN reward in an actor and a worker: its prompt id reaches the user, once, after one attempt."""
    config = configs.load(str(toy))
    index = PromptIndex.open(config.data.prompts)
    bad = index.read([2 * BATCH + 5], config.seed)[0]  # a sample of step 3, in the share of rank 1
    recipe = tmp_path / "nan.yaml"
    recipe.write_text(f"base: {toy}\nreward: {{name: 'toy:Treacherous', bad: '{bad.prompt}'}}\n")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(DIDRError, match="step 3: non-finite") as failure:
        align(str(recipe), output=str(run.path), address="local")
    assert repr(bad.id) in str(failure.value)
    assert run.checkpoints() == [EVERY] and run.info()["status"] == "failed"
    assert capfd.readouterr().err.count("starting workers") == 1
