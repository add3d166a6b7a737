"""Distances between two sets of pictures, on features of any extractor: pure numpy, float64, and blocks where pairs are many.

``real [N, D]`` and ``made [M, D]`` are features, one row a picture; which extractor, and how many pictures, belongs beside every number.

| function | source | what it is |
|---|---|---|
| :func:`fid` | arXiv 1706.08500 | Fréchet distance of two Gaussians; biased upwards where pictures are few |
| :func:`kid` | arXiv 1801.01401 | unbiased squared MMD, cubic kernel; may be a little below 0 |
| :func:`cmmd` | arXiv 2401.09603 | squared MMD, Gaussian kernel of width 10, times 1,000; features of unit length |
| :func:`neighbours` | arXiv 1904.06991, 2002.09797 | precision, recall; density, coverage |
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 1024
"""Rows of a matrix of pairs that are held at once."""


def fid(real: NDArray[Any], made: NDArray[Any]) -> float:
    """``|m_r - m_m|^2 + tr(A + B - 2 (A B)^1/2)`` with covariances A, B over ``N - 1`` and ``M - 1``.

    ``tr (A B)^1/2`` is the sum of the singular values of ``L_A^T L_B`` where ``A = L_A L_A^T``: no root of a rounding error is taken, so
    equal sets of any rank give 0 to about 1e-12 of the features' variance. Takes ``O((N + M) D^2)``.

    Raises:
        ValueError: fewer than two rows, or other widths.
    """
    means, roots = zip(*map(_moments, _checked(real, made)), strict=True)
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots) - 2 * cross)


def _moments(rows: Array) -> tuple[Array, Array]:
    """Mean ``[D]`` and a root ``R [min(N, D), D]`` of the covariance ``R^T R``."""
    mean = rows.mean(0)
    return mean, np.asarray(np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1), mode="r"))


def kid(real: NDArray[Any], made: NDArray[Any]) -> float:
    """Unbiased squared MMD with ``(x y / D + 1)^3`` over all pairs (the mean that subsets estimate).

    Raises:
        ValueError: fewer than two rows, or other widths.
    """
    real, made = _checked(real, made)
    size = real.shape[1]
    between = _sum(real, made, lambda x, y: (x @ y.T / size + 1) ** 3) / (len(real) * len(made))
    within = 0.0
    for rows in (real, made):
        own = ((np.square(rows).sum(1) / size + 1) ** 3).sum()
        pairs = _sum(rows, rows, lambda x, y: (x @ y.T / size + 1) ** 3)
        within += (pairs - own) / (len(rows) * (len(rows) - 1))
    return float(within - 2 * between)


def cmmd(real: NDArray[Any], made: NDArray[Any], width: float = 10.0) -> float:
    """``1,000 x`` the squared MMD with ``exp(-|x - y|^2 / (2 width^2))``, a row's pair with itself included, as published.

    Features are scaled to unit length first: CLIP's image embeddings are what it is published for.

    Raises:
        ValueError: fewer than two rows, other widths, or a row of zeros.
    """
    real, made = (rows / _lengths(rows)[:, None] for rows in _checked(real, made))

    def mean(a: Array, b: Array) -> float:  # minus 1, or rounding would eat what is left of means near 1
        return _sum(a, b, lambda x, y: np.expm1(-_squares(x, y) / (2 * width**2))) / (len(a) * len(b))

    return float(1000 * (mean(real, real) + mean(made, made) - 2 * mean(real, made)))


def neighbours(real: NDArray[Any], made: NDArray[Any], nearest: int = 5) -> dict[str, float]:
    """``precision, recall, density, coverage``: balls around each row reach to its ``nearest``-th neighbour in its own set.

    Precision: share of made rows in a ball of real ones. Recall: the reverse. Density: real balls that a made row lies in, over
    ``nearest``. Coverage: share of real balls with a made row in them.

    Raises:
        ValueError: fewer than ``nearest + 1`` rows in a set, or other widths.
    """
    real, made = _checked(real, made, nearest + 1)
    reach_real, reach_made = (_reach(rows, nearest) for rows in (real, made))
    inside, held = np.zeros(len(made), int), np.zeros(len(real), bool)
    covered = np.zeros(len(real), bool)
    for first in range(0, len(real), BLOCK):
        part = slice(first, first + BLOCK)
        far = np.sqrt(_squares(real[part], made))
        inside += (far < reach_real[part, None]).sum(0)
        held[part] = (far < reach_made).any(1)
        covered[part] = far.min(1) < reach_real[part]
    return {
        "precision": float((inside > 0).mean()),
        "recall": float(held.mean()),
        "density": float(inside.mean() / nearest),
        "coverage": float(covered.mean()),
    }


def diversity(features: NDArray[Any]) -> Array:
    """``[S, N, D]``, S noise seeds of N prompts, to the mean Euclidean distance of a prompt's pictures to each other ``[N]``.

    Raises:
        ValueError: one seed alone.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"diversity: {len(features)} noise seed(s), expected at least 2")
    pairs = [np.linalg.norm(a - b, axis=-1) for a, b in combinations(features, 2)]
    return np.asarray(np.mean(pairs, 0))


def _reach(rows: Array, nearest: int) -> Array:
    """Distance of each row to its ``nearest``-th neighbour in ``rows``, itself not counted."""
    parts = (np.sqrt(_squares(rows[i : i + BLOCK], rows)) for i in range(0, len(rows), BLOCK))
    return np.concatenate([np.partition(part, nearest, axis=1)[:, nearest] for part in parts])


def _squares(x: Array, y: Array) -> Array:
    """Squared distances ``[len(x), len(y)]``."""
    return np.maximum(np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T, 0.0)


def _sum(x: Array, y: Array, kernel: Any) -> float:
    return float(sum(kernel(x[i : i + BLOCK], y).sum() for i in range(0, len(x), BLOCK)))


def _lengths(rows: Array) -> Array:
    lengths = np.linalg.norm(rows, axis=1)
    if not lengths.all():
        raise ValueError(f"cmmd: row {int(np.argmin(lengths))} of the features is zero and has no direction")
    return lengths


def _checked(real: NDArray[Any], made: NDArray[Any], least: int = 2) -> Iterator[Array]:
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1] or min(len(real), len(made)) < least:
        raise ValueError(
            f"features {list(real.shape)} and {list(made.shape)}: expected [N, D] and [M, D], N and M >= {least}"
        )
    return (np.asarray(rows, np.float64) for rows in (real, made))
