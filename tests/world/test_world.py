"""The tiny world without its weights: captions, renderer, checker, utility, comparisons, prompts."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from didr_core.config import WORLD
from didr_core.world.assess import assess, utility
from didr_core.world.captions import (
    HELD_OUT_COMBINATIONS,
    CaptionFacts,
    draw_scenes,
    is_held_out,
    parse_caption,
    roles,
    sample_facts,
    write_caption,
)
from didr_core.world.checker import check, read_pictures
from didr_core.world.scenes import CELL_RADIUS, SINGLE_RADIUS, render
from examples.tiny_world.networks import MAX_TOKENS
from examples.tiny_world.pairs_data import spoil
from examples.tiny_world.prompts import read_shards
from examples.tiny_world.quality import compare, summary
from examples.tiny_world.tokenizer import make_tokenizer, token_ids


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(1)
    facts = [sample_facts(rng, held_out=None) for _ in range(1000)]
    scenes = draw_scenes(facts, rng)
    return facts, scenes, render(scenes), rng


def test_captions_round_trip(drawn):
    facts, _, _, rng = drawn
    for fact in facts:
        for _ in range(3):
            text = write_caption(fact, rng)
            assert parse_caption(text) == fact, text


@pytest.mark.parametrize(
    "text", ["", "a red dog", "two red circle", "a red circle above", "four red circles", "a pink circle"]
)
def test_unparseable_captions_say_so(text):
    with pytest.raises(ValueError, match="grammar"):
        parse_caption(text)


def test_no_caption_is_truncated(drawn):
    facts, _, _, rng = drawn
    tokenizer = make_tokenizer()
    ids = token_ids(tokenizer, [write_caption(fact, rng) for fact in facts])
    assert ids.shape == (len(facts), MAX_TOKENS)
    assert tokenizer.eos_token_id != 2
    assert (ids == tokenizer.eos_token_id).any(1).all()
    unknown = tokenizer("zebra!").input_ids
    assert len(unknown) > 4 and tokenizer.decode(unknown, skip_special_tokens=True).replace(" ", "") == "zebra!"


def test_checker_judges_own_pictures_right_and_wrong_captions_wrong(drawn):
    facts, _, pictures, rng = drawn
    readings = read_pictures(pictures)
    assert check(readings, facts)["strict"].mean() >= 0.97
    changed = [spoil(fact, rng) for fact in facts]
    wrong = check(readings, [fact for fact, _ in changed])
    assert wrong["strict"].mean() <= 0.002
    for facet in ("count", "colour", "shape", "relation", "background"):
        rows = [row for row, (_, spoiled) in enumerate(changed) if spoiled == facet]
        assert rows and wrong[facet][rows].mean() <= 0.01, facet


def test_checker_measures_size_contrast_and_place(drawn):
    facts, scenes, pictures, _ = drawn
    checks = check(read_pictures(pictures), facts)
    limit = np.where(scenes.objects == 1, SINGLE_RADIUS, CELL_RADIUS)
    assert np.abs(checks["size"] - (scenes.radius / limit - 0.7) / 0.3).mean() < 0.03
    assert np.abs(checks["contrast"] - (scenes.fade - 0.5) / 0.5).mean() < 0.02


def test_checker_is_not_fooled_by_noise_and_blanks():
    captions = ["a red circle", "two blue rings"] * 8
    noise = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
    assert assess(noise, captions)["strict"].sum() == 0
    assert assess(np.full((16, 3, 32, 32), 0.96, np.float32), captions)["strict"].sum() == 0


def test_assess_refuses_broken_input():
    with pytest.raises(ValueError, match="NaN"):
        assess(np.full((1, 3, 32, 32), np.nan), ["a red circle"])
    with pytest.raises(ValueError, match="32"):
        assess(np.zeros((1, 3, 64, 64)), ["a red circle"])
    with pytest.raises(ValueError, match="caption"):
        assess(np.zeros((2, 3, 32, 32)), ["a red circle"])


def test_a_wrong_picture_always_loses_and_taste_orders_right_ones(drawn):
    facts, scenes, _, rng = drawn
    captions = [write_caption(fact, rng) for fact in facts]
    faint = copy.deepcopy(scenes)
    faint.fade[:] = 0.5
    faint.radius *= 0.7 / (scenes.radius / np.where(scenes.objects == 1, SINGLE_RADIUS, CELL_RADIUS))
    wrong = draw_scenes([spoil(fact, rng)[0] for fact in facts], rng)
    wrong.fade[:] = 1.0
    right = utility(render(faint), captions)
    assert right.min() > utility(render(wrong), captions).max() + 0.5
    for name, value in (("fade", scenes.fade), ("radius", scenes.radius)):
        better, worse = copy.deepcopy(faint), copy.deepcopy(faint)
        setattr(better, name, getattr(faint, name) * 1.2)
        assert (utility(render(better), captions) > utility(render(worse), captions)).mean() > 0.99, (name, value)


def test_summary_and_compare(drawn):
    facts, scenes, pictures, rng = drawn
    captions = [write_caption(fact, rng) for fact in facts]
    bold = copy.deepcopy(scenes)
    bold.fade = 0.75 + 0.5 * (scenes.fade - 0.5)
    free = np.array([fact.background is None for fact in facts])
    bold.background = np.where(free, 0, scenes.background)
    a, b = assess(render(bold), captions), assess(pictures, captions)
    assert summary(b)["background_bits"] == pytest.approx(2, abs=0.02)
    assert summary(a)["background_bits"] == pytest.approx(0, abs=1e-6)
    assert summary(b)["position_bits"] > 1.7
    result = compare(a, b, resamples=200)
    assert result["win_utility"]["share"] > 0.95 and result["win_utility"]["low"] > 0.9
    assert result["background_bits"]["high"] < -1.8
    assert result["contrast"]["low"] > 0.2 and result["size"]["low"] <= 0 <= result["size"]["high"]
    same = compare(b, b, resamples=50)
    assert same["win_utility"] == {"share": 0.5, "low": 0.5, "high": 0.5}
    with pytest.raises(ValueError, match="same captions"):
        compare(a, {name: value[::-1] for name, value in b.items()})


def test_entropy_within_captions_sees_collapse_that_the_marginal_hides():
    rng = np.random.default_rng(3)
    facts = [CaptionFacts("single", ((colour, "circle"),), 1) for colour in ("red", "green", "blue", "yellow")]
    asked = [fact for fact in facts for _ in range(32)]
    captions = [write_caption(fact, np.random.default_rng(0)) for fact in asked]
    scenes = draw_scenes(asked, rng)
    collapsed = copy.deepcopy(scenes)
    collapsed.background = np.repeat(np.arange(4), 32)  # one background for each caption
    wide, narrow = summary(assess(render(scenes), captions)), summary(assess(render(collapsed), captions))
    assert wide["background_bits_within"] > 1.8 and narrow["background_bits"] > 1.9
    assert narrow["background_bits_within"] == pytest.approx(0, abs=1e-6)


def test_bundled_prompts_are_disjoint_and_hold_combinations_out():
    train, held_out = read_shards(WORLD / "prompts" / "train"), read_shards(WORLD / "prompts" / "heldout")
    assert len(train) >= 4000 and len(held_out) >= 1500
    assert len(set(train)) == len(train) and not set(train) & set(held_out)
    train_facts, held_facts = [parse_caption(text) for text in train], [parse_caption(text) for text in held_out]
    assert not {fact.key() for fact in train_facts} & {fact.key() for fact in held_facts}
    assert not any(is_held_out(fact) for fact in train_facts)
    assert not any(roles(fact) & HELD_OUT_COMBINATIONS for fact in train_facts)
    assert sum(bool(roles(fact) & HELD_OUT_COMBINATIONS) for fact in held_facts) > 100


def test_held_out_rule_sees_through_wording():
    fact = CaptionFacts("relation", (("blue", "ring"), ("red", "circle")), 1, "below", None)
    assert is_held_out(fact)  # the red circle is above
    turned = replace(fact, objects=fact.objects[::-1], relation="above")
    assert turned.key() == fact.key()
