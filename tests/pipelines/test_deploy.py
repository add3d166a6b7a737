"""deploy/, offline: no key that its platform does not know, no resource that no recipe uses, room for every recipe that a file names."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from didr_core import config as configs
from pipelines.cli.main import app
from pipelines.cluster.resources import ROLE_LABEL, ROLES, ClusterView, NoRoom, check, demands_of
from tests.pipelines.deploy.kuberay_schema import faults, known
from tests.pipelines.deploy.nodes import view_of

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SHARED = DEPLOY / "sdxl_8gpu.yaml"
LAUNCHER, KUBERAY = ("cluster-gcp", "cluster-onprem"), ("raycluster", "rayjob")
FILES = (*LAUNCHER, *KUBERAY, "job")
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
# Of Anyscale's package 0.26.112: JobConfig, ComputeConfig, HeadNodeConfig, WorkerNodeGroupConfig.
_GROUP = {"instance_type": "string", "resources": {"*": "number"}, "labels": {"*": "string"}, "flags": {"*": "any"}}
_GROUP |= {
    "required_resources": {"*": "any"},
    "required_labels": {"*": "string"},
    "advanced_instance_config": {"*": "any"},
}
ANYSCALE: dict[str, Any] = {
    **dict.fromkeys(("name", "image_uri", "containerfile", "entrypoint", "working_dir", "requirements"), "string"),
    **dict.fromkeys(("cloud", "project", "ray_version", "py_executable", "registry_login_secret"), "string"),
    **dict.fromkeys(("max_retries", "timeout_s", "priority"), "integer"),
    **{key: {"*": "string"} for key in ("env_vars", "tags", "job_queue_config")},
    **{key: ["string"] for key in ("excludes", "py_modules")},
    "compute_config": {
        **dict.fromkeys(("cloud", "cloud_resource"), "string"),
        **{key: {"*": "number"} for key in ("min_resources", "max_resources")},
        **{key: {"*": "any"} for key in ("flags", "advanced_instance_config")},
        "zones": ["string"],
        "enable_cross_zone_scaling": "boolean",
        "head_node": _GROUP,
        "worker_nodes": [
            _GROUP | {"name": "string", "min_nodes": "integer", "max_nodes": "integer", "market_type": "string"}
        ],
    },
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())


def problems(name: str, tree: dict[str, Any]) -> list[str]:
    """What the file's platform would refuse, or drop silently."""
    if name in LAUNCHER:
        return _of_the_launcher(tree)
    if name == "job":
        return faults(tree, ANYSCALE, {})
    kinds = {kind.lower(): kind for kind in ("RayCluster", "RayJob")}
    meta = {"apiVersion": "string", "kind": "string", "metadata": {"name": "string"}, "spec": f"@{kinds[name]}"}
    return faults(tree, meta, known())


def _of_the_launcher(tree: dict[str, Any]) -> list[str]:
    """Ray's own check, which lets any key of a provider pass: those it knows, and the one of Google's client, stand in its schema."""
    import ray.autoscaler
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())["properties"]
    found = [f".{k}.{n}: unknown" for k in ("provider", "auth") for n in tree[k] if n not in schema[k]["properties"]]
    try:
        validate_config(prepare_config(copy.deepcopy(tree)))
    except (ValidationError, ValueError, SystemExit) as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("name", FILES)
