"""Fronts, hypervolumes and the Fréchet distance against cases known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from didr_core.evaluate.fronts import distances, frechet, front, hypervolume, hypervolumes
from didr_core.evaluate.paired import Bootstrap, interval


def test_the_front_keeps_what_nothing_dominates() -> None:
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.5, 1.5], [3.0, 0.5], [2.0, 2.0]])
    assert front(points).tolist() in ([2, 1, 0], [2, 5, 0])


def test_hypervolume_by_hand() -> None:
    """A staircase of 3x1, 2x1 and 1x1; dominated points, points below the corner and doubles add nothing."""
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [5.0, -1.0], [-1.0, 9.0], [2.0, 2.0]])
    assert hypervolume(points, np.zeros(2)) == pytest.approx(6.0)
    assert hypervolume(points, np.array([2.0, 0.0])) == pytest.approx(1.0)
    assert hypervolume(points[4:6], np.zeros(2)) == 0
    gain, fidelity = (points[:3, axis, None] for axis in (0, 1))
    assert hypervolumes(gain, fidelity, np.zeros(2), np.array([3.0, 3.0])).tolist() == pytest.approx([6 / 9])


def test_frechet_of_known_gaussians() -> None:
    zero, one = np.zeros(2), np.eye(2)
    assert frechet(zero, one, zero, one) == pytest.approx(0)
    assert frechet(zero, one, np.array([3.0, 4.0]), one) == pytest.approx(25)
    assert frechet(zero, np.diag([4.0, 9.0]), zero, one) == pytest.approx((2 - 1) ** 2 + (3 - 1) ** 2)
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    assert frechet(zero, turn @ np.diag([4.0, 9.0]) @ turn.T, zero, one) == pytest.approx(5)


def test_resamples_weigh_captions_and_seeds() -> None:
    rng = np.random.default_rng(1)
    draws = Bootstrap(captions=40, trainings=3, resamples=300)
    values = rng.normal(2.0, 1.0, (3, 2, 40))
    values[:, :, 0] = np.nan
    means = draws.means(values)
    assert means[0] == pytest.approx(np.nanmean(values))
    got = interval(means)
    assert got.low < got.mean < got.high
    assert means[1:].std() < 1.0
    assert draws.means(values[:1])[0] == pytest.approx(np.nanmean(values[0]))
    features = rng.normal(size=(3, 2, 40, 4))
    same = distances(draws, features[:1], features[:1])
    assert np.abs(same).max() < 1e-8
    moved = distances(draws, features + 1.0, features[:1])
    assert moved[0] == pytest.approx(4, rel=0.5) and moved.shape == (301,)
