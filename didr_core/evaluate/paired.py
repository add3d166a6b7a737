"""Paired bootstrap over captions and training seeds: means, differences, win rates and entropies with 95 % intervals.

Every model is measured on the same captions and noises, so a comparison is made caption by caption. Values are ``[T, S, N]``:
T training seeds of a model (1 where a model was trained once), S noise seeds, N captions; NaN marks what a caption does not ask for.
One set of resampled captions serves all statistics and all models. Captions are drawn with replacement, all pictures of a caption
together (they are no independent evidence), and, where T > 1, training seeds are drawn with replacement as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float

    def tree(self) -> dict[str, float | None]:
        """JSON values, six significant digits; None where undefined."""
        return {k: None if not np.isfinite(v) else float(f"{v:.6g}") for k, v in vars(self).items()}


class Bootstrap:
    """Resamples of ``captions`` captions and ``trainings`` training seeds; seeded, so that a table can be made again exactly."""

    def __init__(self, captions: int, trainings: int = 1, resamples: int = 2000, seed: int = 0) -> None:
        if captions < 1 or trainings < 1 or resamples < 2:
            raise ValueError(
                f"captions={captions}, trainings={trainings}, resamples={resamples}: expected >= 1, >= 1, >= 2"
            )
        rng = np.random.default_rng(seed)
        shape = (captions, trainings, resamples)
        self.captions, self.trainings, self.resamples = shape
        self._over_captions = rng.multinomial(captions, np.full(captions, 1 / captions), resamples).astype(
            np.float64
        )  # [R, N]
        self._over_trainings = rng.multinomial(trainings, np.full(trainings, 1 / trainings), resamples).astype(
            np.float64
        )  # [R, T]

    def means(self, values: Mapping[str, Array]) -> dict[str, Interval]:
        """Mean over everything that is not NaN, of each ``[T, S, N]``; many at once cost little more than one."""
        if not values:
            return {}
        checked = [self._checked(value) for value in values.values()]
        known = [np.isfinite(value) for value in checked]
        totals = np.stack([np.where(k, v, 0.0).sum(1) for k, v in zip(known, checked, strict=True)], 1)  # [T, M, N]
        counts = np.stack([k.sum(1).astype(np.float64) for k in known], 1)
        drawn, number = self._draw(totals), self._draw(counts)  # [R, M]
        with np.errstate(invalid="ignore"):
            point, drawn = totals.sum((0, 2)) / counts.sum((0, 2)), drawn / number
        return {name: _interval(float(point[m]), drawn[:, m]) for m, name in enumerate(values)}

    def mean(self, values: Array) -> Interval:
        """:meth:`means` of one."""
        return self.means({"": values})[""]

    def difference(self, a: Array, b: Array) -> Interval:
        """Mean of ``a - b``, paired."""
        return self.mean(self._checked(a) - self._checked(b))

    def wins(self, a: Array, b: Array) -> Interval:
        """Share of pairs in which ``a > b``; a tie is half a win."""
        return self.mean(won(self._checked(a), self._checked(b)))

    def entropy(self, codes: NDArray[np.int64], groups: NDArray[np.int64] | None = None) -> Interval:
        """Entropy in bits of a category over all pictures, averaged over groups of captions by their number of pictures.

        ``codes [T, S, N]`` int, negative = not counted; ``groups [N]`` int says which captions share one distribution.
        """
        return self._entropies(codes, groups)[0]

    def entropy_difference(
        self, a: NDArray[np.int64], b: NDArray[np.int64], groups: NDArray[np.int64] | None = None
    ) -> Interval:
        """Entropy of ``a`` minus entropy of ``b``, on the same resamples."""
        (first, drawn_a), (second, drawn_b) = self._entropies(a, groups), self._entropies(b, groups)
        return _interval(first.mean - second.mean, drawn_a - drawn_b)

    def _entropies(self, codes: NDArray[np.int64], groups: NDArray[np.int64] | None) -> tuple[Interval, Array]:
        codes = np.asarray(codes)
        groups = np.zeros(self.captions, dtype=np.int64) if groups is None else np.asarray(groups)
        if not (codes >= 0).any():
            return Interval(np.nan, np.nan, np.nan), np.full(self.resamples, np.nan)
        kinds, of_group = int(codes.max()) + 1, np.unique(groups, return_inverse=True)[1]
        number = int(of_group.max()) + 1
        cells = [((codes == kind) & (of_group == group)).sum(1) for group in range(number) for kind in range(kinds)]
        counts = np.stack(cells, 1).astype(np.float64)  # [T, groups * kinds, N]
        sampled = _bits(self._draw(counts).reshape(-1, number, kinds))
        return _interval(float(_bits(counts.sum((0, 2)).reshape(1, number, kinds))[0]), sampled), sampled

    def _draw(self, sums: Array) -> Array:
        """``[T, M, N]`` sums per caption to ``[R, M]`` resampled sums."""
        trainings, measures, captions = sums.shape
        by_training = (self._over_captions @ sums.reshape(-1, captions).T).reshape(-1, trainings, measures)
        return np.einsum("rtm,rt->rm", by_training, self._over_trainings)

    def _checked(self, values: Array) -> Array:
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 3 or values.shape[0] != self.trainings or values.shape[2] != self.captions:
            raise ValueError(f"expected values [{self.trainings}, S, {self.captions}], got {list(values.shape)}")
        return values


def won(a: Array, b: Array) -> Array:
    """1 where ``a > b``, a half where they tie, 0 elsewhere; NaN where either is."""
    return np.where(np.isfinite(a - b), (a > b) + 0.5 * (a == b), np.nan)


def _bits(counts: Array) -> Array:
    """``[R, groups, kinds]`` counts to entropies ``[R]`` in bits, averaged over groups by their size."""
    size = counts.sum(2, keepdims=True)
    share = np.divide(counts, size, out=np.zeros_like(counts), where=size > 0)
    entropy = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(2)
    return (entropy * size[..., 0]).sum(1) / np.maximum(size.sum((1, 2)), 1e-12)


def _interval(mean: float, drawn: Array) -> Interval:
    low, high = np.nanpercentile(drawn, (2.5, 97.5)) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Interval(mean, float(low), float(high))
