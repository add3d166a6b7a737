"""The paired bootstrap against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from didr_core.evaluate.paired import Bootstrap, interval, won


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, (1, 1, 900))
    got = interval(Bootstrap(900).means(values))
    half = 1.96 * values.std() / 30
    assert got.mean == pytest.approx(values.mean())
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.1)


def test_coverage_is_near_95_percent() -> None:
    rng, boot = np.random.default_rng(1), Bootstrap(120, resamples=400)
    found = [interval(boot.means(rng.normal(0.0, 1.0, (1, 2, 120)))) for _ in range(400)]
    inside = np.mean([v.low <= 0 <= v.high for v in found])
    assert 0.91 <= inside <= 0.98


def test_pictures_of_one_caption_are_no_independent_evidence() -> None:
    """Ten copies of every picture must not make the interval narrower."""
    values = np.random.default_rng(2).normal(0.0, 1.0, (1, 1, 200))
    one, ten = interval(Bootstrap(200).means(values)), interval(Bootstrap(200).means(np.repeat(values, 10, 1)))
    assert ten.low == pytest.approx(one.low) and ten.high == pytest.approx(one.high)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(0.0, 5.0, (1, 1, 300))  # captions differ far more than models do
    a, b = hard + 0.2 + rng.normal(0, 0.1, hard.shape), hard + rng.normal(0, 0.1, hard.shape)
    got = interval(Bootstrap(300).means(a - b))
    assert 0.15 < got.low < 0.2 < got.high < 0.25


def test_wins_count_ties_as_halves_and_skip_unknowns() -> None:
    a = np.array([[[1.0, 2.0, 3.0, np.nan, 5.0]]])
    b = np.array([[[0.0, 2.0, 4.0, 0.0, np.nan]]])
    assert Bootstrap(5).means(won(a, b))[0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert Bootstrap(5).means(won(b, a))[0] == pytest.approx(0.5)


def test_a_difference_between_trainings_widens_the_interval() -> None:
    rng = np.random.default_rng(4)
    same = rng.normal(0.0, 1.0, (3, 1, 500))
    apart = same + np.array([-1.0, 0.0, 1.0])[:, None, None]
    boot = Bootstrap(500, trainings=3)
    narrow, wide = interval(boot.means(same)), interval(boot.means(apart))
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_entropy_of_known_shares() -> None:
    boot = Bootstrap(400)
    uniform = np.arange(400).reshape(1, 1, 400) % 4
    assert boot.entropy(uniform)[0] == pytest.approx(2.0)
    assert boot.entropy(np.zeros((1, 1, 400), dtype=int))[0] == 0.0
    half_unknown = np.where(np.arange(400) < 200, uniform, -1)
    assert boot.entropy(half_unknown)[0] == pytest.approx(2.0)


def test_entropy_within_groups_is_not_that_of_the_mixture() -> None:
    """Two groups, each always in its own place: nothing is free, though the mixture has one bit."""
    groups = np.arange(100) % 2
    codes = groups.reshape(1, 1, 100)
    boot = Bootstrap(100)
    assert boot.entropy(codes)[0] == pytest.approx(1.0)
    assert boot.entropy(codes, groups)[0] == 0.0


def test_entropy_difference_is_paired() -> None:
    rng = np.random.default_rng(5)
    free = rng.integers(0, 4, (1, 2, 300))
    collapsed = np.where(rng.random((1, 2, 300)) < 0.8, 0, free)
    boot = Bootstrap(300)
    same, lost = (interval(boot.entropy(codes) - boot.entropy(free)) for codes in (free, collapsed))
    assert (same.low, same.mean, same.high) == (0, 0, 0)
    assert lost.high < -0.5


def test_nothing_measured_is_undefined_and_wrong_shapes_are_refused() -> None:
    boot = Bootstrap(3)
    assert interval(boot.means(np.full((1, 1, 3), np.nan))).tree() == {"mean": None, "low": None, "high": None}
    assert interval(boot.entropy(np.full((1, 1, 3), -1))).tree()["mean"] is None
    with pytest.raises(ValueError, match=r"expected values \[1, S, 3\], got \[1, 1, 4\]"):
        interval(boot.means(np.zeros((1, 1, 4))))
