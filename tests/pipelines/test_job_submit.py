"""`ray job submit` and `didr submit` against a head of our own: the commands of docs/cluster.md, token and all."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from didr_core.train.run_folder import RunFolder
from pipelines.cluster.resources import REWARD_RESOURCE, ROLE_LABEL, TRAINER_RESOURCE
from tests.pipelines.ray_head import Head, ray_head

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One node that offers both roles, so that align reserves them as on a cluster of cluster.yaml."""
    roles = json.dumps({TRAINER_RESOURCE: 2, REWARD_RESOURCE: 2})
    with ray_head("--num-cpus=4", f"--resources={roles}", f"--labels={ROLE_LABEL}=trainer") as running:
        yield running


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds and a job needs; in another place than the installed packages, so that it shows whose code runs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("didr_core", "pipelines", "tune_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


PROBE = """
import json, ray
from pipelines.cluster.session import ray_session
with ray_session(ADDRESS, num_cpus=99) as cluster:
    @ray.remote(num_cpus=1, resources={"trainer": 1})
    def look():
        import os, didr_core, pipelines
        return didr_core.__file__, pipelines.__file__, os.environ.get("RAY_DATA_DISABLE_PROGRESS_BARS")
    node, = cluster.nodes
    print("RESULT", json.dumps({"worker": ray.get(look.remote()), "has": node.capacity(), "labels": node.labels, "local": cluster.local}))
"""


def result(output: str) -> dict[str, object]:
    line, *_ = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_a_job_joins_its_cluster_and_its_workers_run_the_jobs_code(head: Head, clone: Path) -> None:
    (clone / "probe.py").write_text(PROBE.replace("ADDRESS", "None"))
    done = head.submit(clone, "python", "probe.py")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = result(done.stdout)
    worker = seen["worker"]
    assert "working_dir_files" in worker[0] and "working_dir_files" in worker[1]
    assert worker[2] == "1"
    assert seen["has"]["CPU"] == 4  # not the 99 that a Ray of our own would have had
    assert (seen["has"][TRAINER_RESOURCE], seen["has"][REWARD_RESOURCE], seen["labels"][ROLE_LABEL]) == (
        2,
        2,
        "trainer",
    )
    assert seen["local"] is False


def test_attached_from_the_head_node_workers_run_this_checkouts_code(head: Head, clone: Path, tmp_path: Path) -> None:
    code = PROBE.replace("ADDRESS", repr(head.address))
    env = head.env | {"PYTHONPATH": str(clone)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "py_modules_files" in result(done.stdout)["worker"][0]
    assert done.stderr == "", "quiet"


def test_without_the_token_nobody_gets_in(head: Head, clone: Path) -> None:
    stranger = replace(head, env=head.env | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    done = stranger.submit(clone, "python", "-c", "print('ran')")
    assert done.returncode != 0
    assert "Unauthorized" in done.stderr or "token" in done.stderr
    assert "ran" not in done.stdout


SHORT = {
    "train.batch": 4,
    "evaluation.grid": 2,
    "evaluation.prompts": 4,
    "evaluation.teacher_steps": 0,
    "tracking.uri": "none",
}


def sets(**more: object) -> list[str]:
    """Words for settings; `__` stands for the dot."""
    every = SHORT | {key.replace("__", "."): value for key, value in more.items()}
    return [word for key, value in every.items() for word in ("--set", f"{key}={value}")]


def test_align_is_submitted_looked_at_stopped_and_goes_on(head: Head, clone: Path, tmp_path: Path) -> None:
    """By `didr submit`, from a clone and from an empty folder, to which the code comes from where it is installed."""
    run, empty = RunFolder(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    long = sets(train__steps=2000, train__checkpoint_every=2000, evaluation__world="none", evaluation__every=0)
    words = ("--no-wait", "--job-id", "first", "--", "align", "--recipe", "tiny", "--output", str(run.path), *long)
    sent = head.didr(clone, clone, "submit", "--address", head.dashboard, *words)
    assert sent.returncode == 0 and "with the code in it" in sent.stderr, sent.stderr
    try:
        deadline = time.monotonic() + 1200
        while not run.metrics_path.is_file() or run.metrics_path.read_text().count("\n") < 2:
            assert time.monotonic() < deadline and run.info().get("status") != "failed", run.info()
            time.sleep(0.5)
        looked = head.didr(clone, clone, "doctor", "--recipe", "tiny", "--address", head.address)
    finally:
        ended = head.didr(empty, clone, "submit", "--address", head.dashboard, "--stop", "first")
    said = " ".join(looked.stdout.split())
    assert looked.returncode == 0 and "GiB memory" in said and "e+" not in said, looked.stdout + looked.stderr
    assert f"{ROLE_LABEL}=trainer" in said and "in all" in said and "free now" in said
    assert re.search(r"tiny fits the cluster, but other jobs hold it: 4 CPU needed, [01] of 4 free", said), said
    assert ended.returncode == 0 and "job first: stopped" in ended.stderr, ended.stderr
    step = run.last_step()
    assert run.info()["status"] == "interrupted" and step >= 2
    assert f"--resume {run.path}` goes on from step {step}" in ended.stdout

    words = ("--resume", "run", "--", "align", "--output", str(tmp_path), "--set", f"train.steps={step + 2}")
    done = head.didr(empty, clone, "submit", "--address", head.dashboard, *words)
    assert done.returncode == 0 and "this installation's code" in done.stderr, done.stdout + done.stderr
    assert run.info()["status"] == "finished" and run.last_step() == step + 2
    assert f"going on from step {step}" in done.stdout
    assert (run.path / "scores.json").is_file() and (run.path / "export" / "model_index.json").is_file()


def test_sweep_as_a_job(head: Head, clone: Path, tmp_path: Path) -> None:
    words = ["--recipe", "tiny", "--space", "smoke", "--trials", "2", "--output", str(tmp_path), "--name", "s"]
    words += sets(train__steps=2, train__checkpoint_every=2)
    done = head.didr(clone, clone, "submit", "--address", head.dashboard, "--", "sweep", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    front = json.loads((tmp_path / "s" / "front.json").read_text())
    assert front["trials"] == {"planned": 2, "finished": 2}
    assert (tmp_path / "s" / "export" / "model_index.json").is_file()


def test_evaluate_as_a_job(head: Head, clone: Path, tmp_path: Path) -> None:
    words = [
        "--model",
        "start",
        "--model",
        "teacher,steps=2",
        "--count",
        "4",
        "--batch",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    done = head.submit(clone, "python", "-m", "pipelines.evaluate", *words, "--set", "tracking.uri=none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "report.html").is_file(), done.stdout + done.stderr
    assert list(json.loads((tmp_path / "out" / "scores.json").read_text())["models"]) == ["start", "teacher"]


def test_a_failing_job_says_why_last_and_exits_non_zero(head: Head, clone: Path) -> None:
    done = head.submit(clone, "python", "-m", "pipelines.align", "--recipe", "tiny", "--set", "drp.beta=-1")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1].startswith("error: recipe 'tiny': drp.beta"), done.stdout


def test_a_job_without_room_says_so_at_once(head: Head, clone: Path, tmp_path: Path) -> None:
    """Nobody starts nodes for this head: there is nothing to wait for."""
    words = (
        "--recipe",
        "tiny",
        "--output",
        str(tmp_path / "run"),
        "--set",
        "workers.train=5",
        "--set",
        "train.batch=5",
    )
    done = head.didr(clone, clone, "submit", "--address", head.dashboard, "--", "align", *words)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 1 and "needs 7 CPU and the cluster has 4, 3 short" in last, done.stdout
    assert "Lower workers.train" in last and "`ray start --num-cpus=N` gives a node more (here 7 are enough)" in last
    assert done.stderr.strip().splitlines()[-1].endswith(f" failed with exit code 1: {last}")
