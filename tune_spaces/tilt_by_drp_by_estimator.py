"""`tilt_by_drp`, and how the Diffused Reward Score is estimated."""

from __future__ import annotations

from typing import Any


def space() -> dict[str, Any]:
    """beta log-uniform x K in {1, 2, 4, 8} x the estimators that take any K and a reward gradient, and for which `drp.snr_gate` is made."""
    return {
        "drp.beta": {"loguniform": [0.05, 1.0]},
        "drp.steps": {"choice": [1, 2, 4, 8]},
        "drp.estimator": {"choice": ["ode", "truncated", "stochastic"]},
    }
