"""The truth that `benchmarks.histograms` measures against: weights, their effective size, and distances of known laws."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import histograms


def test_distance_of_a_shift_is_the_shift_and_weights_count_as_copies() -> None:
    a = np.random.default_rng(0).normal(size=200)
    even = np.ones(200)
    assert histograms.distance(a, even, a + 0.7, even) == pytest.approx(0.7)
    assert histograms.distance(a, even, a, even) == pytest.approx(0.0, abs=1e-12)
    twice = histograms.distance(np.array([0.0, 1.0]), np.array([2.0, 1.0]), np.array([0.0, 0.0, 1.0]), np.ones(3))
    assert twice == pytest.approx(0.0, abs=1e-12)


def test_weighted_samples_follow_the_tilted_gaussian() -> None:
    """N(0, 1) tilted by exp(x / beta) is N(1 / beta, 1), and its effective sample size is S exp(-1 / beta^2)."""
    rng = np.random.default_rng(1)
    rewards, beta = rng.normal(size=(4000, 8)), 1.25
    weights = histograms.tilt(rewards, beta)
    assert weights.sum(0) == pytest.approx(np.ones(8))
    law = rng.normal(1 / beta, 1, size=20_000)
    assert histograms.distance(rewards.ravel(), weights.ravel(), law, np.ones(law.size)) < 0.05
    assert histograms.effective_size(weights) == pytest.approx(4000 * np.exp(-1 / beta**2), rel=0.2)


def test_compare_tells_the_tilted_law_from_the_plain_one() -> None:
    rng = np.random.default_rng(2)
    reference = dict.fromkeys(histograms.QUANTITIES, rng.normal(size=(512, 6)))
    weights = histograms.tilt(reference["reward"], 1.0)
    tilted = histograms.compare(
        dict.fromkeys(histograms.QUANTITIES, rng.normal(1.0, 1, size=(512, 6))), reference, weights
    )
    plain = histograms.compare(dict.fromkeys(histograms.QUANTITIES, rng.normal(size=(512, 6))), reference, weights)
    assert tilted["utility"] < 0.15 < 0.8 < plain["utility"]
    assert histograms.floor(reference, 1.0, 1.0)["size"] < 0.3


def test_estimators_are_named_as_in_the_exactness_benchmark() -> None:
    assert "drp.estimator=hybrid" in histograms.overrides("default")
    assert histograms.overrides("importance:3:5")[1:3] == ["drp.steps=3", "drp.particles=5"]
