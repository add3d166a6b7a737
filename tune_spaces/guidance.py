"""How strongly the reference is guided, against beta: both pull pictures away from what the reference alone would draw."""

from __future__ import annotations

from typing import Any


def space() -> dict[str, Any]:
    """Guidance of the reference in [1, 4] x beta log-uniform; estimator and K stay the recipe's."""
    return {
        "guidance.reference": {"uniform": [1.0, 4.0]},
        "drp.beta": {"loguniform": [0.05, 1.0]},
    }
