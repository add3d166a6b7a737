"""Exact resume, one matrix: N steps are k steps, a kill -9 and N - k steps, for every row (what trains) and way (who runs it).

With the same number of workers bit for bit (weights, masters, optimizers and their random numbers, averages, reward scale, rates, cursor,
alarms, metrics); with another one to rounding. `make test` runs what differs most of it. All of it, Ray included:
`DIDR_RESUME=all pytest tests/train/test_resume.py`, 20 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from random_models import sdxl_folder
from safetensors.torch import load_file
from toy import toy_recipe
from worker_pair import spawn_pair

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data.feed import LocalFeed
from didr_core.data.prompts import open_prompts
from didr_core.train import checkpoint, distributed
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, loop
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.world import random_models

ROOT = Path(__file__).resolve().parents[2]
WHOLE = os.environ.get("DIDR_RESUME") == "all"
N, KILL, EVERY = 6, 3, 2  # killed after three steps, it goes on from the checkpoint of two
NETWORKS = ("generator", "ema", "assistant")

pytestmark = [pytest.mark.slow]

LORA = {"generator": "lora", "assistant": "lora", "rank": 4}
ROWS: dict[str, dict[str, Any]] = {
    "sdxl": {"train": {"assistant_warmup": 3, "assistant_updates": 2}},  # killed in the assistant's head start
    "sdxl-lora": {"roles": LORA | {"gradient_checkpointing": True}},
    "sdxl-bfloat16": {"roles": {"assistant": "lora", "rank": 4, "dtype": "bfloat16", "update": "stochastic"}},
    "sdxl-masters": {"roles": {"assistant": "lora", "rank": 4, "dtype": "bfloat16", "update": "master"}},
    "sdxl-hybrid": {"drp": {"estimator": "hybrid", "beta": 0.5}},  # draws more random numbers than any other
    "zimage": {},
    "zimage-lora": {"roles": LORA | {"dtype": "bfloat16"}},
}
SPLIT = ["roles.fsdp=true"]
ONE_PROCESS = tuple(ROWS) if WHOLE else ("sdxl-lora", "sdxl-bfloat16", "sdxl-hybrid", "zimage-lora")
KILLED = tuple(ROWS) if WHOLE else ("sdxl",)
TWO = [(row, sets) for row in ROWS for sets in ([], SPLIT) if sets == [] or row in ("sdxl", "zimage")]
TWO = TWO if WHOLE else [("sdxl", []), ("sdxl", SPLIT)]
ON_RAY = {
    "one worker": ("sdxl", ["workers.train=1"]),
    "two workers": ("sdxl", []),
    "two encoders, two rewards": ("sdxl", ["workers.encoders=2", "workers.rewards=2", "workers.train=1"]),
    "split": ("sdxl", SPLIT),
    "adapters": ("sdxl-lora", []),
    "zimage": ("zimage", []),
    "zimage, split": ("zimage", SPLIT),
    "zimage, adapters": ("zimage-lora", ["workers.encoders=2", "workers.train=1"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@cache
def recipe_of(home: Path, row: str) -> Path:
    family = row.partition("-")[0]
    folder = home / row
    pipeline = sdxl_folder(folder / "model") if family == "sdxl" else random_models.zimage(folder / "model")
    backbone: dict[str, Any] = {"name": family, "pipeline": str(pipeline)}
    backbone |= {"resolution": 64, "max_tokens": 192} if family == "zimage" else {}
    changes = {"backbone": backbone, "evaluation": {"grid": 2, "prompts": 0}} | ROWS[row]
    train = {"steps": N, "batch": 8, "checkpoint_every": EVERY, "keep_checkpoints": 9}
    return toy_recipe(folder, **changes | {"train": train | changes.get("train", {})})


def config_of(home: Path, row: str, sets: list[str] | None = None) -> Config:
    return configs.load(str(recipe_of(home, row)), sets or [])


def go(config: Config, run: RunFolder, until: int | None = None) -> RunFolder:
    """What a worker does, from the newest checkpoint on; ``until`` leaves it as a kill after that step would."""
    torch.set_num_threads(config.train.threads)
    ranks = distributed.current()
    learner = Learner(config, parallel=ranks)
    journal = Journal(run, config, learner, open_prompts(config).fingerprint)
    journal.restore()
    if ranks.rank == 0:
        run.forget_after(learner.step_count)
    feed = LocalFeed(config, learner.step_count * config.train.batch, rank=ranks.rank, world_size=ranks.world_size)
    loop(learner, feed, journal, Observer(), writes=ranks.rank == 0, until=until)
    return run


@cache
def undisturbed(home: Path, row: str) -> RunFolder:
    """One process that nothing happens to."""
    config = config_of(home, row)
    return go(config, RunFolder.create(config, str(home / f"{row}-whole")))


def kept(run: RunFolder, step: int = N) -> dict[str, Any]:
    """All that a checkpoint holds."""
    folder = run.checkpoint(step)
    tensors = {f"{f.name}/{k}": v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    return tensors | {"state.json": json.loads((folder / "state.json").read_text())}


def numbers(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in read_lines(run.metrics_path)]


def assert_same(run: RunFolder, other: RunFolder) -> None:
    a, b = kept(run), kept(other)
    assert a.keys() == b.keys() and len(a) > 60
    assert a.pop("state.json") == b.pop("state.json")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert [row["step"] for row in numbers(run)] == list(range(1, N + 1))
    assert numbers(run) == numbers(other)


def assert_close(config: Config, run: RunFolder, other: RunFolder, bound: float = 1e-4) -> None:
    """Weights of the last step agree to a hundredth of how far they have moved, and so do global means of metrics."""
    start = Learner(config).state_dict()
    for network in NETWORKS:
        a, b = (checkpoint.read(r.checkpoint(N), network) for r in (run, other))
        moved = sum((a[n] - start[network][n]).square().sum() for n in a)
        apart = sum((a[n] - b[n]).square().sum() for n in a)
        assert moved > 0 and apart < bound * moved, (network, float(apart), float(moved))
    for one, two in zip(numbers(run), numbers(other), strict=True):
        for key in ("loss/assistant", "loss/generator", "reward/gain", "drs/ratio", "grad/generator"):
            if key in one:  # in the head start the generator has none
                assert one[key] == pytest.approx(two[key], rel=1e-2, abs=1e-3), key


@pytest.mark.parametrize("row", ONE_PROCESS)
def test_in_one_process(home: Path, row: str) -> None:
    """Networks and optimizers that begin anew."""
    config = config_of(home, row)
    run = go(config, RunFolder.create(config, str(home / f"{row}-again")), until=KILL)
    assert run.last_step() == EVERY and len(numbers(run)) == KILL
    assert_same(go(config, run), undisturbed(home, row))


WITHOUT_RAY = """
import sys
for name in ("ray", "mlflow", "pipelines"):
    sys.modules[name] = None  # importing it raises
