"""Search spaces: the bundled ones against the recipes, points, and errors that name the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from didr_core.types import DIDRError
from pipelines.sweeps.space import GRID_POINTS, check, corners, draw, find, names, read, settings, shown


def test_bundled_spaces_are_plain_files_that_need_no_ray() -> None:
    assert names() == ["guidance", "smoke", "tilt_by_drp", "tilt_by_drp_by_estimator", "tilt_grid"]
    for path in (Path(__file__).parents[2] / "tune_spaces").glob("*.py"):
        assert "ray" not in path.read_text().replace("array", "")


@pytest.mark.parametrize("name", names())
def test_every_point_of_a_bundled_space_is_a_valid_tiny_run(name: str) -> None:
    space = find(name)
    points = [*draw(space, "random", 24, seed=1), *draw(space, "grid", None, seed=0), *corners(space)]
    base = check(space, points, "tiny", ["train.steps=7"])
    assert base.train.steps == 7  # --set wins over what the space fixes
    assert space.about and set(points[0]) == set(space.domains)


def test_random_points_spread_each_key_evenly_and_come_again_by_seed() -> None:
    space = find("tilt_by_drp")
    points = draw(space, "random", 12, seed=3)
    assert points == draw(space, "random", 12, seed=3) != draw(space, "random", 12, seed=4)
    assert sorted(p["drp.steps"] for p in points) == [1] * 3 + [2] * 3 + [4] * 3 + [8] * 3
    edges = [0.05 * 20 ** (i / 12) for i in range(13)]
    betas = sorted(p["drp.beta"] for p in points)
    assert all(low * 0.999 <= beta <= high * 1.001 for low, beta, high in zip(edges, betas, edges[1:], strict=False))


def test_a_grid_has_every_combination_once_and_a_part_of_it_is_its_beginning() -> None:
    space = read(
        "mine", {"drp.beta": {"loguniform": [0.1, 0.8]}, "drp.steps": {"grid": [1, 2]}, "drp.estimator": "ode"}
    )
    points = draw(space, "grid", None, seed=0)
    assert len({tuple(p.items()) for p in points}) == 2 * GRID_POINTS
    assert {p["drp.beta"] for p in points} == {0.1, 0.2, 0.4, 0.8}
    assert draw(space, "grid", 3, seed=0) == points[:3]


def test_a_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\ndef space():\n    return {"generator.lr": {"loguniform": [1e-5, 1e-4]}, "drp.beta": 0.3}\n'
    )
    space = find(str(path))
    assert (space.name, space.about, dict(space.fixed)) == ("mine", "Mine.", {"drp.beta": 0.3})
    config = check(space, [{"generator.lr": 1e-05}], "tiny", [])
    assert (config.generator.lr, config.drp.beta) == (1e-5, 0.3)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"drp.beta": 0.3}, "sweeps nothing"),
        ({"drp.beta": {"lognormal": [0.1, 1]}}, "drp.beta: unknown kind 'lognormal'"),
        ({"drp.beta": {"loguniform": [0, 1]}}, "drp.beta: loguniform of [0, 1]; expected [low, high] with 0 < low < high"),
        ({"drp.beta": {"uniform": [1, 1]}}, "with low < high"),
        ({"drp.steps": {"choice": []}}, "drp.steps: choice of []"),
        ({"drp.steps": {"choice": [1, 1]}}, "expected different values"),
        ({"evaluation.prompts": {"choice": [8, 16]}}, "'evaluation.prompts' must not be swept"),
        ({"backbone.generator": {"choice": ["a", "b"]}}, "must not be swept"),
        ([("drp.beta", 1)], "expected a dict of dotted keys, got list"),
        ({"drp.beta": tune.loguniform(0.05, 1.0)}, "is no plain data"),
        ({"drp.beta": tune.loguniform(0.05, 1.0), "drp.steps": {"choice": [1, 2]}}, "drp.beta: <ray.tune"),
        ({"drp.beta": tune.choice([0.1, 1.0])}, "{'choice': [1, 2]}"),
        ({"drp.beta": {"choice": [0.1, lambda: 1.0]}}, "{'loguniform': [0.05, 1.0]}"),
        ({"drp.beta": lambda: 0.1, "drp.steps": {"choice": [1, 2]}}, "drp.beta: <function"),
        ({"drp.beta": tune.grid_search([0.1, 1.0])}, "drp.beta: unknown kind 'grid_search'"),
        ({"drp.beta": tune.grid_search([0.1, 1.0])}, "Did you mean 'grid'?"),
    ],
)  # fmt: skip
def test_a_space_that_is_wrong_says_which_key(tree: Any, said: str) -> None:
    with pytest.raises(DIDRError) as error:
        read("mine", tree)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("tree", "overrides", "said"),
    [
        ({"drp.betta": {"choice": [1.0]}}, [], "unknown key 'drp.betta'"),
        ({"drp.beta": {"uniform": [-1, 1]}}, [], "drp.beta"),
        ({"drp.steps": {"choice": [1, 2]}}, [], "tweedie is one step"),
        ({"drp.beta": {"choice": [0.1, 1.0]}}, ["drp.beta=0.5"], "the space 'mine' sweeps drp.beta"),
        ({"drp.beta": {"choice": [0.1, 1.0]}}, ["train.step=5"], "unknown key 'train.step'"),
    ],
)
def test_points_are_checked_against_the_configuration(tree: Any, overrides: list[str], said: str) -> None:
    space = read("mine", tree)
    with pytest.raises(DIDRError) as error:
        check(space, corners(space), "tiny", overrides)
    assert said in str(error.value)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match="Did you mean 'tilt_by_drp'"):
        find("tilt_by_dpr")
    with pytest.raises(DIDRError, match="no such file"):
        find(str(tmp_path / "absent.py"))
    (tmp_path / "broken.py").write_text("def space(:")
    with pytest.raises(DIDRError, match="cannot be read .SyntaxError"):
        find(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(DIDRError, match=r"no function space\(\)"):
        find(str(tmp_path / "empty.py"))


def test_values_reach_the_configuration_as_they_are() -> None:
    """They are not written as text and read again, which loses some (here a letter beyond 16 bits)."""
    space = read("mine", {"drp.beta": {"choice": [1e-05, 1.0]}, "name": "fox 🦊"})
    config = check(space, corners(space), "tiny", [])
    assert (config.drp.beta, config.name) == (1e-05, "fox 🦊")


def test_settings_and_words() -> None:
    assert settings({"drp.beta": 1e-05, "algorithm": "dmd2"}) == ["drp.beta=1e-05", 'algorithm="dmd2"']
    assert shown({"drp.beta": 0.123456, "drp.steps": 2}) == "beta 0.1235, steps 2"


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (tune.loguniform(0.05, 1.0), "{'loguniform': [0.05, 1.0]}"),
        (tune.qloguniform(0.1, 1.0, 0.1), "{'loguniform': [0.1, 1.0]}"),
        (tune.quniform(0.0, 1.0, 0.1), "{'uniform': [0.0, 1.0]}"),
        (tune.randint(1, 4), "{'choice': [1, 2, 3]}"),
        (tune.choice(["a", "b"]), "{'choice': ['a', 'b']}"),
        (tune.randn(0, 1), "a list of its values, {'choice': [...]}"),
        (tune.sample_from(lambda _: 1), "a list of its values, {'choice': [...]}"),
        (lambda: 1, "a list of its values, {'choice': [...]}"),
        (object(), "a plain value for all trials"),
    ],
)
def test_objects_of_ray_tune_are_answered_with_their_plain_form(value: Any, form: str) -> None:
    with pytest.raises(DIDRError, match=rf"drp.beta: .*(This one is|expected) {re.escape(form)}"):
        read("mine", {"drp.beta": value, "drp.steps": {"choice": [1, 2]}})
