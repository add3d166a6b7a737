"""Alarms: silent on a healthy run, each one rings on its own illness, and a resumed run hears the same."""

from __future__ import annotations

import random

import pytest

from didr_core import config as configs
from didr_core.config.limits import Limits
from didr_core.train.alarms import ALARMS, HACKING, Alarms, explain
from didr_core.types import DIDRError

HEALTHY = {
    "reward/gain": (0.3, 0.2),
    "latent/mean": (0.07, 0.02),
    "latent/std": (0.8, 0.03),
    "image/clipped": (0.03, 0.01),
    "drs/ratio": (0.6, 0.15),
    "drs/cosine": (-0.4, 0.1),
    "drs/clipped": (0.3, 0.1),
    "loss/assistant": (0.2, 0.03),
    "grad/generator": (1.0, 0.3),
}

# What a run with this illness looks like: values reached after 60 steps, from the healthy ones.
ILL = {
    "latent-shift": {"latent/mean": 0.07 + 0.45 * 0.8},
    "latent-spread": {"latent/std": 0.8 * 1.45},
    "clipped-pixels": {"image/clipped": 0.2},
    "away-from-reference": {"drs/ratio": 3.0, "drs/cosine": -0.8},
    "drs-clipped": {"drs/clipped": 0.99},
    "drs-silent": {"drs/ratio": 0.003},
    "assistant-lags": {"loss/assistant": 0.55},
    "too-predictable": {"loss/assistant": 0.05},
    "reward-falls": {"reward/gain": -0.6},
}

# What a look at held-out prompts finds of this illness; the healthy generator, beside it, has moved a little of everything.
LOOKS = {
    "heldout-falls": {"heldout/reward": 0.8, "heldout/judge": -0.4},
    "free-choice-lost": {"heldout/position_bits": 0.01, "heldout/background_bits": -0.51},
    "diversity-falls": {"heldout/diversity": 0.7},
    "saturation-drifts": {"heldout/saturation": -0.2},
    "weights-still": {"adam/below_eps": 0.8},
}
HEALTHY_LOOK = {
    "heldout/reward": 0.3,
    "heldout/judge": 0.2,
    "heldout/utility": 0.1,
    "heldout/diversity": 1.05,
    "heldout/saturation": 0.06,
    "heldout/background_bits": -0.05,
    "heldout/position_bits": 0.0,
    "adam/below_eps": 0.02,
}


def stream(steps: int, ill: dict[str, float] | None = None, seed: int = 0) -> list[dict[str, float]]:
    rng = random.Random(seed)
    rows = []
    for step in range(steps):
        share = max(0.0, min(1.0, (step - 20) / 40))
        row = {}
        for name, (mean, spread) in HEALTHY.items():
            centre = mean + share * ((ill or {}).get(name, mean) - mean)
            row[name] = centre + rng.uniform(-1, 1) * spread * (centre / mean if ill and name in ill else 1)
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_rings_nothing(seed: int) -> None:
    alarms = Alarms()
    assert [alarms.update(row) for row in stream(500, seed=seed)] == [()] * 500


@pytest.mark.parametrize("name", ILL)
def test_each_illness_rings_its_own_alarm(name: str) -> None:
    alarms = Alarms()
    heard = [alarms.update(row) for row in stream(150, ILL[name])]
    assert not any(heard[:20]), "nothing is wrong yet"
    assert name in heard[-1]
    assert set().union(*map(set, heard)) == {name}, "and no other"


def test_the_table_of_illnesses_is_complete() -> None:
    assert {a.name for a in ALARMS} == set(ILL) | set(LOOKS) | {"gradient-jump"}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_rings_until_the_next_one(name: str) -> None:
    alarms, rows = Alarms(), stream(60)
    for step in (10, 20, 40, 50):
        rows[step] |= HEALTHY_LOOK
    rows[30] |= HEALTHY_LOOK | LOOKS[name]
    heard = [alarms.update(row) for row in rows[:35]]
    resumed = Alarms()
    resumed.load_state_dict(alarms.state_dict())
    heard += [resumed.update(row) for row in rows[35:]]
    assert heard == [()] * 30 + [(name,)] * 10 + [()] * 20
    first = Alarms()
    assert name in first.update(HEALTHY_LOOK | LOOKS[name]), "a look is against the start: no baseline is needed"


