"""The two values that the paper leaves open: the reward-tilt temperature beta and the number K of DRP steps."""

from __future__ import annotations

from typing import Any


def space() -> dict[str, Any]:
    """beta log-uniform x K in {1, 2, 4, 8}, with the paper's estimator (at K = 1 it is `tweedie`)."""
    return {
        "drp.beta": {"loguniform": [0.05, 1.0]},
        "drp.steps": {"choice": [1, 2, 4, 8]},
        "drp.estimator": "ode",
    }
