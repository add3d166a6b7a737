"""Measure what the world's parts are worth; every number of ``card.md`` and ``quality.json`` comes from here.

``python -m examples.tiny_world.quality generator`` measures one part again and writes it into ``quality.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny

from didr_core.config import WORLD
from didr_core.config.files import replace_text
from didr_core.evaluate.paired import Array, Bootstrap, entropy_bits, interval, won
from didr_core.world.assess import MEASURES as JUDGED
from didr_core.world.assess import POSITION_GROUPS, Assessment, assess
from didr_core.world.captions import draw_scenes, parse_caption, sample_facts
from didr_core.world.checker import check, read_pictures
from didr_core.world.scenes import BACKGROUNDS, KINDS, render
from examples.tiny_world.pairs_data import spoil
from examples.tiny_world.prompts import read_shards
from examples.tiny_world.sampling import Parts, decode, sample
from examples.tiny_world.tokenizer import tokens

TEACHER_STEPS = 25
TEACHER_GUIDANCE = 2.0
ACROSS = ("size", "contrast", "win_utility")


def held_out(world: Path, count: int | None = None) -> list[str]:
    """The first ``count`` held-out captions, or all."""
    return read_shards(world / "prompts" / "heldout")[:count]


def free_captions(world: Path, count: int) -> list[str]:
    """Held-out captions that name no background and no relation: what they leave free is measured across seeds."""
    facts = [(caption, parse_caption(caption)) for caption in held_out(world)]
    return [caption for caption, fact in facts if fact.background is None and fact.relation is None][:count]


def statistics(seen: Assessment, resamples: int = 0) -> dict[str, Array]:
    """Statistics ``[R + 1]``: means of the checker's measures (and of ``win``), entropies in bits of what captions leave free.

    ``*_bits`` are over all captions, ``*_bits_within`` inside one caption (Miller-Madow corrected; NaN without repeats).
    """
    names, place = np.unique(seen["caption"], return_inverse=True)
    slot = np.tril(place[:, None] == place, -1).sum(1)  # how many pictures of the same caption stand before this one
    boot = Bootstrap(len(names), resamples=resamples)

    def by_caption(values: np.ndarray, gap: float) -> np.ndarray:
        table = np.full((1, slot.max() + 1, len(names)), gap)  # [1, S, N]
        table[0, slot, place] = values
        return table

    out = {name: boot.means(by_caption(seen[name], np.nan)) for name in (*JUDGED, "win") if name in seen}
    groups = by_caption(seen["position_group"], -1)[0, 0]
    layouts = np.array([*POSITION_GROUPS.values(), 1])[groups]
    for what, group, kinds in (
        ("background", None, np.full(len(names), len(BACKGROUNDS))),
        ("position", groups, layouts),
    ):
        codes = by_caption(seen[f"{what}_code"], -1)
        counts = (codes[0, :, :, None] == np.arange(kinds.max())).sum(0) * 1.0  # [N, kinds]
        bias = ((counts > 0).sum(1) - 1) / (2 * np.log(2) * np.maximum(counts.sum(1), 1))
        bits = np.minimum(entropy_bits(counts) + bias, np.log2(kinds))
        within = np.where(counts.sum(1) > 1, bits, np.nan)
        out |= {f"{what}_bits": boot.entropy(codes, group), f"{what}_bits_within": boot.means(within[None, None])}
    return out


def summary(seen: Assessment) -> dict[str, float]:
    """:func:`statistics` without intervals, strict by kind, and the shares of the backgrounds where captions leave them free."""
    out = {name: float(values[0]) for name, values in statistics(seen).items()}
    out |= {
        f"strict_{kind}": float(seen["strict"][seen["kind"] == kind].mean()) for kind in KINDS if kind in seen["kind"]
    }
    free = seen["background_code"][seen["background_code"] >= 0]
    out |= {f"free_{name}": float((free == code).sum() / max(1, len(free))) for code, name in enumerate(BACKGROUNDS)}
    return out | {"pictures": float(len(seen["caption"]))}


def compare(a: Assessment, b: Assessment, resamples: int = 1000) -> dict[str, dict[str, float]]:
    """:func:`statistics` of two sets of pictures for the same captions in the same order: ``{"a", "b", "difference", "low", "high"}``.

    ``win_utility`` is the share of pictures that a wins, ties half. Intervals: 95 %, over captions (their seeds stay together).
    """
    if not np.array_equal(a["caption"], b["caption"]):
        raise ValueError("compare needs the same captions in the same order on both sides")
    one, two = statistics(a | {"win": won(a["utility"], b["utility"])}, resamples), statistics(b, resamples)
    share = interval(one.pop("win"))
    out = {"win_utility": {"share": share.mean, "low": share.low, "high": share.high}}
    for name, left in one.items():
        gap = interval(left - two[name])
        ends = {"difference": gap.mean, "low": gap.low, "high": gap.high}
        out[name] = {"a": float(left[0]), "b": float(two[name][0]), **ends}
    return out


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Plain floats with four digits; NaN is left out, JSON has none."""
    return {name: round(float(value), 4) for name, value in values.items() if np.isfinite(float(value))}


def measure_checker(world: Path, count: int = 2000) -> dict[str, Any]:
    """How the checker judges the renderer's own pictures, for their captions and for captions with one fact wrong."""
    rng = np.random.default_rng(404)
    facts = [sample_facts(rng, held_out=None) for _ in range(count)]
    pictures = render(draw_scenes(facts, rng))
    started = time.perf_counter()
    readings = read_pictures(pictures)
    right = check(readings, facts)
    spent = time.perf_counter() - started
    wrong = check(readings, [spoil(fact, rng)[0] for fact in facts])
    passed = {f"wrong_{name}": wrong[name].mean() for name in ("strict", "loose")}
    return rounded({"right_strict": right["strict"].mean(), **passed, "ms_per_picture": 1000 * spent / count})


