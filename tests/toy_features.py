"""Random features of the metrics' golden numbers; read by tests and by evaluate/make_golden_metrics.py, so numpy alone."""

from __future__ import annotations

import numpy as np

SETS = {"wide": (300, 260, 24), "more features than pictures": (40, 40, 64), "far": (200, 150, 8)}


def sets(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features ``[N, D]`` and ``[M, D]``, float64: correlated Gaussians, the second shifted and scaled."""
    n, m, d = SETS[name]
    rng = np.random.default_rng(sorted(SETS).index(name))
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    far = 2.0 if name == "far" else 0.2
    return rng.normal(size=(n, d)) @ mix, 1.1 * rng.normal(size=(m, d)) @ mix + far * rng.normal(size=d)
