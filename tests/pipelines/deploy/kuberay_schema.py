"""The keys that KubeRay knows, to hold deploy/*.yaml against: the API server drops unknown ones without a word.

`kuberay_1_7.json` is the structure (names and types, no texts) of the custom resource that KubeRay 1.7.0 publishes under Apache-2.0 as
`ray-operator/config/crd/bases/ray.io_rayjobs.yaml`; a `RayCluster`'s spec is its `rayClusterSpec`. Made by

    python -m tests.pipelines.deploy.kuberay_schema ray.io_rayjobs.yaml > tests/pipelines/deploy/kuberay_1_7.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

POD, CONTAINER = "@pod", "@container"
SCALARS = {"string": str, "integer": int, "boolean": bool, "number": int | float, "int or string": int | str}


def known() -> dict[str, Any]:
    """Name of a kind, `@pod` or `@container` to its keys: a mapping of keys, `{"*": type}` for free keys, `[items]`, or a type's name."""
    return json.loads((Path(__file__).parent / "kuberay_1_7.json").read_text())


def faults(tree: Any, keys: Any, shared: dict[str, Any], at: str = "") -> list[str]:
    """What of ``tree`` the schema does not know, by its path."""
    keys = shared[keys] if isinstance(keys, str) and keys.startswith("@") else keys
    if isinstance(keys, str):
        choices = keys.split(" | ")
        right = tree in choices if len(choices) > 1 else keys == "any" or type(tree) in _types(keys)
        return [] if right else [f"{at}: {tree!r} is no {keys}"]
    if type(tree) is not type(keys):
        return [f"{at}: {tree!r} is no {type(keys).__name__}"]
    if isinstance(keys, list):
        return [fault for n, item in enumerate(tree) for fault in faults(item, keys[0], shared, f"{at}[{n}]")]
    found = []
    for name, value in tree.items():
        inner = keys.get(name, keys.get("*"))
        found += [f"{at}.{name}: unknown"] if inner is None else faults(value, inner, shared, f"{at}.{name}")
    return found


def _types(name: str) -> tuple[type, ...]:
    found = SCALARS[name]
    return (found,) if isinstance(found, type) else found.__args__


def trimmed(schema: dict[str, Any]) -> Any:
    """A part of a CRD's OpenAPI schema without its texts."""
    if "properties" in schema:
        return {name: trimmed(value) for name, value in sorted(schema["properties"].items())}
    if schema.get("type") == "array":
        return [trimmed(schema["items"])]
    if "additionalProperties" in schema:
        return {"*": trimmed(schema["additionalProperties"])}
    if schema.get("x-kubernetes-int-or-string"):
        return "int or string"
    return " | ".join(schema["enum"]) if "enum" in schema else schema.get("type", "any")


def _shared(tree: Any, parts: list[tuple[str, Any]]) -> Any:
    """``tree`` with names where it holds one of ``parts``."""
    for name, part in parts:
        if tree == part:
            return name
    if isinstance(tree, dict):
        return {key: _shared(value, parts) for key, value in tree.items()}
    return [_shared(item, parts) for item in tree] if isinstance(tree, list) else tree


def main(path: str) -> None:
    """Print the trimmed schema of the file."""
    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    (v1,) = [version for version in versions if version["name"] == "v1"]
    job = trimmed(v1["schema"]["openAPIV3Schema"])["spec"]
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]
    container = pod["spec"]["containers"][0]
    cluster = _shared(job["rayClusterSpec"], [(POD, pod), (CONTAINER, container)])
    job = {**_shared(job, [(POD, pod), (CONTAINER, container)]), "rayClusterSpec": "@RayCluster"}
    tree = {"@RayCluster": cluster, "@RayJob": job, POD: _shared(pod, [(CONTAINER, container)]), CONTAINER: container}
    print("{" + ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in tree.items()) + "}")


if __name__ == "__main__":
    main(sys.argv[1])
