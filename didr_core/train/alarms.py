"""Alarms of reward hacking, read from the stream of step metrics alone.

The first steps of a run (:attr:`Limits.baseline_steps`) say what is normal for *this* generator; later, smoothed values are compared with
them. What a step's own samples cannot show (held-out rewards, pictures that grow alike over seeds, what captions leave free) is measured
every `evaluation.every` steps by :mod:`didr_core.evaluate.watch`: these metrics are differences from the start on the same noise, taken
as they are, and an alarm rings on until the next look. An alarm is advice unless `alarms.on_alarm` is "stop".

Metrics read, all optional: ``reward/gain`` (in standard deviations of the start), ``latent/mean``, ``latent/std``, ``image/clipped``,
``drs/ratio``, ``drs/cosine`` (or ``reward/ratio``, ``reward/cosine``), ``drs/clipped``, ``loss/assistant``, ``grad/generator``;
``heldout/...``, ``adam/below_eps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from didr_core.config.limits import Limits

LOOKED = ("heldout/", "adam/")
"""How the names of metrics begin that are measured every `evaluation.every` steps."""


@dataclass(frozen=True)
class View:
    """What an alarm's test sees: smoothed values now, before this step and at the start, the newest raw values, the last look's."""

    now: Mapping[str, float]
    before: Mapping[str, float]
    start: Mapping[str, float]
    last: Mapping[str, float]
    looked: Mapping[str, float]
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
    looks: bool = False  # reads a look, which needs no baseline


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


def _heldout_falls(v: View) -> bool:
    held_out = min(v.looked.get(f"heldout/{name}", 0.0) for name in ("judge", "utility"))
    return held_out < -v.limits.heldout_fall and v.looked.get("heldout/reward", 0.0) > 0


def _free_bits_fall(v: View) -> bool:
    return min((x for name, x in v.looked.items() if name.endswith("_bits")), default=0.0) < -v.limits.free_bits_fall


ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "heldout-falls",
        "The reward of held-out prompts rose, and a measure that is never trained on fell by more than {heldout_fall:g} of the start's "
        "standard deviations: the reward is gained where it is blind.",
        _heldout_falls,
        looks=True,
    ),
    Alarm(
        "free-choice-lost",
        "What captions leave free (backgrounds, positions) lost more than {free_bits_fall:g} bits against the start: the generator draws "
        "one answer for all.",
        _free_bits_fall,
        looks=True,
    ),
    Alarm(
        "diversity-falls",
        "A prompt's pictures differ over noise seeds by less than {diversity_fall:g} of what they did at the start: they grow alike.",
        lambda v: v.looked.get("heldout/diversity", 1.0) < v.limits.diversity_fall,
        looks=True,
    ),
    Alarm(
        "saturation-drifts",
        "The mean saturation of pictures moved by more than {saturation_drift:g}: colour is being traded for reward.",
        lambda v: abs(v.looked.get("heldout/saturation", 0.0)) > v.limits.saturation_drift,
        looks=True,
    ),
    Alarm(
        "weights-still",
        "Of more than {still_weights:.0%} of the generator's weights the root of Adam's second moment is below eps, which then divides "
        "the update: they hardly move. Lower generator.eps.",
        lambda v: v.looked.get("adam/below_eps", 0.0) > v.limits.still_weights,
        looks=True,
    ),
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

SYMPTOMS = frozenset(
    {"latent-shift", "latent-spread", "clipped-pixels", "away-from-reference", "too-predictable", "heldout-falls"}
    | {"free-choice-lost", "diversity-falls", "saturation-drifts"}
)
HACKING, NOT_FINITE = "reward-hacking", "not-finite"
DAMAGE = SYMPTOMS | {HACKING}
"""What stops a run where `alarms.on_alarm` says so."""
SENTENCES = {alarm.name: alarm.sentence for alarm in ALARMS} | {
    HACKING: "The reward rose by more than {gain_rise:g} standard deviations while a sign of damage rings too: look at the grid before "
    "believing the curve.",
    NOT_FINITE: "A metric is NaN or infinite.",
}
NAMES = tuple(SENTENCES)


def explain(name: str, limits: Limits | None = None) -> str:
    """The sentence of an alarm with its threshold; a word of apology for a name that this version does not know."""
    return SENTENCES.get(name, "An alarm that this version of DIDR does not know.").format(**vars(limits or Limits()))


class Alarms:
    """Keeps the baseline and the smoothed metrics of one run; :meth:`state_dict` goes into its checkpoints."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._seen: dict[str, int] = {}
        self._start: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._looked: dict[str, float] = {}

    def update(self, metrics: Mapping[str, float]) -> tuple[str, ...]:
        """Take one step's metrics; return the names of the alarms that ring now, in a fixed order, ``reward-hacking`` first."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        before = self._settled(self._now)
        for name, value in finite.items():
            if name.startswith(LOOKED):
                self._looked[name] = value
            else:
                self._blend(name, value)
        view = View(self._now, before, self._settled(self._start), finite, self._looked, self.limits)
        ringing = [alarm.name for alarm in ALARMS if (view.looked if alarm.looks else view.start) and alarm.rings(view)]
        if view.rise("reward/gain") > self.limits.gain_rise and SYMPTOMS.intersection(ringing):
            ringing.insert(0, HACKING)
        if len(finite) < len(metrics):
            ringing.append(NOT_FINITE)
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
        return {
            "seen": dict(self._seen),
            "start": dict(self._start),
            "now": dict(self._now),
            "looked": dict(self._looked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._seen, self._start, self._now = dict(state["seen"]), dict(state["start"]), dict(state["now"])
        self._looked = dict(state.get("looked", {}))  # checkpoints before 0.4 have none
