"""cluster.yaml, offline: Ray's own validation, and that its names are the ones the code reserves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from didr_core.config import Workers
from pipelines.cluster.resources import (
    REWARD_RESOURCE,
    ROLE_LABEL,
    ROLES,
    TRAINER_RESOURCE,
    NoRoom,
    align_demands,
    check,
)
from tests.pipelines.deploy.nodes import view

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))
    broken = copy.deepcopy(config) | {
        "max_workers": 0
    }  # fewer than the sum of min_workers: the check must be able to fail
    with pytest.raises(ValueError, match="max_workers"):
        validate_config(prepare_config(broken))


def test_head_does_no_work(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["labels"] == {ROLE_LABEL: "head"}


def test_roles_are_the_ones_the_code_reserves(config: dict[str, Any]) -> None:
    from ray._private.label_utils import validate_node_label_syntax

    kinds = config["available_node_types"]
    assert {kind["labels"][ROLE_LABEL] for kind in kinds.values()} == set(ROLES)
    for name, kind in kinds.items():
        validate_node_label_syntax(kind["labels"])
        if name != config["head_node_type"]:
            role = kind["labels"][ROLE_LABEL]
            assert set(kind["resources"]) & {TRAINER_RESOURCE, REWARD_RESOURCE} == {role}
            assert kind["resources"][role] > 0
            assert kind["min_workers"] == kind["max_workers"], "the check before a run counts nodes that are up"


def test_a_gpu_run_fits_and_each_process_lands_on_its_role(config: dict[str, Any]) -> None:
    nodes = view(config)
    workers = Workers(train=4, train_cpus=8, train_gpus=1, encoders=4, encoder_gpus=0.25, rewards=4, reward_gpus=0.25)
    room = check(align_demands(workers, nodes), nodes)
    for node, (train, encoders, rewards, listing) in zip(nodes.nodes, room.placement, strict=True):
        role = node.labels[ROLE_LABEL]
        assert role == TRAINER_RESOURCE or train == 0
        assert role == REWARD_RESOURCE or (encoders, rewards) == (0, 0)
        assert role != "head" or listing == 0
    assert not room.tight, "with roles no placement can go wrong"
    with pytest.raises(NoRoom, match=r"workers\.train"):
        check(align_demands(workers.model_copy(update={"train": 5}), nodes), nodes)


def test_nodes_install_from_the_lock_and_show_the_token(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["~/didr/requirements.lock"] == "requirements.lock"
    assert (ROOT / "requirements.lock").is_file()
    setup = "\n".join(config["setup_commands"])
    assert "grep -m1 '^torch==' ~/didr/requirements.lock" in setup
    assert "install --quiet -r ~/didr/requirements.lock" in setup
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for role in ("head", "worker"):
        start = config[f"{role}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]