def measure_vae(world: Path, count: int = 1000) -> dict[str, Any]:
    """Strict accuracy of reconstructions, plain and with latent noise; spread of the latents the UNet sees."""
    vae = AutoencoderTiny.from_pretrained(world / "pipeline" / "vae", torch_dtype=torch.float32).eval()
    rng = np.random.default_rng(405)
    facts = [sample_facts(rng, held_out=None) for _ in range(count)]
    pictures = torch.from_numpy(render(draw_scenes(facts, rng)))
    with torch.no_grad():
        latents = vae.encoder(pictures * 2 - 1) * vae.config.scaling_factor
    out: dict[str, Any] = {"latent_std": latents.std(), "latent_mean": latents.mean()}
    for noise in (0.0, 0.1):
        generator = torch.Generator().manual_seed(1)
        back = decode(vae, latents + noise * torch.randn(latents.shape, generator=generator))
        checks = check(read_pictures(back.numpy()), facts)
        out |= {f"strict_noise_{noise}": checks["strict"].mean(), f"loose_noise_{noise}": checks["loose"].mean()}
    return rounded(out)


def measure_reference(
    world: Path, count: int = 1000, steps: int = TEACHER_STEPS, guidance: float = TEACHER_GUIDANCE
) -> dict[str, Any]:
    """The guided teacher on held-out captions."""
    captions = held_out(world, count)
    pictures = sample(Parts.load(world / "pipeline"), captions, seed=1, steps=steps, guidance=guidance)
    return {"steps": steps, "guidance": guidance, **rounded(summary(assess(pictures.numpy(), captions)))}


def measure_generator(world: Path, count: int = 1000) -> dict[str, Any]:
    """One step on held-out captions, and its diversity beside the teacher's (same captions, same noise).

    ``across_seeds``: 20 captions that leave background and place free, 16 seeds each, for both.
    """
    teacher, generator = Parts.load(world / "pipeline"), Parts.load(world / "pipeline", world / "generator")
    captions = held_out(world, count)
    result = assess(sample(generator, captions, seed=1).numpy(), captions)
    free = [caption for caption in free_captions(world, 20) for _ in range(16)]
    one = assess(sample(generator, free, seed=2).numpy(), free)
    many = assess(sample(teacher, free, seed=2, steps=12, guidance=TEACHER_GUIDANCE).numpy(), free)
    across = {name: rounded(row) for name, row in compare(one, many).items() if name in ACROSS or "_bits" in name}
    return {**rounded(summary(result)), "across_seeds": across}


def measure_rewards(world: Path) -> dict[str, Any]:
    """Both rewards on fresh held-out pairs, and on pairs of the one-step generator's own pictures."""
    from examples.tiny_world.train_rewards import load_reward, pair_accuracy, quality, scorer

    vae = AutoencoderTiny.from_pretrained(world / "pipeline" / "vae", torch_dtype=torch.float32).eval()
    generator = Parts.load(world / "pipeline", world / "generator")
    captions = held_out(world, 300)
    pictures = torch.stack([sample(generator, captions, seed=10 + seed) for seed in range(2)], 1)
    utility = torch.stack([torch.from_numpy(assess(pictures[:, k].numpy(), captions)["utility"]) for k in range(2)], 1)
    out = {}
    for name in ("taste", "judge"):
        model, tokenizer = load_reward(name, world)
        ids, mask = tokens(tokenizer, captions)
        with torch.no_grad():
            scores = torch.stack([scorer(model)(pictures[:, k], ids, mask) for k in range(2)], 1)
        report = quality(model, tokenizer, vae, seed=7_777 + len(name))
        facets = rounded(report.pop("facets"))
        pairs = {"generator_pairs": 0.0, "generator_pairs_clear": 0.2}
        report |= {key: pair_accuracy(scores, utility, least) for key, least in pairs.items()}
        out[name] = {**rounded(report), "facets": facets}
    return out


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "checker": measure_checker,
    "vae": measure_vae,
    "reference": measure_reference,
    "generator": measure_generator,
    "rewards": measure_rewards,
}


def read_quality(world: Path = WORLD) -> dict[str, Any]:
    """``world``/quality.json, or {} when it is not there."""
    path = world / "quality.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_quality(world: Path, **sections: Any) -> None:
    """Merge sections into ``world``/quality.json (``seconds`` is merged key by key)."""
    quality = read_quality(world)
    for name, value in sections.items():
        quality[name] = {**quality.get(name, {}), **value} if name == "seconds" else value
    replace_text(world / "quality.json", json.dumps(quality, indent=1, sort_keys=True) + "\n")


def measure(name: str, world: Path = WORLD) -> dict[str, Any]:
    """Measure one part of MEASURES and keep it in quality.json."""
    if name not in MEASURES:
        raise ValueError(f"unknown measurement {name!r}; expected one of {', '.join(MEASURES)}")
    result = MEASURES[name](world)
    write_quality(world, **{name: result})
    return result


def build(folder: Path, world: Path) -> None:
    """Part "quality": measure everything."""
    for name in MEASURES:
        print(name, json.dumps(measure(name, world)), flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or list(MEASURES):
        print(part, json.dumps(measure(part)), flush=True)
