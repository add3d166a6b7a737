"""The house rules of the README of each folder, read from the imports: who may import whom, and how long a file may be.

tune_spaces, pipelines -> didr_core's learner, export, metrics, ... -> algorithms | backbones | rewards -> drp, losses, ... -> contracts
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("didr_core", "pipelines", "tune_spaces")
SIBLINGS = ("algorithms", "backbones", "rewards", "zoo")
MAX_LINES = 400

# The bottom of didr_core: what a module here may import from didr_core. Modules that are not listed are above the components and may
# import anything of didr_core; `registry` finds components by name, at run time, and so belongs to the bottom.
FOUNDATION = {
    "contracts",
    "registry",
    "components",
    "config",
    "schedule",
    "drp",
    "hybrid",
    "proxy",
    "losses",
    "roles",
    "sharding",
}
DIST = {"ray", "mlflow"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in the file, also inside functions and under TYPE_CHECKING."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            for alias in node.names:  # `from didr_core import learner` imports a module as well
                yield node.lineno, f"{base}.{alias.name}"


def violations(path: Path, text: str | None = None) -> list[str]:
    """Every import of `path` that goes the wrong way."""
    module = module_of(path)
    top, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    out = []
    for line, name in imports(path):
        into, _, inner = name.partition(".")
        target = inner.partition(".")[0]
        why = ""
        if top == "didr_core" and into in DIST | {"pipelines", "tune_spaces"}:
            why = "didr_core is pure PyTorch"
        elif top == "pipelines" and into == "tune_spaces":
            why = "spaces are found by name"
        elif top == "didr_core" and into == "didr_core" and target:
            exists = (ROOT / "didr_core" / target).is_dir() or (ROOT / "didr_core" / f"{target}.py").is_file()
            if not exists:
                continue
            if part in SIBLINGS and target in SIBLINGS and part != target and part != "zoo":
                why = "siblings never import each other"
            elif part in SIBLINGS[:3] and target == "learner":
                why = "components do not know who drives them"
            elif part in FOUNDATION and target not in FOUNDATION:
                why = "the foundation imports nothing above it"
            elif part == "contracts":
                why = "contracts import nothing of ours"
        if why:
            out.append(f"{path.relative_to(ROOT)}:{line}: imports {name}: {why}")
    return out


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    assert sources(package), f"no sources in {package}"
    found = sorted({v for path in sources(package) for v in violations(path)})
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("didr_core/train/learner.py", "import ray"),
        ("didr_core/train/learner.py", "from ray.data import Dataset"),
        ("didr_core/export/folder.py", "def f():\n    import mlflow"),
        ("didr_core/train/checkpoint.py", "from pipelines.cluster.session import ray_session"),
        ("didr_core/algorithms/didr.py", "from didr_core.rewards import clip_score"),
        ("didr_core/algorithms/didr.py", "from ..backbones import sdxl"),
        ("didr_core/rewards/pickscore.py", "from didr_core import backbones"),
        ("didr_core/algorithms/losses.py", "from didr_core import learner"),
        ("didr_core/types.py", "from didr_core import config"),
    ],
)
def test_the_rules_catch(file: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader itself is tested on files that break each rule."""
    for folder in SIBLINGS:
        (tmp_path / "didr_core" / folder).mkdir(parents=True)
    for name in ("learner", "config", "contracts"):
        (tmp_path / "didr_core" / f"{name}.py").touch()
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / file
    path.write_text(line)
    assert violations(path)


def test_files_stay_readable() -> None:
    paths = [p for folder in (*PACKAGES, "tests") for p in sources(folder)]
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p in paths if (n := len(p.read_text().splitlines())) > MAX_LINES]
    assert not long, f"over {MAX_LINES} lines:\n" + "\n".join(long)


BLOCKED_IMPORT = '''
import importlib, pkgutil, sys

class Absent:
    """Stands for every finder and finds no ray and no mlflow: `import` fails and find_spec says None, as where they are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in ("ray", "mlflow")
        return None if blocked else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Absent(finder) for finder in sys.meta_path]
for name in ("ray", "mlflow"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could be imported: the test tests nothing")
import didr_core
for module in pkgutil.walk_packages(didr_core.__path__, "didr_core."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
    print(module.name)
assert not {"ray", "mlflow"} & set(sys.modules)
'''


def test_didr_core_imports_with_ray_and_mlflow_absent() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED_IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {module_of(p) for p in sources("didr_core")} - {"didr_core"}
    assert set(done.stdout.split()) == expected