"""
TRAINED = """
from didr_core.train.__main__ import main
sys.exit(main())
"""
PACED = """
import time
from didr_core.train.learner import Learner
step = Learner.step
Learner.step = lambda *given: time.sleep(0.5) or step(*given)
"""  # or it might be over before it is killed


def started(*arguments: object, paced: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITHOUT_RAY + paced + TRAINED, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(run: RunFolder, step: int, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not run.metrics_path.is_file() or len(read_lines(run.metrics_path)) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


@pytest.mark.parametrize("row", KILLED)
def test_killed_without_ray(home: Path, row: str) -> None:
    """`didr_core` alone, with ray, mlflow and pipelines unimportable; SIGKILL at a moment of its own choosing."""
    run = RunFolder(home / f"{row}-killed")
    killed = started("--recipe", recipe_of(home, row), "--output", run.path, paced=PACED)
    wait_for(run, KILL)
    killed.kill()
    killed.communicate()
    stopped = run.last_step()
    assert stopped < N and run.info()["status"] == "running"
    resumed = started("--resume", run.path)
    said, _ = resumed.communicate()
    assert resumed.returncode == 0, said
    assert f"step {stopped + 1} " in said and f"step {stopped} " not in said
    assert run.info()["status"] == "finished" and (run.path / "export" / "model_index.json").is_file()
    assert_same(run, undisturbed(home, row))


def at(home: Path, row: str, sets: list[str], what: str) -> RunFolder:
    return RunFolder(home / f"{row}-{'split' if sets else 'pair'}-{what}")


@pytest.fixture(scope="module")
def pair(home: Path) -> Path:
    """Two gloo workers: every row undisturbed, killed and resumed, stopped for one to go on with, and going on from one."""
    jobs = []
    for row, sets in TWO:
        config = config_of(home, row, sets)
        for what in ("whole", "again", "to-one", "from-one"):
            RunFolder.create(config, str(at(home, row, sets, what).path))
        go(config, at(home, row, sets, "from-one"), until=KILL)
        jobs.append((str(home), row, str(recipe_of(home, row)), sets))
    spawn_pair(_worker, jobs, str(home / "meeting"))
    return home


def _worker(rank: int, jobs: list[tuple[str, str, str, list[str]]], meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        for home, row, recipe, sets in jobs:
            config = configs.load(recipe, sets)
            for what, until in (("whole", N), ("again", KILL), ("again", N), ("to-one", KILL), ("from-one", N)):
                dist.barrier()  # all see the same newest checkpoint
                go(config, at(Path(home), row, sets, what), until=until)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("row", "sets"), TWO)
def test_two_workers(pair: Path, row: str, sets: list[str]) -> None:
    """Two go on as two bit for bit; as one, from one, and beside one to rounding."""
    whole, config = at(pair, row, sets, "whole"), config_of(pair, row, sets)
    assert (whole.checkpoint(N) / "generator.1.safetensors").is_file() == bool(sets)
    assert_same(at(pair, row, sets, "again"), whole)
    if row in ("sdxl-bfloat16", "sdxl-masters", "zimage-lora"):
        return  # calls of half a batch round to other bfloat16 numbers: networks/test_sharding.py has the bound
    assert_close(config, whole, undisturbed(pair, row))
    assert_close(config, whole, go(config, at(pair, row, sets, "to-one")))
    assert_close(config, whole, at(pair, row, sets, "from-one"))


if WHOLE:

    @pytest.fixture(scope="module")
    def cluster() -> Iterator[None]:
        from pipelines.cluster.session import ray_session

        with ray_session("local", 5):
            yield

    def on_ray(home: Path, way: str, name: str, kill: bool = False) -> RunFolder:
        """A whole `didr align`; all trainers are killed after a while, for Ray to start again from the checkpoint."""
        from pipelines.align import align

        row, sets = ON_RAY[way]
        run = RunFolder(home / f"ray-{way}-{name}")
        if kill:
            threading.Thread(target=_kill_trainers, args=(run,), daemon=True).start()
        align(str(recipe_of(home, row)), [*sets, "tracking.uri=none"], output=str(run.path))
        return run

    def _kill_trainers(run: RunFolder) -> None:
        wait_for(run, KILL)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)

    @pytest.mark.ray
    @pytest.mark.parametrize("way", ON_RAY)
    def test_on_ray(home: Path, cluster: None, way: str, capfd: pytest.CaptureFixture[str]) -> None:
        whole = on_ray(home, way, "whole")
        killed = on_ray(home, way, "killed", kill=True)
        assert "a worker failed; going on from step" in capfd.readouterr().err
        assert_same(killed, whole)

    @pytest.mark.ray
    @pytest.mark.parametrize(
        ("before", "after"),
        [("one worker", ["workers.train=2"]), ("two workers", ["workers.train=1"]), ("split", ["workers.train=1"])],
    )
    @pytest.mark.parametrize("local", [False, True])
    def test_from_ray_to_others(home: Path, cluster: None, before: str, after: list[str], local: bool) -> None:
        """One worker to two, two to one, Ray to one process."""
        from pipelines.align import align

        whole = RunFolder(home / f"ray-{before}-whole")
        if not whole.path.is_dir():  # this test alone was asked for
            on_ray(home, before, "whole")
        moved = RunFolder(Path(shutil.copytree(whole.path, home / f"{before}-{after[0]}-{local}")))
        for step in moved.checkpoints():
            if step > EVERY:
                shutil.rmtree(moved.checkpoint(step))
        align(resume=str(moved.path), overrides=after, local=local)
        assert_close(config_of(home, ON_RAY[before][0]), whole, moved)
