"""What a run looks like on held-out prompts as it goes on: every `evaluation.every` steps, against the start on the same noise.

The measures are those of :mod:`didr_core.evaluate.evaluator`, told as differences from the start, which is measured once: a hundred prompts
show what the noise of two hundred pictures would hide. :mod:`didr_core.train.alarms` reads them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from didr_core.evaluate.contestants import one_step_contestant
from didr_core.evaluate.evaluator import Evaluator, Measured
from didr_core.evaluate.paired import Bootstrap
from didr_core.evaluate.scores import entropies

SEEDS = (0, 1)
REWARDS = ("reward", "judge", "utility")


class Watch:
    """Measures a run's running average; the start is measured when it is made."""

    def __init__(self, evaluator: Evaluator, start: nn.Module) -> None:
        self.evaluator = evaluator
        self.start = self._measured(start)

    def look(self, network: nn.Module) -> dict[str, float]:
        """``heldout/...`` of ``network``, see :func:`against`."""
        return against(self.start, self._measured(network))

    def _measured(self, network: nn.Module) -> Measured:
        return self.evaluator.measure(one_step_contestant("now", self.evaluator.backbone, network))


def against(start: Measured, now: Measured) -> dict[str, float]:
    """``heldout/...`` by name, of measures ``[1, S, N]`` of the same prompts and noise.

    - ``reward``, ``judge``, ``utility``: difference of the means, in the start's standard deviations within a prompt;
    - ``diversity``: over the start's; ``saturation``: difference;
    - ``<what>_bits``: difference of the entropy of what captions leave free.
    """
    found = {
        name: float((now[name].mean() - start[name].mean()) / max(_within(start[name]), 1e-9))
        for name in REWARDS
        if name in start
    }
    found["diversity"] = float(now["diversity"].mean() / max(float(start["diversity"].mean()), 1e-9))
    found["saturation"] = float(now["saturation"].mean() - start["saturation"].mean())
    boot = Bootstrap(now["diversity"].shape[2], resamples=0)
    before = dict(entropies(boot, start))
    for what, bits in entropies(boot, now):
        if np.isfinite(before[what][0]):  # else no prompt leaves it free
            found[f"{what}_bits"] = float(bits[0]) - float(before[what][0])
    return {f"heldout/{name}": value for name, value in found.items()}


def _within(values: NDArray[Any]) -> float:
    return float(np.sqrt(values.var(1, ddof=1).mean()))
