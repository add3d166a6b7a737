"""Where Ray runs and what it is told; a real start and attach are in test_job_submit.py and the end-to-end runs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from didr_core import config as configs
from didr_core.types import DIDRError
from pipelines.cluster import session
from pipelines.cluster.resources import ClusterView, Demands, Group, Need, Node, NoRoom
from pipelines.cluster.session import Place, await_room, inside_ray_job, prepare_environment, where_to_run

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def no_ray_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RAY_ADDRESS", JOB, *session.ALWAYS_ENV, *session.QUIET_ENV):
        monkeypatch.delenv(key, raising=False)


def test_without_an_address_ray_is_our_own() -> None:
    assert where_to_run(None) == Place("here")
    assert not inside_ray_job()


def test_a_package_here_that_would_stand_in_for_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").mkdir()
    assert where_to_run(None) == Place("here"), "a folder is no package"
    for file in ("pipelines/__init__.py", "tune_spaces.py"):
        (tmp_path / file).touch()
        with pytest.raises(DIDRError, match=rf"{file}: has the name of DIDR's own package"):
            where_to_run("auto")
        (tmp_path / file).unlink()


@pytest.mark.parametrize("key", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(key, "/" + 90 * "x")
    with pytest.raises(DIDRError, match=rf"{key}='/xx.*91 characters.*Set RAY_TMPDIR=/tmp"):
        session.view_of_this_machine(configs.load("tiny"), None)
    monkeypatch.setenv("RAY_TMPDIR", "/" + 30 * "x")  # what Ray looks at first
    assert where_to_run(None) == Place("here")
    assert len(os.environ["RAY_TMPDIR"]) <= session.SOCKET_PATH - len(session.SOCKET)


def test_an_address_attaches_and_local_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert where_to_run("10.0.0.1:6379") == Place("attached", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert where_to_run(None) == Place("attached", "10.0.0.2:6379")
    assert where_to_run("local") == Place("here")


def test_a_job_uses_its_cluster_whatever_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {}}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.3:6379")
    assert inside_ray_job()
    assert where_to_run(None) == where_to_run("local") == Place("job", "10.0.0.3:6379")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8265", "https://x", "ray://head:10001"])
def test_a_dashboard_url_is_no_cluster(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DIDRError, match="ray job submit.*leave it out"):
        where_to_run(url)
    monkeypatch.setenv("RAY_ADDRESS", url)
    with pytest.raises(DIDRError, match="RAY_ADDRESS=.*unset it"):
        where_to_run(None)


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(DIDRError, match="no Ray cluster answers at 127.0.0.1:1 "):
        session._is_anyone_there("127.0.0.1:1")


def test_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.5")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_environment(verbose=True)
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "1.5"
    assert "RAY_DATA_DISABLE_PROGRESS_BARS" not in os.environ
    prepare_environment()
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"


def test_workers_get_our_environment_but_not_what_the_job_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "1"}}}))
    sent = session._worker_env(verbose=False)
    assert sent["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"
    assert "RAY_TRAIN_ENABLE_PRINT_PATCH" not in sent


def test_all_packages_travel_when_attached() -> None:
    assert [p.name for p in session.package_folders()] == list(session.PACKAGES)


DEMANDS = Demands((Group("training worker", 2, Need(), "workers.train"),))


def small(n: int, local: bool, grows: bool = False) -> ClusterView:
    return ClusterView((Node("n", {"CPU": n}),), local=local, grows=grows)


def test_room_is_awaited_where_nodes_may_come_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    said: list[str] = []

    def grown() -> ClusterView:
        looks.append(1)
        return small(2 if len(looks) > 1 else 1, local=False, grows=True)

    monkeypatch.setattr(session, "cluster_view", grown)
    monkeypatch.setattr(session.time, "sleep", lambda s: None)
    assert await_room(lambda view: DEMANDS, small(1, False, grows=True), said.append).placement == ((2,),)
    assert len(looks) == len(said) == 2  # before every wait
    for words in ("600 s more", "needs 2 CPU", "has 1", "1 short", "Lower workers.train", "ray start --num-cpus=N"):
        assert words in said[0]
    for local in (True, False):  # a Ray of our own; machines that somebody has started by hand
        with pytest.raises(NoRoom, match="workers.train"):
            await_room(lambda view: DEMANDS, small(1, local), said.append)
    assert len(looks) == len(said) == 2


def test_what_others_hold_is_waited_for_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    free, said = iter((1.0, 2.0)), []

    def looked() -> ClusterView:
        return replace(small(4, local=False), free={"CPU": next(free)})

    monkeypatch.setattr(session, "cluster_view", looked)
    monkeypatch.setattr(session.time, "sleep", lambda s: None)
    assert await_room(lambda view: DEMANDS, looked(), said.append).placement == ((2,),)
    (once,) = said
    assert once.startswith("waiting for room, 3600 s more: other jobs hold it: 2 CPU needed, 1 of 4 free (`ray status`")
    monkeypatch.setattr(session, "WAIT_FOR_OTHERS_S", 0.0)
    with pytest.raises(NoRoom, match="other jobs hold it"):
        await_room(lambda view: DEMANDS, replace(small(4, local=False), free={}), said.append)
    assert len(said) == 1


def test_a_cluster_grows_where_somebody_starts_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray._private.state import state

    node = {"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}, "Alive": True, "Labels": {"didr-role": "head"}}
    node["NodeID"] = "one"
    monkeypatch.setattr(ray, "nodes", lambda: [node, node | {"NodeID": "called back"}])
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"called back": 0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5, "node:10.0.0.1": 1.0})
    assert [n.id for n in session.cluster_view().nodes] == ["one"]
    assert not session.cluster_view().grows
    node["Labels"] = {ray._raylet.RAY_NODE_GROUP_KEY: "workers"}  # what Ray makes of an autoscaler's RAY_NODE_TYPE_NAME
    assert session.cluster_view().grows
    assert session.cluster_view().free == {"CPU": 0.5, "node:10.0.0.1": 1.0} and session.cluster_view(True).free is None


def test_a_dead_head_and_a_dead_raylet_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    head, raylet = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    doors = [f"127.0.0.1:{server.getsockname()[1]}" for server in (head, raylet)]
    context = SimpleNamespace(gcs_address=doors[0], get_node_id=lambda: "mine")
    mine = {"NodeID": "mine", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": raylet.getsockname()[1]}
    other = {"NodeID": "other", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": 1}  # another's is its own affair
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: [other, mine])
    check_alive = session.pulse()
    check_alive()
    for server, door in ((raylet, doors[1]), (head, doors[0])):
        server.close()
        with pytest.raises(DIDRError, match=f"no Ray cluster answers at {door} .*was killed"):
            check_alive()


def starting(failures: list[Exception]) -> Callable[..., None]:
    def init(*args: Any, **kwargs: Any) -> None:
        if failures:
            raise failures.pop(0)

    return init


def test_a_slow_start_is_tried_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    slow = Exception("The current node timed out during startup. This could happen because ...")
    monkeypatch.setattr(ray, "init", starting([slow]))
    session._start(4, verbose=False, level="ERROR")
    monkeypatch.setattr(ray, "init", starting([slow, slow]))
    with pytest.raises(DIDRError, match="--local"):
        session._start(4, verbose=False, level="ERROR")
    monkeypatch.setattr(ray, "init", starting([ValueError("something else")]))
    with pytest.raises(ValueError, match="something else"):
        session._start(4, verbose=False, level="ERROR")


def test_a_refused_token_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "init", starting([ray.exceptions.AuthenticationError("InvalidAuthToken")]))
    with pytest.raises(DIDRError, match=r"InvalidAuthToken[\s\S]*RAY_AUTH_MODE=token[\s\S]*is unset"):
        session._attach(Place("attached", "auto"), verbose=False, level="ERROR")


def test_trainers_stay_where_the_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train moves its workers elsewhere unless told not to: relative paths then passed preflight and failed on them."""
    monkeypatch.delenv("RAY_CHDIR_TO_TRIAL_DIR", raising=False)
    prepare_environment()
    from ray._private.ray_constants import env_bool
    from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR

    assert env_bool(RAY_CHDIR_TO_TRIAL_DIR, True) is False
