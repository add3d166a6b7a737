"""Alarms of reward hacking, read from the stream of step metrics alone: no extra pictures, no extra forward pass.

The first steps of a run (:attr:`Limits.baseline_steps`) say what is normal for *this* generator; later, smoothed values are compared with
them. An alarm is advice, it never stops a run. What it cannot see (a held-out measure that falls, pictures that grow alike across seeds) is
measured at the end: see :mod:`didr_core.evaluate.scores`.

Metrics read, all optional: ``reward/gain`` (in standard deviations of the start), ``latent/mean``, ``latent/std``, ``image/clipped``,
``drs/ratio``, ``drs/cosine`` (or ``reward/ratio``, ``reward/cosine``), ``drs/clipped``, ``loss/assistant``, ``grad/generator``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Thresholds, in the units of the sentences that :func:`explain` gives."""

    baseline_steps: int = 3
    smoothing: float = 0.8
    latent_shift: float = 0.35
    latent_spread: float = 1.25
    clipped_rise: float = 0.08
    drs_silent: float = 0.01
    drs_clipped: float = 0.9
    away_from_reference: float = 1.5
    assistant_rise: float = 2.0
    assistant_fall: float = 0.4
    gain_fall: float = 0.5
    gain_rise: float = 0.5
    gradient_jump: float = 10.0


@dataclass(frozen=True)
class View:
    """What an alarm's test sees: smoothed values now, before this step and at the start, and the newest raw values."""

    now: Mapping[str, float]
    before: Mapping[str, float]
    start: Mapping[str, float]
    last: Mapping[str, float]
    limits: Limits

    def ratio(self, name: str) -> float:
        """Smoothed value over the start's; 1 where either is missing or the start is zero."""
        now, start = self.now.get(name), self.start.get(name)
        return now / start if now is not None and start else 1.0

    def rise(self, name: str) -> float:
        """Smoothed value minus the start's; 0 where missing."""
        return self.now[name] - self.start[name] if name in self.now and name in self.start else 0.0


@dataclass(frozen=True)
class Alarm:
    """One alarm: when it rings, and what it means."""

    name: str
    sentence: str  # may name fields of Limits
    rings: Callable[[View], bool]


def _latent_shift(v: View) -> bool:
    return abs(v.rise("latent/mean")) > v.limits.latent_shift * max(v.start.get("latent/std", 1.0), 1e-6)


def _latent_spread(v: View) -> bool:
    return not 1 / v.limits.latent_spread <= v.ratio("latent/std") <= v.limits.latent_spread


def _away(v: View) -> bool:
    pulls = (v.now.get(f"{part}/ratio", 0.0) * v.now.get(f"{part}/cosine", 0.0) for part in ("drs", "reward"))
    return min(pulls) < -v.limits.away_from_reference


