"""The wheel, in an environment of its own and outside of the clone: what it must bring, and folders of the user's with its names."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKED = ["didr_core", "pipelines", "tune_spaces", "pyproject.toml", "README.md", "LICENSE"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
SMALL = ["train.steps=2", "train.assistant_warmup=1", "train.batch=4", "workers.train=1", "tracking.uri=none"]
SMALL += ["evaluation.prompts=4", "evaluation.teacher_steps=0", "evaluation.every=0", "evaluation.grid=2"]
FOUND = """
import didr_core, pipelines, tune_spaces, sys
from didr_core.config import RECIPES
from pipelines.sweeps import space
for module in (didr_core, pipelines, tune_spaces):
    assert module.__file__.startswith(sys.prefix), module.__file__
assert RECIPES.is_relative_to(sys.prefix)
print(*(p.stem for p in RECIPES.glob("*.yaml")), *space.names())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs. What this environment has is seen through a .pth; its own .pth files are not read there."""
    root = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z", *PACKED], cwd=ROOT, capture_output=True, check=True).stdout
    (root / "clone").mkdir()
    subprocess.run(["xargs", "-0", "cp", "--parents", "-t", root / "clone"], cwd=ROOT, input=tracked, check=True)
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", root / "dist", root / "clone"], check=True
    )
    venv.create(root / "env", symlinks=True)
    own = root / "env" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (own / "seen.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = (root / "dist").glob("didr-*.whl")
    subprocess.run([*PIP, "--python", root / "env" / "bin" / "python", "install", "--no-deps", wheel], check=True)
    return root / "env" / "bin"


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([program, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_it_trains_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    sets = [word for item in SMALL for word in ("--set", item)]
    done = run(installed / "didr", "align", "--recipe", "tiny", "--local", "--output", "run", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "model_index.json").is_file() and (tmp_path / "run" / "report.html").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_recipes_and_spaces_are_inside(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "python", "-c", FOUND, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {
        p.stem for p in [*(ROOT / "pipelines" / "recipes").glob("*.yaml"), *(ROOT / "tune_spaces").glob("[!_]*.py")]
    }
    assert set(done.stdout.split()) == expected


def test_a_folder_with_the_name_of_a_package_of_ours_is_named(installed: Path, tmp_path: Path) -> None:
    for name in ("pipelines", "tune_spaces"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("class Reward: pass\n")
    done = run(installed / "python", "-m", "pipelines.align", "--help", cwd=tmp_path)
    assert done.returncode == 0, "without an __init__.py it is no package, and ours is found"
    wrong = run(installed / "didr", "align", "--set", "reward=pipelines.mine:Reward", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "'pipelines' is DIDR's own package, it hides a folder of yours" in wrong.stderr
    (tmp_path / "pipelines" / "__init__.py").touch()
    wrong = run(installed / "didr", "align", cwd=tmp_path)  # with Ray, whose workers look here first
    assert wrong.returncode == 1 and not (tmp_path / "runs").exists()
    assert f"{tmp_path / 'pipelines' / '__init__.py'}: has the name of DIDR's own package 'pipelines'" in wrong.stderr
    assert "--local" in wrong.stderr
