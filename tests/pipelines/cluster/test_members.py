"""A group that gets smaller and larger: when it is asked to stop, how the batch is shared then, and a cluster whose nodes come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data import feed
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines.cluster import members as module
from pipelines.cluster.members import Members, counts, with_workers
from pipelines.cluster.resources import ClusterView, Node, NoRoom

CPU = {"CPU": 2.0}
ROOMY = Node("h", {"CPU": 3.0}, {}, "h")


def view(*names: str, grows: bool = True) -> ClusterView:
    nodes = (ROOMY, *(Node(f"node {n}", CPU | {"trainer": 1.0}, {}, n) for n in names))
    return ClusterView(nodes, local=False, grows=grows)


def recipe(*more: str) -> Config:
    return configs.load("tiny", ["workers.train=[1,4]", "train.batch=24", "train.micro_batch=6", *more])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is there and in use, and a clock that :func:`time.sleep` moves."""
    state: dict[str, Any] = {"view": view("a", "b"), "used": {"a", "b"}, "now": 100.0}
    monkeypatch.setattr(module, "cluster_view", lambda answering=False: state["view"])
    monkeypatch.setattr(module, "nodes_in_use", lambda: set(state["used"]))
    monkeypatch.setattr(module.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(module.time, "sleep", lambda s: state.update(now=state["now"] + s))
    return state


def members(tmp_path: Path, config: Config | None = None) -> tuple[Members, RunFolder]:
    run = RunFolder(tmp_path)
    return Members(config or recipe(), run, view("a", "b", "c", "d"), lambda text: None), run


def test_the_batch_stays_and_is_shared_by_whoever_is_there() -> None:
    config = recipe()
    assert (config.workers.train, config.workers.train_min) == (4, 1) and counts(config) == [4, 3, 2, 1]
    assert counts(recipe("train.batch=20", "train.micro_batch=5")) == [4, 2, 1], "equal shares"
    assert counts(configs.load("tiny")) == [configs.load("tiny").workers.train]
    for count, micro in ((4, 6), (3, 2), (2, 6), (1, 6)):
        sizes = with_workers(config, count).sizes
        assert (sizes.share, sizes.micro_batch) == (24 // count, micro)
        assert sizes.total_prompts == config.sizes.total_prompts
    for wrong, said in (
        ("workers.train=[3,2]", "train_min=3"),
        ("workers.train=[1,2,3]", r"expected a number of workers, or \[fewest"),
    ):
        with pytest.raises(DIDRError, match=said):
            recipe(wrong)


def test_a_group_starts_with_fewer_after_twenty_seconds(tmp_path: Path, cluster: dict[str, Any]) -> None:
    group, run = members(tmp_path)
    assert group.start(again=False)[0].workers.train == 4
    run.stop_path.touch()
    began = cluster["now"]
    config, there = group.start(again=True)
    assert config.workers.train == 2 and {n.id for n in there.nodes} == {"h", "a", "b"} and not run.stop_path.exists()
    assert 20 <= cluster["now"] - began <= 22
    cluster["view"], began = view("a", grows=False), cluster["now"]
    group.view = cluster["view"]
    assert group.start(again=True)[0].workers.train == 1 and 5 <= cluster["now"] - began <= 7, "nobody starts nodes"
    cluster["view"] = view("a", "b", "c", "d")
    began = cluster["now"]
    assert group.start(again=True)[0].workers.train == 4 and cluster["now"] == began, "no waiting where all are there"
    cluster["view"] = ClusterView((Node("h", {"CPU": 1.0}),), local=False)
    with pytest.raises(NoRoom):
        group.start(again=True)


def test_a_group_is_stopped_for_a_node_that_leaves_and_for_lasting_room(
    tmp_path: Path, cluster: dict[str, Any]
) -> None:
    def look(times: int) -> None:
        for _ in range(times):
            cluster["now"] += 2.5
            group.look()

    group, run = members(tmp_path)
    cluster["view"] = view("a", "b")
    group.start(again=True)
    look(3)
    cluster["view"] = view("a", "b", "x")
    look(2)
    cluster["view"] = view("a", "b")
    look(3)
    assert not run.stop_path.exists(), "a node that comes and goes is none"
    cluster["view"] = view("b")
    look(1)
    assert run.stop_path.exists() and group.why() == "node a left, or is about to"
    group.start(again=True)
    assert group.workers == 1 and not group.why()
    look(2)
    assert not group.why(), "Ray takes a while to see that actors of a dead node are dead"
    cluster["used"] = {"b"}
    cluster["view"] = view("b", "c")
    look(6)
    assert run.stop_path.exists() and group.why() == "there is room for 2 workers"
    cluster["view"] = view("b", "c", "other")
    group.start(again=True)
    cluster["used"] = {"b", "c"}
    look(1)
    cluster["view"] = view("b", "c")
    look(2)
    assert not group.why(), "a node that we are not on is none of ours"
    cluster["view"] = view("b")
    assert group.why() == "node c left, or is about to", "its workers may miss a node before our next look does"


def test_whoever_waits_for_prompts_hears_that_the_run_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "STOPPED_S", 1)
    stream = feed.ahead(iter(lambda: time.sleep(30), None), lambda: True)
    with pytest.raises(KeyboardInterrupt, match="while it waited for prompts"):
        next(stream)


@pytest.mark.nodes
@pytest.mark.slow
def test_nodes_leave_and_come_in_mid_run(tmp_path: Path) -> None:
    """Trainers on two nodes, actors on a third: it dies, a trainer's node dies, a new one comes, and is called back."""
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    tree = {"steps": 100_000, "batch": 8, "checkpoint_every": 5}
    path = toy_recipe(tmp_path, train=tree, workers={"train": [1, 2]}, evaluation={"grid": 1, "prompts": 0})
    run = tmp_path / "run"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=3, resources={"trainer": 1}) for _ in range(2)]
        nodes.append(cluster.add_node(num_cpus=2, resources={"reward": 2}))
        line = [sys.executable, "-m", "pipelines.align", "--recipe", str(path), "--address", cluster.address]
        with open(tmp_path / "log", "w+") as log:
            job = subprocess.Popen([*line, "--output", str(run)], env=environment, stdout=log, stderr=log)
            try:
                _until(lambda: _step(run) >= 6, job, log.name)
                took = {}
                for event, act in (
                    ("reward", lambda: cluster.remove_node(nodes[2], allow_graceful=False)),
                    ("trainer", lambda: cluster.remove_node(nodes[1], allow_graceful=False)),
                    ("new", lambda: nodes.append(cluster.add_node(num_cpus=3, resources={"trainer": 1}))),
                    ("notice", lambda: GcsClient(cluster.address).drain_node(nodes[-1].node_id, 2, "spot", 0)),
                ):
                    starts, began = Path(log.name).read_text().count("starting workers again"), time.monotonic()
                    before = _step(run)
                    act()
                    _until(
                        lambda n=starts: Path(log.name).read_text().count("starting workers again") > n, job, log.name
                    )
                    reached = RunFolder(run).last_step()
                    _until(lambda s=reached: _step(run) > s, job, log.name)
                    assert event in ("reward", "trainer") or reached >= before, (
                        "a checkpoint of the step that it was at"
                    )
                    took[event] = time.monotonic() - began
                print(json.dumps(took))
            finally:
                job.send_signal(signal.SIGTERM)
                code = job.wait(120)
        said = Path(log.name).read_text()
        assert code == 143, said[-3000:]
        assert "a worker failed" not in said, "nodes that leave are no failures, whoever sees it first"
        assert said.count("left, or is about to") >= 1 and "there is room for 2 workers" in said
        steps = [row["step"] for row in read_lines(RunFolder(run).metrics_path)]
        assert steps == list(range(1, len(steps) + 1)), "no step is lost or told twice"
        assert RunFolder(run).info()["status"] == "interrupted"
    finally:
        cluster.shutdown()


def _step(run: Path) -> int:
    return max((row["step"] for row in read_lines(RunFolder(run).metrics_path)), default=0)


def _until(true: Callable[[], bool], job: subprocess.Popen[bytes], log: str, patience: float = 240.0) -> None:
    late = time.monotonic() + patience
    while not true():
        assert job.poll() is None and time.monotonic() < late, Path(log).read_text()[-4000:]
        time.sleep(0.2)
