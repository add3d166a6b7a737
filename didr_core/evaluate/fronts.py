"""Two measures at once: Pareto fronts, hypervolume, a Fréchet distance, and all of them on the resamples of a :class:`Bootstrap`.

Shape legend: ``P`` points (a method at one reward weight), ``T`` training seeds, ``S`` noise seeds, ``N`` captions, ``D`` features,
``R`` resamples. All points share the draws, so comparisons are paired.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from didr_core.evaluate.paired import Array, Bootstrap


def distances(boot: Bootstrap, features: Array, reference: Array) -> Array:
    """:func:`frechet` of ``features [T, S, N, D]`` and ``reference [1, S, N, D]`` on each resample, captions paired: ``[R + 1]``."""
    out = []
    for captions, trainings in zip(boot.captions, boot.trainings, strict=True):
        seeds = trainings if len(features) > 1 else np.ones(1)
        moments = []
        for rows, weight in ((features, seeds), (reference, np.ones(1))):
            share = np.broadcast_to(weight[:, None, None] * captions, rows.shape[:3]).reshape(-1)
            moments.append(_moments(rows.reshape(-1, rows.shape[-1]), share))
        out.append(frechet(*moments[0], *moments[1]))
    return np.array(out)


def _moments(rows: Array, share: Array) -> tuple[Array, Array]:
    """Weighted mean ``[D]`` and covariance ``[D, D]`` of ``[M, D]``."""
    share = share / share.sum()
    mean = share @ rows
    centred = rows - mean
    return mean, (centred * share[:, None]).T @ centred


def frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """``|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``: squared Fréchet distance of two Gaussians (FID's formula)."""
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def front(points: Array) -> NDArray[np.int64]:
    """Indices of the points ``[P, 2]`` (larger is better on both axes) that none dominates, by falling first coordinate."""
    order = np.lexsort((-points[:, 1], -points[:, 0]))
    best = np.maximum.accumulate([-np.inf, *points[order, 1]])
    return order[points[order, 1] > best[:-1]]


def hypervolume(points: Array, worst: Array) -> float:
    """Area that the points ``[P, 2]`` (larger is better) dominate above ``worst [2]``; points not above it on both axes add nothing."""
    x, y = np.maximum(points[front(points)] - worst, 0.0).T
    return float((x * np.diff(y, prepend=0.0)).sum())


def hypervolumes(gain: Array, fidelity: Array, worst: Array, best: Array) -> Array:
    """Hypervolume ``[R + 1]`` of one method's points, gains and fidelities ``[P, R + 1]``, as a share of the box ``worst`` to ``best [2]``.

    The box is fixed over resamples and methods, so that volumes compare; a resample may leave it, and then counts beyond 1.
    """
    points = (np.stack([gain, fidelity], -1) - worst) / np.maximum(best - worst, 1e-12)  # [P, R + 1, 2]
    return np.array([hypervolume(points[:, r], np.zeros(2)) for r in range(points.shape[1])])