def test_a_lower_held_out_reward_is_no_hacking_where_the_reward_fell_too() -> None:
    assert Alarms().update({"heldout/reward": -0.5, "heldout/judge": -0.5}) == ()


def test_thresholds_are_the_config_s() -> None:
    config = configs.load("tiny", ["alarms.free_bits_fall=1.5", "alarms.on_alarm=stop"])
    look = {"heldout/background_bits": -1.0}
    assert Alarms().update(look) == ("free-choice-lost",) and Alarms(config.alarms).update(look) == ()
    assert "1.5 bits" in explain("free-choice-lost", config.alarms)
    with pytest.raises(DIDRError, match=r"alarms.on_alarm"):
        configs.load("tiny", ["alarms.on_alarm=ring"])


def test_a_gradient_jump_is_heard_at_its_step_only() -> None:
    alarms, rows = Alarms(), stream(60)
    rows[40]["grad/generator"] = 30.0
    heard = [alarms.update(row) for row in rows]
    assert [i for i, names in enumerate(heard) if "gradient-jump" in names] == [40]


def test_hacking_needs_both_the_reward_and_a_symptom() -> None:
    for ill, expected in (
        ({"reward/gain": 1.5}, False),
        ({"latent/std": 1.2}, False),
        ({"reward/gain": 1.5, "latent/std": 1.2}, True),
    ):
        alarms = Alarms()
        heard = [alarms.update(row) for row in stream(150, ill)]
        assert (HACKING in heard[-1]) == expected
        if expected:
            assert heard[-1][0] == HACKING, "the worst comes first"


def test_reward_falls_back_from_the_start_not_from_zero() -> None:
    """A reward without a baseline (raw scores around 20) has its own zero."""
    alarms = Alarms()
    assert not any(alarms.update({"reward/gain": 20.0}) for _ in range(50))
    for _ in range(100):
        heard = alarms.update({"reward/gain": 19.0})
    assert heard == ("reward-falls",)


def test_absent_and_zero_metrics_ring_nothing() -> None:
    alarms = Alarms()
    assert not any(alarms.update({"loss/assistant": 0.2, "drs/ratio": 0.0}) for _ in range(50))


def test_metrics_that_begin_late_get_their_own_baseline() -> None:
    """The generator may rest while the assistant warms up."""
    alarms = Alarms()
    for _ in range(30):
        alarms.update({"loss/assistant": 0.2})
    assert not any(alarms.update({"loss/assistant": 0.2, "latent/std": 3.0}) for _ in range(30))


def test_non_finite_values_are_told_and_do_not_spoil_the_means() -> None:
    alarms, twin = Alarms(), Alarms()
    for i, row in enumerate(stream(50)):
        twin.update(row)
        heard = alarms.update(row | ({"extra": float("nan")} if i == 30 else {}))
        assert (heard == ("not-finite",)) == (i == 30)
    assert alarms.state_dict() == twin.state_dict()


def test_a_resumed_run_hears_the_same() -> None:
    rows = stream(150, ILL["latent-spread"])
    whole = Alarms()
    expected = [whole.update(row) for row in rows]
    first = Alarms()
    for row in rows[:70]:
        first.update(row)
    second = Alarms()
    second.load_state_dict(first.state_dict())
    assert [second.update(row) for row in rows[70:]] == expected[70:]


def test_every_alarm_has_a_sentence_with_its_threshold() -> None:
    limits = Limits(latent_spread=1.77)
    for alarm in ALARMS:
        assert explain(alarm.name).endswith(".") and "{" not in explain(alarm.name)
    assert "1.77" in explain("latent-spread", limits)
    assert explain(HACKING) and explain("not-finite") and explain("of another version")
