"""Plans on disk: the second one is read and equals the first; what decides a plan makes another; damage and locked doors are no error."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from random_models import sdxl_folder
from small_learner import small_config

from didr_core.config import Config
from didr_core.plan import cache, memory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sdxl_folder(tmp_path / "pipeline")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the recipes that a plan was really made of, in a cache of the test's own."""
    calls: list[str] = []
    make = memory._told

    def told(config: Config) -> dict[str, Any]:
        calls.append(config.name)
        return make(config)

    monkeypatch.setattr(memory, "_told", told)
    monkeypatch.setenv("DIDR_CACHE", str(tmp_path / "cache"))
    return calls


def anew(config: Config) -> memory.Plan:
    """The plan as another process would have it."""
    cache._HERE.clear()
    plan = memory.plan(config)
    assert plan is not None
    return plan


def test_the_second_plan_is_read_and_equals_the_first(folder: Path, made: list[str]) -> None:
    config = small_config(folder)
    first, second = anew(config), anew(config)
    assert len(made) == 1
    assert first == second
    memory_only = TypeAdapter(memory.Plan).validate_python(memory._told(config))
    assert memory_only == second, "a plan must not depend on what was planned before it, or on where storages lie"
    assert [type(v) for v in dataclasses.astuple(second)] == [type(v) for v in dataclasses.astuple(memory_only)]


def test_what_decides_a_plan_makes_another(folder: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(folder)
    before = anew(config)
    anew(small_config(folder, roles={"gradient_checkpointing": True}))
    assert len(made) == 2

    unet = folder / "unet" / "config.json"
    settings = json.loads(unet.read_text())
    state = unet.stat()
    # two layers a block instead of one, in a file of the same size and time
    unet.write_text(json.dumps(settings | {"layers_per_block": settings["layers_per_block"] + 1}))
    os.utime(unet, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert anew(config).total_flops > before.total_flops
    assert len(made) == 3

    version = metadata.version
    monkeypatch.setattr(cache.metadata, "version", lambda name: version(name) + ".1" * (name == "diffusers"))
    anew(config)
    assert len(made) == 4


def test_our_own_source_decides_too(
    folder: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(folder)
    source = tmp_path / "didr_core"
    source.mkdir()
    (source / "__init__.py").touch()
    monkeypatch.setattr(cache.didr_core, "__file__", str(source / "__init__.py"))
    before = cache.key_of(config)
    assert cache.key_of(config) == before
    (source / "learner.py").write_text("1")
    assert cache.key_of(config) != before


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{}", b"abc\n{}", None])
def test_a_damaged_file_is_ignored_and_replaced(
    damage: bytes | None, folder: Path, made: list[str], tmp_path: Path
) -> None:
    config = small_config(folder)
    first = anew(config)
    (file,) = (tmp_path / "cache" / "plans").iterdir()
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1) if damage is None else damage)
    assert anew(config) == first
    assert len(made) == 2
    assert anew(config) == first
    assert len(made) == 2


def test_no_folder_to_write_is_no_error(
    folder: Path, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    config = small_config(folder)
    for home in (tmp_path / "file", ""):
        monkeypatch.setenv("DIDR_CACHE", str(home))
        anew(config)
    assert len(made) == 2
    assert not (tmp_path / "cache").exists()


def test_old_plans_go(folder: Path, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST", 2)
    plans = tmp_path / "cache" / "plans"
    plans.mkdir(parents=True)
    for age in range(3):
        (plans / f"{age}.json").touch()
        os.utime(plans / f"{age}.json", (1000 - age, 1000 - age))
    config = small_config(folder)
    anew(config)
    assert {p.name for p in plans.iterdir()} == {"0.json", f"{cache.key_of(config)}.json"}


def test_plans_of_the_users_own_code_are_not_kept(folder: Path, made: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from didr_core.backbones.sdxl import SDXL\n")
    config = small_config(folder)
    own = config.backbone.model_copy(update={"name": f"{tmp_path / 'own.py'}:SDXL"})
    for _ in range(2):
        anew(config.model_copy(update={"backbone": own}))
    assert len(made) == 2
    assert not (tmp_path / "cache").exists()
