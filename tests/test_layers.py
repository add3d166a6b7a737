"""The house rules, read from the tree: who may import whom, how long files and packages may be, and that each README's map is true."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("didr_core", "pipelines", "tune_spaces")
AROUND = ("tests", "benchmarks", "examples")

# From the ground up. A package imports from its own and from lower lines, never from its own line's others and never upwards.
# `__main__` modules put the parts together: they may import anything, and nothing imports them.
ORDER = (
    ("didr_core.types",),
    ("didr_core.config",),
    ("didr_core.diffusion",),
    ("didr_core.drs", "didr_core.networks"),
    ("didr_core.algorithms", "didr_core.backbones", "didr_core.rewards", "didr_core.world"),
    ("didr_core.data",),
    ("didr_core.train",),
    ("didr_core.export",),
    ("didr_core.evaluate",),
    ("didr_core.plan",),
    ("pipelines.report", "pipelines.tracking"),
    ("pipelines.cluster",),
    ("pipelines.sweeps",),
    ("pipelines.align", "pipelines.sweep", "pipelines.evaluate"),
    ("pipelines.cli",),
)
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
FORBIDDEN = {  # beside the order
    "didr_core": {"ray", "mlflow", "pipelines", "tune_spaces", "benchmarks", "examples"},
    "pipelines": {"tune_spaces", "benchmarks", "examples"},  # spaces are found by name
    "tune_spaces": {"didr_core", "pipelines"},  # spaces are plain data
}
# 15,978 lines when the rooms were made; evaluation, storage at addresses, submission and elastic groups are what came since.
MAX_LINES, MAX_MODULES, MAX_PRODUCT, MAX_EXAMPLES = 400, 14, 24_300, 2_000


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the file, also inside functions and under TYPE_CHECKING, but not of its entry block."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    tree.body = [node for node in tree.body if not _is_entry(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from didr_core.train import learner` imports a module
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if is_module(inner) else base


def _is_entry(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def room(module: str) -> str:
    """The entry of ORDER that a module belongs to; empty for what stands outside (a package's root)."""
    return ".".join(module.split(".")[:2]) if ".".join(module.split(".")[:2]) in FLOOR else ""


def violations(path: Path) -> list[str]:
    """Every import of ``path`` that goes the wrong way."""
    module, out = module_of(path), []
    here, entry = room(module), path.name == "__main__.py"
    for line, name in imports(path):
        there, why = room(name), ""
        if name.partition(".")[0] in FORBIDDEN.get(module.partition(".")[0], ()):
            why = f"{module.partition('.')[0]} stands without it"
        elif name.endswith(".__main__"):
            why = "nothing imports an entry point"
        elif entry or not there or there == here:
            continue
        elif not here:
            why = "a package's root imports none of its rooms"
        elif FLOOR[there] == FLOOR[here]:
            why = "neighbours never import each other"
        elif FLOOR[there] > FLOOR[here]:
            why = "imports run downwards"
        if why:
            out.append(f"{path.relative_to(ROOT)}:{line}: imports {name}: {why}")
    return out


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    paths = sources(package)
    assert paths, f"no sources in {package}"
    found = sorted({v for path in paths for v in violations(path)})
    assert not found, "\n".join(found)


def test_every_room_has_its_floor() -> None:
    """A new package or module at a root must be given its place in ORDER."""
    rooms = {
        f"{top}.{p.name.removesuffix('.py')}" for top in PACKAGES[:2] for p in (ROOT / top).iterdir() if _is_code(p)
    }
    assert rooms == set(FLOOR)


def _is_code(path: Path) -> bool:
    return path.name != "__init__.py" and (path.suffix == ".py" or (path / "__init__.py").is_file())


def test_no_module_imports_itself_round_a_corner() -> None:
    modules = {module_of(p): p for package in (*PACKAGES, "benchmarks", "examples") for p in sources(package)}
    graph = {name: {to for _, to in imports(path) if to in modules and to != name} for name, path in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_evaluation_imports_no_training_loss() -> None:
    """Nor the learner, the loop or an estimator, by whatever way: only the end of a run (`finish.py`) holds what it trained."""
    modules = {module_of(p): p for package in PACKAGES for p in sources(package)}
    reached = {"pipelines.evaluate", *(m for m in modules if m.startswith("didr_core.evaluate."))}
    reached -= {"didr_core.evaluate.finish"}
    todo = set(reached)
    while todo:
        todo = {to for name in todo for _, to in imports(modules[name]) if to in modules} - reached
        reached |= todo
    trains = ("didr_core.algorithms", "didr_core.drs", "didr_core.train.learner", "didr_core.train.loop")
    assert len(reached) > 30 and not {name for name in reached if name.startswith(trains)}


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        ("didr_core/train/learner.py", "import ray", "stands without"),
        ("didr_core/export/card.py", "def f():\n    import mlflow", "stands without"),
        ("didr_core/train/loop.py", "from pipelines.cluster import session", "stands without"),
        ("didr_core/algorithms/didr.py", "from didr_core.rewards import clip_score", "neighbours"),
        ("didr_core/algorithms/didr.py", "from ..backbones import sdxl", "neighbours"),
        ("didr_core/drs/hybrid.py", "from didr_core.train import learner", "downwards"),
        ("didr_core/types.py", "from didr_core import config", "downwards"),
        ("didr_core/train/learner.py", "if True:\n    from didr_core.evaluate import scores", "downwards"),
        ("pipelines/cluster/session.py", "from pipelines import align", "downwards"),
        ("didr_core/train/loop.py", "from didr_core.train import __main__", "entry point"),
        ("didr_core/__init__.py", "from didr_core import config", "root"),
        ("tune_spaces/grid.py", "from didr_core.config import load", "stands without"),
    ],
)
def test_the_rules_catch(file: str, line: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader itself is tested on files that break each rule."""
    for name in FLOOR:
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    for name in ("didr_core/__init__.py", "didr_core/train/__main__.py", "didr_core/train/learner.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert [v for v in violations(path) if why in v]
    path.write_text("import torch\n\nif __name__ == '__main__':\n    import pipelines.cli\n")
    assert not violations(path)


def test_files_and_packages_stay_readable() -> None:
    lines = {p: len(p.read_text().splitlines()) for folder in (*PACKAGES, *AROUND) for p in sources(folder)}
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lines.items() if n > MAX_LINES]
    assert not long, f"over {MAX_LINES} lines:\n" + "\n".join(long)
    packages = {p.parent for folder in PACKAGES for p in sources(folder)}
    crowded = {str(d.relative_to(ROOT)): n for d in packages if (n := len(_modules(d))) > MAX_MODULES}
    assert not crowded, f"over {MAX_MODULES} modules: {crowded}"
    assert sum(n for p, n in lines.items() if p.relative_to(ROOT).parts[0] in PACKAGES) <= MAX_PRODUCT
    assert sum(lines[p] for p in sources("examples") if "tests" not in p.parts) <= MAX_EXAMPLES
    assert {p.name for p in (ROOT / "didr_core").iterdir() if p.is_file()} == {
        "__init__.py",
        "README.md",
        "py.typed",
        "types.py",
    }


def _modules(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("*.py") if p.name != "__init__.py"}


def _is_map_of(folder: Path) -> set[str]:
    """File and folder names in the first column of the tables of a README."""
    rows = re.findall(r"^\|([^|]*)\|", (folder / "README.md").read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w.]+?)/?`", row)}


@pytest.mark.parametrize(
    "folder",
    sorted({str(p.parent.relative_to(ROOT)) for top in PACKAGES[:2] for p in sources(top)} | {"examples/tiny_world"}),
)
def test_a_readme_is_the_map_of_its_package(folder: str) -> None:
    """Every module (a component by its key) and sub-package stands in a table's first column, and every .py named there exists."""
    there = ROOT / folder
    assert (there / "README.md").is_file(), f"{folder} has no README.md"
    named = _is_map_of(there)
    inside = _modules(there) | {d.name for d in there.iterdir() if (d / "__init__.py").is_file()}
    missing = {name for name in inside if not {name, name.removesuffix(".py")} & named}
    assert not missing, f"{folder}/README.md does not name {sorted(missing)}"
    gone = {n for n in named if n.endswith(".py") and not (there / n).is_file()}
    assert not gone, f"{folder}/README.md names {sorted(gone)}, which do not exist"


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


def test_what_passes_through_ray_s_helpers_imports_no_torch() -> None:
    """A stream and a function by name are unpickled by four processes of Ray's, one after the other, before training starts."""
    handed_on = "pipelines.cluster.prompts, pipelines.cluster.remote, didr_core.train.run_folder"
    check = f"import sys, {handed_on}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
