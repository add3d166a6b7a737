"""`tilt_by_drp` on a grid of 12 that holds the defaults of `tiny`: one of its trials is the recipe itself."""

from __future__ import annotations

from typing import Any


def space() -> dict[str, Any]:
    """beta in {0.08, 0.15, 0.3, 0.6} x K in {1, 2, 4}; `ode` at K = 1 is `tweedie`."""
    return {
        "drp.beta": {"grid": [0.08, 0.15, 0.3, 0.6]},
        "drp.steps": {"grid": [1, 2, 4]},
        "drp.estimator": "ode",
    }
