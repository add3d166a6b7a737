"""What a trial is worth: held-out gain over the start against distance to the reference, with intervals; what they are: docs/sweeps.md.

The start's and the reference's pictures are scored once a sweep (:class:`Bench`) and read from files by every trial. No Ray.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from didr_core.config import Config, dump
from didr_core.diffusion import sampling
from didr_core.diffusion.sampling import Sampler
from didr_core.evaluate import fronts
from didr_core.evaluate.contestants import Contestant, one_step_contestant
from didr_core.evaluate.evaluator import Evaluator, Measured
from didr_core.evaluate.finish import heldout
from didr_core.evaluate.paired import Array, Bootstrap, interval
from didr_core.evaluate.scores import Scores, origin
from didr_core.types import DIDRError

NOISE_SEED = 1000  # of the pictures that trials are judged by: not those of the grid
LEAST_PROMPTS = 4
QUICK_PROMPTS = 64  # of a look during training
RESAMPLES = 200
LARGE = 256  # features above which distances are not resampled: each would cost a large eigenvalue problem
WORDS = (
    "score = gain - (distance - the start's distance): held-out reward won over the start, in standard deviations of the start's scores, "
    "minus how much further picture features have moved from the reference's, in standard deviations of the reference's"
)


Worth = dict[str, float | None]
"""A trial's place: ``gain`` and ``distance``, the ends of their 95 % intervals (``gain_low`` ...; None where not resampled), ``score`` and
``start_distance``."""


def check(config: Config) -> None:
    """What a sweep needs to judge its trials.

    Raises:
        DIDRError: no reward at all, or too few held-out prompts.
    """
    if config.reward is None and config.judge is None:
        raise DIDRError("judge: neither judge nor reward is configured, so trials cannot be compared. Name a judge.")
    if config.evaluation.prompts < LEAST_PROMPTS:
        raise DIDRError(
            f"evaluation.prompts={config.evaluation.prompts}: a sweep judges its trials on held-out prompts; "
            f"expected at least {LEAST_PROMPTS}."
        )


class Bench:
    """The evaluator, and what trials are compared with; one a process, kept from trial to trial."""

    def __init__(self, config: Config, shared: Path, device: Any = "cpu") -> None:
        """``config``: what trials share; what it says of evaluation, judge and backbone is the same for all of them."""
        check(config)
        self.config = config
        prompts = heldout(config, config.evaluation.prompts)
        seeds = range(NOISE_SEED, NOISE_SEED + max(2, config.evaluation.seeds))
        self.evaluator = Evaluator.of(config, prompts, seeds, device, features=True)
        self.measure = "judge" if config.judge is not None else "reward"
        tree = dump(config)
        self.key = repr([tree[k] for k in ("backbone", "reward", "judge", "data", "evaluation", "guidance")])
        self.start = self._once("start", shared)
        self.reference = self._once("reference", shared)
        found, drawn = self.start["features"], self.reference["features"]
        spread = float(np.sqrt(drawn.reshape(-1, drawn.shape[-1]).astype(np.float64).var(0).sum()))
        self.unit = max(spread, 1e-9)
        self.own = round(float(_distances(Bootstrap(len(prompts), 1, 0), found, drawn)[0]) / self.unit, 6)

    def _once(self, name: str, shared: Path) -> Measured:
        """Scores of the start or the reference, made by whoever asks first.

        The reference is the guided teacher of `evaluation.teacher_steps`; with 0 steps it is the start itself.
        """
        evaluator, config = self.evaluator, self.config
        steps = config.evaluation.teacher_steps if name == "reference" else 0

        @functools.cache
        def sampler() -> Sampler:
            network = evaluator.backbone.load_network("reference" if steps else "generator").to(evaluator.device)
            if steps:
                return sampling.reference(evaluator.backbone, network, steps, config.guidance.reference)
            return sampling.one_step(evaluator.backbone, network)

        # the network is loaded only if it has to draw: mostly a file has its scores
        contestant = Contestant(name, lambda condition, z: sampler()(condition, z))
        return evaluator.measured(contestant, self.key, shared / "scores")

    def judge(self, network: nn.Module, work: Path, key: str) -> tuple[Worth, Measured]:
        """A trained generator on all held-out prompts. What it measures is kept in ``work``.

        Raises:
            NonFiniteError: a reward is NaN or infinite on its pictures.
        """
        contestant = one_step_contestant("aligned", self.evaluator.backbone, network)
        measured = self.evaluator.measured(contestant, key, work / "scores")
        resamples = RESAMPLES if measured["features"].shape[-1] <= LARGE else 0
        return self._worth(measured, self.start, self.reference, resamples), measured

    def glance(self, network: nn.Module) -> Worth:
        """The same on the first :data:`QUICK_PROMPTS` prompts and one noise, without intervals: to stop poor trials early."""
        few = self.evaluator.first(QUICK_PROMPTS)
        measured = few.measure(one_step_contestant("aligned", few.backbone, network))
        start, reference = (
            {k: v[:, :1, : len(few.prompts)] for k, v in m.items() if v.ndim >= 3} for m in (self.start, self.reference)
        )
        return self._worth(measured, start, reference, 0)

    def _worth(self, aligned: Measured, start: Measured, reference: Measured, resamples: int) -> Worth:
        draws = Bootstrap(aligned["features"].shape[2], 1, resamples)
        spread = max(float(np.std(self.start[self.measure])), 1e-9)
        gain = draws.means(aligned[self.measure] - start[self.measure]) / spread
        distance = _distances(draws, aligned["features"], reference["features"]) / self.unit
        # Drawing captions with replacement adds distance to every resample: what counts is how they spread, not where.
        distance[1:] += distance[0] - (distance[1:].mean() if len(distance) > 1 else 0.0)
        worth: Worth = {"start_distance": self.own}
        for name, values in (("gain", gain), ("distance", distance)):
            found = interval(values).tree()
            worth |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        worth["score"] = round((worth["gain"] or 0.0) - ((worth["distance"] or 0.0) - self.own), 6)
        return worth

    def scores(self, aligned: Measured, command: str) -> Scores:
        """scores.json of a trial: start, aligned and, where there is one, the teacher, paired."""
        steps = self.config.evaluation.teacher_steps
        rows = {"start": self.start, "aligned": aligned} | ({"teacher": self.reference} if steps else {})
        models = {name: {"steps": steps if name == "teacher" else 1} for name in rows}
        arrays = {name: {k: v for k, v in row.items() if k != "features"} for name, row in rows.items()}
        facts = origin(self.config.data.heldout or self.config.data.prompts, [command])
        evaluator = self.evaluator
        return Scores.build(
            models, arrays, evaluator.prompts, evaluator.seeds, facts=facts, world=self.config.evaluation.world
        )


def _distances(draws: Bootstrap, features: NDArray[Any], reference: NDArray[Any]) -> Array:
    squared = fronts.distances(draws, features.astype(np.float64), reference.astype(np.float64))
    return np.sqrt(np.clip(squared, 0.0, None))
