"""Distances of features against the field's packages (golden_metrics.json, made by make_golden_metrics.py) and against known answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_features import SETS, sets

from didr_core.evaluate import features
from didr_core.evaluate.fronts import frechet

GOLDEN = json.loads((Path(__file__).parent / "golden_metrics.json").read_text())["values"]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [37, 1024])
def test_the_field_s_packages_say_the_same(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK", block)
    real, made = sets(name)
    few = min(len(real), len(made))
    found = {
        "fid": features.fid(real, made),
        "kid of the first": features.kid(real[:few], made[:few]),
        "cmmd": features.cmmd(real, made),
        **features.neighbours(real, made),
    }
    assert found == pytest.approx(GOLDEN[name], rel=1e-6, abs=1e-12)


def test_fid_of_equal_sets_is_zero_at_inception_s_width() -> None:
    """2,048 features of large mean and spread, rows in another order; with fewer pictures than features too."""
    rng = np.random.default_rng(0)
    rows = (50 + 20 * rng.normal(size=(2100, 2048))).astype(np.float32)
    for count in (700, 2100):
        assert abs(features.fid(rows[:count], rng.permutation(rows[:count]))) < 1e-5


def test_fid_is_the_formula_of_moments() -> None:
    real, made = sets("wide")
    moments = [(rows.mean(0), np.cov(rows.T)) for rows in (real, made)]
    assert features.fid(real, made) == pytest.approx(frechet(*moments[0], *moments[1]), rel=1e-9)


def test_kid_is_unbiased_for_sets_of_two_sizes() -> None:
    rng = np.random.default_rng(0)
    found = [features.kid(rng.normal(size=(30, 5)), rng.normal(size=(50, 5))) for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) and min(found) < 0


def test_cmmd_of_equal_sets_is_zero_and_of_opposite_ones_known() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 16)) * 100
    assert features.cmmd(rows, 3 * rows[::-1]) == pytest.approx(0, abs=1e-10), "length does not count"
    up = np.array([[0.0, 1.0], [0.0, 2.0]])
    assert features.cmmd(up, -up) == pytest.approx(1000 * 2 * (1 - np.exp(-4 / 200)), rel=1e-12)


def test_neighbours_of_equal_and_of_distant_sets() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 3))
    same = features.neighbours(rows, rows, nearest=2)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert set(features.neighbours(rows, rows + 100).values()) == {0.0}


def test_diversity_over_seeds() -> None:
    pictures = np.array([[[0.0, 0.0], [1.0, 1.0]], [[3.0, 4.0], [1.0, 1.0]], [[0.0, 4.0], [1.0, 1.0]]])  # [S, N, D]
    assert features.diversity(pictures) == pytest.approx([(5 + 4 + 3) / 3, 0])
    with pytest.raises(ValueError, match="expected at least 2"):
        features.diversity(pictures[:1])


def test_shapes_that_cannot_be_compared() -> None:
    rows = np.ones((4, 3))
    for call in (features.fid, features.kid, features.cmmd):
        with pytest.raises(ValueError, match="expected"):
            call(rows, np.ones((4, 2)))
        with pytest.raises(ValueError, match="N and M >= 2"):
            call(rows[:1], rows)
    with pytest.raises(ValueError, match="N and M >= 6"):
        features.neighbours(rows, rows)
    with pytest.raises(ValueError, match="row 3 of the features is zero"):
        features.cmmd(rows, rows * np.array([1, 1, 1, 0])[:, None])