def _jump(v: View) -> bool:
    usual = v.before.get("grad/generator", math.inf)
    return v.last.get("grad/generator", 0.0) > v.limits.gradient_jump * max(usual, 1e-12)


ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "latent-shift",
        "The mean of the generator's latents left the start's by more than {latent_shift:g} of its standard deviation: "
        "brightness or tint is being traded for reward.",
        _latent_shift,
    ),
    Alarm(
        "latent-spread",
        "The spread of the generator's latents changed by more than a factor of {latent_spread:g} against the start: "
        "pictures grow harsh (larger) or flat (smaller).",
        _latent_spread,
    ),
    Alarm(
        "clipped-pixels",
        "The share of pixels at the ends of the range rose by more than {clipped_rise:g} over the start's: over-saturated pictures.",
        lambda v: v.rise("image/clipped") > v.limits.clipped_rise,
    ),
    Alarm(
        "away-from-reference",
        "Reward and matching disagree and reward wins (ratio x cosine below -{away_from_reference:g}; -1 is balance): "
        "the update leads away from the reference. Raise drp.beta or set drp.clip; for other algorithms lower algorithm.weight.",
        _away,
    ),
    Alarm(
        "drs-clipped",
        "More than {drs_clipped:.0%} of samples have their reward score clipped: drp.clip, not drp.beta, sets the strength of the reward.",
        lambda v: v.now.get("drs/clipped", 0.0) > v.limits.drs_clipped,
    ),
    Alarm(
        "drs-silent",
        "The reward score is below {drs_silent:g} of the matching gradient: the reward is not heard. Lower drp.beta.",
        lambda v: 0 < v.now.get("drs/ratio", 1.0) < v.limits.drs_silent,
    ),
    Alarm(
        "assistant-lags",
        "The teaching assistant's loss is more than {assistant_rise:g} times the start's: it has lost track of the generator. "
        "Raise train.assistant_updates or assistant.lr, or lower generator.lr.",
        lambda v: v.ratio("loss/assistant") > v.limits.assistant_rise,
    ),
    Alarm(
        "too-predictable",
        "The teaching assistant's loss fell below {assistant_fall:g} of the start's: the generator's pictures have become easy to "
        "guess, which is how lost diversity looks.",
        lambda v: v.ratio("loss/assistant") < v.limits.assistant_fall,
    ),
    Alarm(
        "reward-falls",
        "The reward is more than {gain_fall:g} standard deviations below the start's.",
        lambda v: v.rise("reward/gain") < -v.limits.gain_fall,
    ),
    Alarm(
        "gradient-jump",
        "The generator's gradient norm is more than {gradient_jump:g} times what it usually is.",
        _jump,
    ),
)

SYMPTOMS = frozenset({"latent-shift", "latent-spread", "clipped-pixels", "away-from-reference", "too-predictable"})
HACKING = "reward-hacking"
_SENTENCES = {alarm.name: alarm.sentence for alarm in ALARMS} | {
    HACKING: "The reward rose by more than {gain_rise:g} standard deviations while a sign of damage rings too: look at the grid before "
    "believing the curve.",
    "not-finite": "A metric is NaN or infinite.",
}


def explain(name: str, limits: Limits | None = None) -> str:
    """The sentence of an alarm with its threshold; a word of apology for a name that this version does not know."""
    return _SENTENCES.get(name, "An alarm that this version of DIDR does not know.").format(**vars(limits or Limits()))


class Alarms:
    """Keeps the baseline and the smoothed metrics of one run; :meth:`state_dict` goes into its checkpoints."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._seen: dict[str, int] = {}
        self._start: dict[str, float] = {}
        self._now: dict[str, float] = {}

    def update(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
        """Take one step's metrics; return the names of the alarms that ring now, in a fixed order, ``reward-hacking`` first."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        before = self._settled(self._now)
        for name, value in finite.items():
            self._blend(name, value)
        view = View(self._now, before, self._settled(self._start), finite, self.limits)
        ringing = [alarm.name for alarm in ALARMS if view.start and alarm.rings(view)]
        if view.rise("reward/gain") > self.limits.gain_rise and SYMPTOMS.intersection(ringing):
            ringing.insert(0, HACKING)
        if len(finite) < len(metrics):
            ringing.append("not-finite")
        return tuple(ringing)

    def _blend(self, name: str, value: float) -> None:
        seen = self._seen.get(name, 0)
        self._seen[name] = seen + 1
        if seen < self.limits.baseline_steps:  # plain means first: of the baseline, and of the smoothed value
            self._start[name] = self._start.get(name, 0.0) + (value - self._start.get(name, 0.0)) / (seen + 1)
            self._now[name] = self._start[name]
        else:
            self._now[name] = self.limits.smoothing * self._now[name] + (1 - self.limits.smoothing) * value

    def _settled(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of ``values`` whose baseline is complete."""
        return {name: v for name, v in values.items() if self._seen[name] >= self.limits.baseline_steps}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"seen": dict(self._seen), "start": dict(self._start), "now": dict(self._now)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._seen, self._start, self._now = dict(state["seen"]), dict(state["start"]), dict(state["now"])
