"""Four short trials, to see a whole sweep in minutes: values are too few and trainings too short to learn from."""

from __future__ import annotations

from typing import Any


def space() -> dict[str, Any]:
    """beta in {0.1, 0.4} x K in {1, 2}; 12 steps of 12 samples, with the assistant's head start cut short."""
    return {
        "drp.beta": {"grid": [0.1, 0.4]},
        "drp.steps": {"grid": [1, 2]},
        "drp.estimator": "ode",
        "train.steps": 12,
        "train.batch": 12,
        "train.assistant_warmup": 2,
        "train.checkpoint_every": 4,
        "evaluation.prompts": 64,
        "evaluation.teacher_steps": 10,
    }
