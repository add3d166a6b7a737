"""The nodes that a file of deploy/ (or cluster.yaml) starts, with what Ray counts on them, read without starting any."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.cluster.resources import ClusterView, Node

# What the clouds report for the instance types in the files; a new type there wants a line here.
MACHINES: dict[str, dict[str, float]] = {
    "m7i.2xlarge": {"CPU": 8},
    "g6e.12xlarge": {"CPU": 48, "GPU": 4},
    "g6.4xlarge": {"CPU": 16, "GPU": 1},
    "p4de.24xlarge": {"CPU": 96, "GPU": 8},
    "n2-standard-8": {"CPU": 8},
    "a2-ultragpu-8g": {"CPU": 96, "GPU": 8},
    "g2-standard-48": {"CPU": 48, "GPU": 4},
}
OWNED: dict[str, dict[str, float]] = {"10.0.0.11": {"CPU": 64, "GPU": 8}, "10.0.0.12": {"CPU": 32, "GPU": 4}}
"""What cluster-onprem.yaml takes its example machines for."""


def view_of(path: Path) -> ClusterView:
    """All nodes that are up once the file's cluster is."""
    return view(yaml.safe_load(path.read_text()))


def view(tree: Mapping[str, Any]) -> ClusterView:
    """As :func:`view_of`, of the file's content."""
    if "kind" in tree:
        found = _of_kuberay(tree["spec"].get("rayClusterSpec", tree["spec"]))
    elif "compute_config" in tree:
        found = _of_anyscale(tree["compute_config"])
    elif tree["provider"]["type"] == "local":
        found = _of_owned(tree)
    else:
        found = _of_launcher(tree)
    return ClusterView(tuple(found), local=False)


def _of_launcher(tree: Mapping[str, Any]) -> Iterator[Node]:
    for name, kind in tree["available_node_types"].items():
        config = kind["node_config"]
        resources = MACHINES[config.get("InstanceType") or config["machineType"]] | kind["resources"]
        count = 1 if name == tree["head_node_type"] else kind["min_workers"]
        yield from (Node(f"{name}-{i}", resources, kind["labels"]) for i in range(count))


def _of_kuberay(cluster: Mapping[str, Any]) -> Iterator[Node]:
    """`resources` and `num-cpus` stand above the pod's limits, as the operator takes them."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        resources |= {key: float(value) for key, value in group.get("resources", {}).items()}
        if "num-cpus" in group["rayStartParams"]:
            resources["CPU"] = float(group["rayStartParams"]["num-cpus"])
        name = group.get("groupName", "head")
        yield from (Node(f"{name}-{i}", resources, group["labels"]) for i in range(group.get("minReplicas", 1)))


def _of_anyscale(compute: Mapping[str, Any]) -> Iterator[Node]:
    """`resources` stand in place of what the machine has."""
    for group in (compute["head_node"], *compute["worker_nodes"]):
        for i in range(group.get("min_nodes", 1)):
            yield Node(f"{group.get('name', 'head')}-{i}", group["resources"], group["labels"])


def _of_owned(tree: Mapping[str, Any]) -> Iterator[Node]:
    """Runs the commands that start Ray with a `ray` that says what it is told."""
    provider = tree["provider"]
    for ip in (provider["head_ip"], *provider["worker_ips"]):
        role = "head" if ip == provider["head_ip"] else "worker"
        told = _started(tree[f"{role}_start_ray_commands"][-1], ip)
        words = dict(word.removeprefix("--").split("=", 1) for word in told if "=" in word)
        resources = OWNED.get(ip, {}) | json.loads(words.get("resources", "{}"))
        if "num-cpus" in words:
            resources["CPU"] = float(words["num-cpus"])
        yield Node(ip, resources, dict([words["labels"].split("=", 1)]))


def _started(command: str, ip: str) -> list[str]:
    stand_in = f"hostname() {{ echo 192.168.7.7 {ip}; }}; ulimit() {{ :; }}; ray() {{ printf '%s\\n' \"$@\"; }}\n"
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "RAY_HEAD_IP": "10.0.0.10"}
    done = subprocess.run(["bash", "-c", stand_in + command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