def test_its_platform_knows_every_key(name: str) -> None:
    assert problems(name, read(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_key_anywhere_is_found(name: str) -> None:
    """Beside every key that is there, but for mappings whose keys are free (labels, resources, files, a cloud's own words)."""
    free = r"(labels|resources|limits|requests|nodeSelector|rayStartParams|file_mounts|env_vars|node_config.*|available_node_types)$"
    tried = 0
    for at, broken in _with_a_key_more(read(name)):
        if not re.search(free, at):
            assert problems(name, broken), at
            tried += 1
    assert tried >= 3


def _with_a_key_more(tree: Any) -> Iterator[tuple[str, Any]]:
    """Copies of ``tree`` with ``bogus: 1`` in one of its mappings, each with that mapping's path."""
    for at in list(_mappings(tree)):
        broken = copy.deepcopy(tree)
        there: Any = broken
        for step in at:
            there = there[step]
        there["bogus"] = 1
        yield ".".join(map(str, at)), broken


def _mappings(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(tree, dict):
        yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _mappings(value, (*at, key))


def meant_for(name: str) -> list[str]:
    """The recipes that the file's head names."""
    (line,) = re.findall(r"^# For recipes: ([\w, ]+)", (DEPLOY / f"{name}.yaml").read_text(), re.MULTILINE)
    return [recipe.strip() for recipe in line.partition("(")[0].split(",")]


def unfit(view: ClusterView, recipes: list[str]) -> list[str]:
    """Labels and resources of the nodes that mean nothing to us, and recipes that find no room."""
    found = [f"{n.name}: label {n.labels}" for n in view.nodes if n.labels.get(ROLE_LABEL) not in ROLES]
    used = {"CPU", "GPU"}
    for recipe in recipes:
        demands = demands_of(configs.load(recipe), view)
        used |= demands.totals().keys()
        try:
            room = check(demands, view)
        except NoRoom as error:
            found.append(f"{recipe}: {error}")
            continue
        for node, row in zip(view.nodes, room.placement, strict=True):
            if node.labels.get(ROLE_LABEL) == "head" and any(row):
                found.append(f"{recipe}: the head works")
    for node in view.nodes:
        own = node.labels.get(ROLE_LABEL)
        found += [f"{node.name}: no recipe uses {key}" for key in node.capacity() if key not in used]
        found += [f"{node.name}: {key} on a {own} node" for key in node.capacity() if key in ROLES and key != own]
        if own not in ("head", None) and own not in node.capacity():
            found.append(f"{node.name}: has the role {own} and nothing of it")
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_it_is_meant_for_fits_its_nodes(name: str) -> None:
    assert unfit(view_of(DEPLOY / f"{name}.yaml"), meant_for(name)) == []


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_label_resource_or_size_is_found(name: str) -> None:
    whole, recipes = view_of(DEPLOY / f"{name}.yaml"), meant_for(name)

    def said(**changes: Any) -> str:
        nodes = [replace(n, **changes) if n.labels[ROLE_LABEL] == "trainer" else n for n in whole.nodes]
        return "\n".join(unfit(replace(whole, nodes=tuple(nodes)), recipes))

    (trainer,) = [n.resources for n in whole.nodes if n.labels[ROLE_LABEL] == "trainer"]
    assert not said()
    assert "label {'didr-role': 'trainr'}" in said(labels={ROLE_LABEL: "trainr"})
    assert "trainer on a reward node" in said(labels={ROLE_LABEL: "reward"})
    assert "no recipe uses tpu" in said(resources={**trainer, "tpu": 8})
    assert "has the role trainer and nothing of it" in said(resources={k: trainer[k] for k in ("CPU", "GPU")})
    assert "sdxl_8gpu: " in said(resources={**trainer, "GPU": 4}) and "sdxl_1gpu" not in said(
        resources={**trainer, "GPU": 4}
    )


@pytest.mark.parametrize("name", ["rayjob", "job"])
def test_its_job_is_a_command_of_ours_that_a_retry_goes_on_with(name: str) -> None:
    tree = read(name)
    words = shlex.split(tree.get("entrypoint") or tree["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "pipelines.align"]
    group: Any = typer.main.get_command(app)
    said = group.commands["align"].make_context("align", words[3:]).params
    storage, _, recipe = said["recipe"].rpartition("/")
    assert recipe == SHARED.name and said["output"] == f"{storage}/runs" and said["resume"] == "auto"
    assert configs.load(SHARED).name in meant_for(name)


def test_the_recipe_on_shared_storage_has_no_path_of_a_working_folder() -> None:
    """Whatever of the recipe names files, beside names of ours: a job's working folder has none of them."""
    ours, there = (configs.load(given).model_dump(mode="json") for given in ("sdxl_8gpu", SHARED))
    paths = [text for text in _strings(ours) if text.startswith(("models/", "prompts/"))]
    moved = [text for text in _strings(there) if "/mnt/didr/" in text]
    assert len(paths) == 8 and moved == [f"/mnt/didr/{text}" for text in paths]
    assert [text for text in _strings(there) if text not in moved] == [
        text for text in _strings(ours) if text not in paths
    ]


def _strings(tree: Any) -> Iterator[str]:
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from [value] if isinstance(value, str) else _strings(value)


@pytest.mark.parametrize("name", KUBERAY)
def test_what_the_operator_would_refuse(name: str) -> None:
    """Rules of KubeRay 1.7's validation.go that a schema does not hold."""
    tree = read(name)
    cluster = tree["spec"].get("rayClusterSpec", tree["spec"])
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", tree["metadata"]["name"])
    assert cluster["rayVersion"] == LOCK["ray"], "a token needs the version to be named"
    assert not {"num-cpus", "num-gpus", "memory", "resources"} & cluster["headGroupSpec"]["rayStartParams"].keys() or (
        "resources" not in cluster["headGroupSpec"]
    )
    for group in cluster["workerGroupSpecs"]:
        assert not group["rayStartParams"], "resources and labels have fields of their own"
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits
        assert (group["resources"]["CPU"], group["resources"]["GPU"]) == (limits["cpu"], limits["nvidia.com/gpu"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and "restartPolicy" not in pod
        mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_jobs_do_not_last_for_ever() -> None:
    spec = read("rayjob")["spec"]
    assert (
        spec["submissionMode"] == "SidecarMode" and "submitterPodTemplate" not in spec and "clusterSelector" not in spec
    )
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] and spec["activeDeadlineSeconds"]
    assert spec["backoffLimit"] and read("job")["max_retries"] and read("job")["timeout_s"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


@pytest.mark.parametrize("name", LAUNCHER)
def test_nodes_install_from_the_lock_and_show_the_token(name: str) -> None:
    """As cluster.yaml does, command by command."""
    ours, aws = read(name), yaml.safe_load((ROOT / "cluster.yaml").read_text())
    installs = [line for line in aws["setup_commands"] if "pip install" in line or "auth_token" in line]
    assert len(installs) == 3 and set(installs) <= set(ours["setup_commands"])
    assert ours["file_mounts"] == aws["file_mounts"]
    for role in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in ours[f"{role}_start_ray_commands"][-1]


def steps() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def installs(text: str) -> list[list[str]]:
    """What `pip install` is called with."""
    return [shlex.split(call) for call in re.findall(r"pip install (.+?)(?: &&|$)", text, re.MULTILINE)]


def test_the_image_is_ray_s_with_the_environment_of_the_makefile(tmp_path: Path) -> None:
    said = steps()
    assert said[0] == ("FROM", f"rayproject/ray:{LOCK['ray']}-py311-cpu")
    assert [rest for word, rest in said if word == "USER"][-1] == "ray", "not root"
    runs = [rest for word, rest in said if word == "RUN"]
    asked = ["make", "-n", "install", f"VENV={tmp_path}", "TORCH_INDEX_URL=INDEX"]
    made = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    torch, lock, own = installs(made)
    image = installs("\n".join(runs).replace("${TORCH_INDEX_URL:+--index-url $TORCH_INDEX_URL}", "--index-url INDEX"))
    assert torch[-1] == f"torch=={LOCK['torch']}"
    assert image == [[*torch[:-1], "$(grep -m1 '^torch==' requirements.lock)"], lock]
    assert "--no-deps" in own and runs[-1].startswith("make install"), "the project itself"
    copied = {name for word, rest in said if word == "COPY" for name in rest.split()[1:-1]}
    project = {"didr_core", "pipelines", "tune_spaces", "pyproject.toml", "README.md", "LICENSE"}
    assert copied == project | {"Makefile", "requirements.lock"}
