"""pyproject.toml, requirements.lock and the Makefile agree with each other."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert all(line.count("==") == 1 and not set(" @:/;") & set(line) for line in lines), (
        "name==version only: no hosts, no paths"
    )
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_lock_satisfies_every_bound(project: dict[str, Any], pins: dict[str, str]) -> None:
    wanted = (
        project["project"]["dependencies"]
        + project["project"]["optional-dependencies"]["dev"]
        + project["build-system"]["requires"]
    )
    for text in wanted:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{text}: not in requirements.lock"
        assert requirement.specifier.contains(pins[name]), f"{text}: requirements.lock has {pins[name]}"
    assert "didr" not in pins


def test_torch_is_pinned_without_a_build(pins: dict[str, str]) -> None:
    assert pins["torch"].replace(".", "").isdigit(), "torch==X.Y.Z serves CPU and CUDA builds alike"


def test_core_is_the_product_without_ray_and_mlflow(project: dict[str, Any]) -> None:
    core = set(project["dependency-groups"]["core"])
    whole = set(project["project"]["dependencies"])
    assert core < whole
    assert {Requirement(text).name for text in whole - core} == {"ray", "mlflow"}


def test_the_pythons_that_are_named_are_those_that_are_tested(project: dict[str, Any]) -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [c.removeprefix(prefix) for c in project["project"]["classifiers"] if c.startswith(prefix)]
    assert named == ["11", "12", "13"] and project["project"]["requires-python"] == ">=3.11"
    tested = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert tested["jobs"]["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in named]


def test_package_data_is_there(project: dict[str, Any]) -> None:
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert any((ROOT / package).glob(pattern)), f"{package}: nothing matches {pattern}"


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    """`make install` with a Python that says it is 3.9."""
    old = tmp_path / "python3"
    trick = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{trick}" "$2"\n')
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "check-python", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is Python 3.9; DIDR needs 3.11 or newer" in done.stderr
    done = subprocess.run([*command[:-2], f"PYTHON={sys.executable}", command[-1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
