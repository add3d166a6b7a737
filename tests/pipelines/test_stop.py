"""Runs that are ended from outside: signals, a refused resume, an error in the user's code under Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import WorkerCrashedError
from toy import toy_recipe
from toy_sweep import new

from didr_core import config as configs
from didr_core.train.patience import running
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError
from pipelines.align import align
from pipelines.cli import main as cli
from pipelines.sweep import sweep
from pipelines.sweeps.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
LONG = 2000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


def started(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`didr align`, whose words go into ``folder``/log."""
    return run_of([sys.executable, "-m", "pipelines.align"], folder, *arguments, **environment)


def run_of(program: list[str], folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [*program, "--output", str(folder / "run"), *arguments]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log, text=True, env=dict(os.environ, **environment))


def words_of(process: subprocess.Popen[str], folder: Path) -> str:
    """All that it said, once it has ended."""
    process.wait()
    return (folder / "log").read_text()


def ended(run: RunFolder, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """Exit code and words of `didr align` in this process, in the Ray that is here."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["align", "--output", str(run.path), *arguments])
    return stop.value.code, capfd.readouterr().err


def reached(run: RunFolder, step: int, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not run.metrics_path.is_file() or run.metrics_path.read_text().count("\n") < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


def assert_stopped(run: RunFolder, said: str, name: str) -> None:
    steps = [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()]
    assert run.last_step() == steps[-1], "the checkpoint is that of the last step"
    assert run.info()["status"] == "interrupted" and run.info()["message"] == f"stopped after step {steps[-1]} ({name})"
    assert f"`didr align --resume {run.path}` goes on from step {steps[-1]}" in said
    assert "Traceback" not in said and not run.stop_path.exists()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.path.parent / 'mlflow.db'}")
    assert client.get_run(run.info()["mlflow_run_id"]).info.status == "KILLED"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_keeps_it(toy: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    long = [f"train.steps={LONG}", f"train.checkpoint_every={LONG}", "tracking.uri=''"]
    sets = [word for item in long for word in ("--set", item)]
    process, run = started(tmp_path, "--recipe", str(toy), "--local", *sets), RunFolder(tmp_path / "run")
    reached(run, 2)
    process.send_signal(number)
    said = words_of(process, tmp_path)
    assert process.returncode == code, said
    assert_stopped(run, said, number.name)


def test_a_signal_while_loading_ends_at_once(toy: Path, tmp_path: Path) -> None:
    words = hanging(tmp_path, toy, "Treacherous", "prepare(self, prompts)", seconds=20)  # no step before we look
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    process, run = started(tmp_path, "--local", *words, PYTHONPATH=path), RunFolder(tmp_path / "run")
    while run.info().get("since") is None:
        time.sleep(0.01)
    process.terminate()
    said = words_of(process, tmp_path)
    assert process.returncode == 143, said
    assert run.info()["status"] == "interrupted" and run.last_step() == 0


def test_a_refused_resume_changes_nothing(toy: Path, tmp_path: Path) -> None:
    run = RunFolder.create(configs.load(str(toy)), str(tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with run.lock(), pytest.raises(DIDRError, match="another process is training in it"):
        align(resume=str(run.path), overrides=["train.steps=9"], local=True, command="didr align --resume run")
    after = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    after.pop(".lock")
    assert after == before


def test_a_stopped_sweep_is_interrupted(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new(toy, {"drp.beta": {"grid": [0.1, 0.2]}}, tmp_path)
    monkeypatch.setattr("pipelines.sweep._run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        sweep(folder.options(), resume=str(folder.path))
    assert stopped.value.code == 143 and folder.info()["status"] == "interrupted"


def test_an_error_in_a_trial_ends_it_at_the_first_attempt(toy: Path, tmp_path: Path) -> None:
    """And a death is Tune's affair."""
    folder = new(toy, {"drp.beta": {"grid": [0.1]}}, tmp_path)
    trial = Trial.__new__(Trial)
    for error, reason in ((ValueError("mine"), "ValueError: mine"), (WorkerCrashedError(), None)):
        trial.setup({"sweep": str(folder.path), "number": 0})
        trial.legs = raising(error)
        if reason:
            assert trial.step()["status"] == "failed" and folder.result(0)["reason"].startswith(reason)
            (folder.trial(0).path / "result.json").unlink()
        else:
            with pytest.raises(WorkerCrashedError):
                trial.step()


def raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


BROKEN = """
from toy import Treacherous


class Broken(Treacherous):
    def prepare(self, prompts):
        raise ValueError("my reward broke")
"""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_an_error_of_the_users_code_under_ray_is_told_after_one_attempt(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a stage of Ray Data over its coordinator to a trainer, to Ray Train's controller, to the driver."""
    reward = tmp_path / "broken.py"
    reward.write_text(BROKEN)
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(f"base: {toy}\nreward: {{name: '{reward}:Broken', bad: ''}}\n")
    run = RunFolder(tmp_path / "run")
    code, said = ended(run, capfd, "--recipe", str(recipe))
    words = f"ValueError: my reward broke (in prepare, {reward}:7)"
    assert code == 1 and run.info()["status"] == "failed" and run.info()["message"] == words, said
    assert said.strip().splitlines()[-1] == f"error: {words}" and said.count("starting workers") == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_an_alarm_that_rank_0_alone_hears_stops_all_workers(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = ["alarms.on_alarm=stop", "alarms.saturation_drift=-1", "evaluation.every=3", "train.checkpoint_every=100"]
    run = RunFolder(tmp_path / "run")
    code, said = ended(run, capfd, "--recipe", str(toy), *[word for item in sets for word in ("--set", item)])
    assert code == 1 and run.info()["status"] == "failed" and run.last_step() == 3, said
    message = run.info()["message"]
    assert message.startswith("stopped after step 3, with a checkpoint, by alarms.on_alarm=stop. saturation-drifts: ")
    assert said.strip().splitlines()[-1] == f"error: {message}" and said.count("starting workers") == 1
    assert (run.path / "grids" / "step-000003.png").is_file()


HANGS = """
import time
from toy import {base}


class Hangs({base}):
    def {method}:
        time.sleep({seconds})
        return super().{call}
"""


def hanging(folder: Path, toy: Path, base: str, method: str, *sections: str, seconds: int = 3600) -> tuple[str, ...]:
    """Words for `didr align` with a reward whose ``method`` comes back late, or never."""
    call = method.replace("self, ", "")
    (folder / "hangs.py").write_text(HANGS.format(base=base, method=method, call=call, seconds=seconds))
    recipe = folder / "hangs.yaml"
    recipe.write_text("\n".join([f"base: {toy}", f"reward: {{name: '{folder}/hangs.py:Hangs', bad: ''}}", *sections]))
    return ("--recipe", str(recipe), "--set", "tracking.uri=''")


def ended_by_patience(process: subprocess.Popen[str], run: RunFolder, seconds: int, *who: str) -> None:
    said = words_of(process, run.path.parent)
    message = run.info()["message"]
    assert process.returncode == 1 and run.info()["status"] == "failed", said
    assert all(word in message for word in who) and f"patience_s={seconds})" in message, message
    assert said.strip().splitlines()[-1] == f"error: {message}" and "Traceback" not in said
    assert f"at {seconds} s the run stops" in said, "the progress line has told before"

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.path.parent / 'mlflow.db'}")
    assert client.get_run(run.info()["mlflow_run_id"]).info.status == "FAILED"


def test_a_reward_that_hangs_ends_a_local_run(toy: Path, tmp_path: Path) -> None:
    words = hanging(tmp_path, toy, "Treacherous", "score(self, images, inputs)")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    process = started(tmp_path, "--local", *words, "--set", "workers.patience_s=60", PYTHONPATH=path)
    ended_by_patience(process, RunFolder(tmp_path / "run"), 60, "the training (its last news: ")


HURRIED = """
import sys, threading, time
from pathlib import Path
from didr_core.train import patience
from pipelines.cli.main import main

class Clock:  # 100 times as fast once the reward actor is at its call
    now = last = time.monotonic()
    def monotonic(self):
        hangs = any("scoring the start" in who for who, _ in patience.running(Path(sys.argv[2], ".calls")))
        moment = time.monotonic()
        self.now, self.last = self.now + (moment - self.last) * (100 if hangs else 1), moment
        return self.now

patience.time = Clock()
main(["align", *sys.argv[1:]])
"""


@pytest.mark.ray
def test_a_hang_under_ray_names_the_actor(toy: Path, tmp_path: Path) -> None:
    """And such a Ray listens on loopback alone, with a token that others cannot read. Patience outlasts any start."""
    words = hanging(tmp_path, toy, "Treacherous", "prepare(self, prompts)")
    path, run = f"{ROOT}{os.pathsep}{ROOT / 'tests'}", RunFolder(tmp_path / "run")
    words = (*words, "--set", "workers.patience_s=1800")
    process = run_of([sys.executable, "-c", HURRIED], tmp_path, *words, PYTHONPATH=path, HOME=str(tmp_path / "home"))
    deadline = time.monotonic() + 1200
    while not run.calls_path.is_dir() or not any(
        who.startswith("the reward actor") for who, _ in running(run.calls_path)
    ):
        assert time.monotonic() < deadline and process.poll() is None, run.info().get("message")
        time.sleep(0.1)
    doors = {door for p in psutil.Process(process.pid).children(recursive=True) for door in listening(p)}
    outside = [door for door in doors if door[0].removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert len(doors) > 5 and len(outside) <= 1, outside  # where torch's workers find each other: docs/cluster.md
    assert (tmp_path / "home" / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    ended_by_patience(process, run, 1800, "the reward actor of ", "hangs.py:Hangs' (process ")


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    try:
        return {(c.laddr.ip, c.laddr.port) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    except psutil.Error:  # it has ended
        return set()


@pytest.mark.ray
def test_sigterm_under_ray(toy: Path, tmp_path: Path) -> None:
    """What `ray job stop` sends."""
    sets = ["--set", f"train.steps={LONG}", "--set", f"train.checkpoint_every={LONG}", "--set", "tracking.uri=''"]
    process, run = started(tmp_path, "--recipe", str(toy), *sets), RunFolder(tmp_path / "run")
    while not re.search(r"[1-9]\d*/\d+  reward", (tmp_path / "log").read_text()):  # the driver has heard of a step
        assert process.poll() is None, words_of(process, tmp_path)
        time.sleep(0.1)
    process.terminate()
    said = words_of(process, tmp_path)
    assert process.returncode == 143, said
    assert_stopped(run, said, "SIGTERM")
    before, _, _ = said.replace(str(tmp_path), "").partition("stopping after this step")
    lines = [line for line in before.splitlines() if "ray" in line.lower()]
    assert [line for line in lines if "starting Ray" not in line] == []  # quiet
