"""Paired bootstrap over captions and training seeds: means, win rates, entropies, with 95 % intervals.

Every model is measured on the same captions and noises, so a comparison is made caption by caption. Values are ``[T, S, N]``:
T training seeds of a model (1 where a model was trained once: it serves every training), S noise seeds, N captions; NaN marks what a
caption does not ask for. One set of resampled captions serves all statistics and all models. Captions are drawn with replacement, all
pictures of a caption together (they are no independent evidence), and, where T > 1, training seeds as well.

A statistic is an array ``[R + 1]``: the sample's own value, then its value on R resamples. Statistics are subtracted, scaled and rooted as
arrays, and :func:`interval` makes of one what is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        return {k: float(f"{v:.6g}") if np.isfinite(v) else None for k, v in vars(self).items()}


def interval(values: Array) -> Interval:
    """``values [R + 1]``: the sample's own, then resamples; NaN ends where nothing was resampled or defined."""
    known = np.isfinite(values[1:]).any()
    low, high = np.nanpercentile(values[1:], (2.5, 97.5)) if known else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


class Bootstrap:
    """How often each caption ``[R + 1, N]`` and training seed ``[R + 1, T]`` is drawn; row 0 is the sample itself.

    Seeded, so that a table can be made again exactly.
    """

    def __init__(self, captions: int, trainings: int = 1, resamples: int = 2000, seed: int = 0) -> None:
        if captions < 1 or trainings < 1 or resamples < 0:
            raise ValueError(
                f"captions={captions}, trainings={trainings}, resamples={resamples}: expected >= 1, >= 1, >= 0"
            )
        rng = np.random.default_rng(seed)
        self.captions, self.trainings = (
            np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), resamples)]) for n in (captions, trainings)
        )

    def means(self, values: NDArray[Any]) -> Array:
        """Mean ``[R + 1]`` of ``values [T, S, N]`` over everything that is not NaN."""
        values = self._checked(values).astype(np.float64)
        known = np.isfinite(values)
        total, count = self._drawn(np.stack([np.where(known, values, 0.0).sum(1), known.sum(1)]))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total / count)

    def entropy(self, codes: NDArray[np.int64], groups: NDArray[np.int64] | None = None) -> Array:
        """Entropy ``[R + 1]`` in bits of a category over all pictures, averaged over groups of captions by their number of pictures.

        ``codes [T, S, N]`` int, negative = not counted; ``groups [N]`` int says which captions share one distribution.
        """
        codes = self._checked(codes)
        of_group = np.unique(np.zeros(codes.shape[2]) if groups is None else groups, return_inverse=True)[1]
        if not (codes >= 0).any():
            return np.full(len(self.captions), np.nan)
        cells = [
            [((codes == kind) & (of_group == group)).sum(1) for kind in range(int(codes.max()) + 1)]
            for group in range(int(of_group.max()) + 1)
        ]
        counts = self._drawn(np.array(cells, dtype=np.float64))  # [groups, kinds, R + 1]
        size = counts.sum(1)
        return (entropy_bits(counts, 1) * size).sum(0) / np.maximum(size.sum(0), 1e-12)  # type: ignore[no-any-return]

    def _drawn(self, sums: Array) -> Array:
        """Sums per training and caption ``[..., T, N]`` to resampled sums ``[..., R + 1]``."""
        return ((sums @ self.captions.T) * self.trainings.T).sum(-2)  # type: ignore[no-any-return]

    def _checked(self, values: NDArray[Any]) -> NDArray[Any]:
        trainings, captions = self.trainings.shape[1], self.captions.shape[1]
        values = np.asarray(values)
        if values.ndim != 3 or values.shape[0] not in (1, trainings) or values.shape[2] != captions:
            raise ValueError(f"expected values [{trainings}, S, {captions}], got {list(values.shape)}")
        return np.broadcast_to(values, (trainings, *values.shape[1:]))


def won(a: Array, b: Array) -> Array:
    """1 where ``a > b``, a half where they tie, 0 elsewhere; NaN where either is."""
    return np.where(np.isfinite(a - b), (a > b) + 0.5 * (a == b), np.nan)


def entropy_bits(counts: Array, axis: int = -1) -> Array:
    """Entropy in bits of counts along ``axis``; 0 where there are none."""
    size = counts.sum(axis, keepdims=True)
    share = np.divide(counts, size, out=np.zeros_like(counts), where=size > 0)
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis)  # type: ignore[no-any-return]
