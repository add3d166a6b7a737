"""When alarms ring, and whether they stop a run; what each means is said in :mod:`didr_core.train.alarms`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from didr_core.config.registry import Strict


class Limits(Strict):
    """Thresholds, in the units of the sentences that `didr_core.train.alarms.explain` gives."""

    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="stop: the run ends with a checkpoint where a sign of damage rings"
    )
    baseline_steps: int = Field(3, ge=1, description="first values of a metric that say what is normal")
    smoothing: float = Field(0.8, ge=0, lt=1)
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
    heldout_fall: float = Field(0.3, description="standard deviations of the start within a prompt")
    diversity_fall: float = Field(0.9, description="of the start's diversity over noise seeds")
    free_bits_fall: float = Field(0.25, description="bits of what captions leave free (bundled world)")
    saturation_drift: float = Field(0.15, description="of the mean saturation, either way")
    still_weights: float = Field(0.5, description="share of the generator's weights")
