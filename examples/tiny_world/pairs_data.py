"""Preference data for the reward models: several pictures for one caption, each with its known utility.

Rewards will judge generators' output and be climbed by gradients, so only part of the pictures are clean renders. Others are decoder
reconstructions, decoded noisy latents, blurred or blended pictures, over-sized or over-saturated objects, and scenes with one fact wrong;
the analytic checker says what each is worth.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from didr_core.world.assess import utility_of
from didr_core.world.captions import CaptionFacts, draw_scenes, sample_facts, write_caption
from didr_core.world.checker import check, read_pictures
from didr_core.world.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, max_radius, render
from examples.tiny_world.sampling import decode

KINDS_FOR_REWARDS = {"single": 0.2, "count": 0.2, "pair": 0.25, "relation": 0.35}


def spoil(facts: CaptionFacts, rng: np.random.Generator, facet: str | None = None) -> tuple[CaptionFacts, str]:
    """The facts with exactly one thing changed, and which: "count", "colour", "swap", "shape", "relation" or "background"."""
    options = ["colour", "shape"]
    if facts.kind == "count":
        options.append("count")
    if facts.kind == "relation":
        options += ["relation", "relation"]
    if facts.background is not None:
        options.append("background")
    if len(facts.objects) == 2 and all(one != two for one, two in zip(*facts.objects, strict=True)):
        options.append("swap")
    chosen = facet or options[int(rng.integers(len(options)))]
    if chosen not in options:
        raise ValueError(f"facet {chosen!r} cannot be spoiled in {facts}; this caption allows {sorted(set(options))}")

    def other(names: tuple[str, ...], old: str | None) -> str:
        return str(rng.choice([name for name in names if name != old]))

    objects = list(facts.objects)
    which = int(rng.integers(len(objects)))
    if chosen == "colour":
        objects[which] = (other(COLOURS, objects[which][0]), objects[which][1])
    elif chosen == "shape":
        objects[which] = (objects[which][0], other(SHAPES, objects[which][1]))
    elif chosen == "swap":
        objects = [(objects[1][0], objects[0][1]), (objects[0][0], objects[1][1])]
    elif chosen == "count":
        return replace(facts, count=5 - facts.count), chosen
    elif chosen == "relation":
        return replace(facts, relation=other(RELATIONS, facts.relation)), chosen
    else:
        return replace(facts, background=other(BACKGROUNDS, facts.background)), chosen
    changed = replace(facts, objects=tuple(objects))
    if len(objects) == 2 and objects[0] == objects[1]:
        return spoil(facts, rng, facet)
    return changed, chosen


@dataclass
class Groups:
    """N captions with K pictures each: pictures uint8 [N, K, 3, 32, 32], utility float32 [N, K], captions list of N strings."""

    captions: list[str]
    pictures: torch.Tensor
    utility: torch.Tensor


def _facts_shown(facts: CaptionFacts, rng: np.random.Generator) -> CaptionFacts:
    """What a picture for this caption shows: half are right, most others have one fact wrong, few are of another caption."""
    chance = rng.random()
    if chance < 0.5:
        return facts
    if chance < 0.92:
        return spoil(facts, rng)[0]
    return sample_facts(rng, held_out=None)


def imperfect(pictures: torch.Tensor, vae: Any, rng: np.random.Generator) -> torch.Tensor:
    """Degrade pictures [B, 3, 32, 32] in [0, 1], each in its own way; about a quarter stay clean."""
    total = len(pictures)
    way = rng.choice(6, size=total, p=[0.22, 0.22, 0.3, 0.1, 0.08, 0.08])
    out = pictures.clone()
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    rows = torch.from_numpy(np.flatnonzero((way == 1) | (way == 2)))
    if len(rows):
        with torch.no_grad():
            latents = vae.encoder(pictures[rows] * 2 - 1) * vae.config.scaling_factor
            size = torch.from_numpy(np.where(way[rows.numpy()] == 2, rng.uniform(0.05, 0.7, len(rows)), 0.0)).float()
            noise = torch.randn(latents.shape, generator=generator)
            out[rows] = decode(vae, latents + size.view(-1, 1, 1, 1) * noise)
    for row in np.flatnonzero(way == 3):
        width = int(rng.choice([3, 5, 7]))
        picture = F.pad(pictures[row : row + 1], (width // 2,) * 4, mode="replicate")
        out[row] = F.avg_pool2d(picture, width, stride=1)[0]
    rows = torch.from_numpy(np.flatnonzero(way == 4))
    if len(rows):  # blends of two pictures: double exposures, what averaging over modes looks like
        other = pictures[torch.randint(total, (len(rows),), generator=generator)]
        share = torch.rand(len(rows), 1, 1, 1, generator=generator) * 0.8 + 0.1
        out[rows] = share * pictures[rows] + (1 - share) * other
    rows = torch.from_numpy(np.flatnonzero(way == 5))
    if len(rows):
        with torch.no_grad():  # the same in latent space, and past the data's norm
            latents = vae.encoder(pictures[rows] * 2 - 1) * vae.config.scaling_factor
            other = latents[torch.randperm(len(rows), generator=generator)]
            share = torch.rand(len(rows), 1, 1, 1, generator=generator) * 0.5
            gain = 0.6 + 0.9 * torch.rand(len(rows), 1, 1, 1, generator=generator)
            out[rows] = decode(vae, gain * ((1 - share) * latents + share * other))
    grain = (
        torch.from_numpy(np.where(rng.random(total) < 0.3, rng.uniform(0, 0.06, total), 0)).float().view(-1, 1, 1, 1)
    )
    return (out + grain * torch.randn(out.shape, generator=generator)).clamp(0, 1)


def draw_groups(count: int, size: int, vae: Any, seed: int, held_out: bool = False) -> Groups:
    """``count`` captions with ``size`` pictures each, from one seed."""
    rng = np.random.default_rng(seed)
    captions: list[str] = []
    pictures, utilities = [], []
    while len(captions) < count:
        chunk = min(500, count - len(captions))
        facts = [sample_facts(rng, KINDS_FOR_REWARDS, held_out=held_out) for _ in range(chunk)]
        captions += [write_caption(fact, rng) for fact in facts]
        asked = [fact for fact in facts for _ in range(size)]
        scenes = draw_scenes([_facts_shown(fact, rng) for fact in asked], rng)
        odd = rng.random(len(asked)) < 0.15  # sizes and fades outside the renderer's range
        scenes.radius[odd] *= rng.uniform(0.7, 1.3, odd.sum()).astype(np.float32)
        scenes.fade[odd] *= rng.uniform(0.7, 1.35, odd.sum()).astype(np.float32)
        drawn = imperfect(torch.from_numpy(render(scenes)).clamp(0, 1), vae, rng)
        kept = (drawn * 255).round().to(torch.uint8)
        checks = check(read_pictures(kept.numpy().astype(np.float32) / 255), asked)
        pictures.append(kept.view(chunk, size, 3, 32, 32))
        utilities.append(torch.from_numpy(utility_of(checks)).view(chunk, size))
    return Groups(captions, torch.cat(pictures), torch.cat(utilities))


def facet_pairs(facet: str, count: int, seed: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Held-out captions with a better and a worse clean picture [count, 3, 32, 32] in [0, 1] that differ in one facet only.

    ``size`` and ``contrast`` keep the scene and change taste by at least 0.2 of its range; the others compare a right picture with one
    that has exactly that fact wrong, at equal size and fade.
    """
    rng = np.random.default_rng(seed)
    wrong_facets = ("count", "colour", "swap", "shape", "relation", "background")
    drawn: list[tuple[CaptionFacts, CaptionFacts, str]] = []
    while len(drawn) < count:
        fact = sample_facts(rng, held_out=True)
        with contextlib.suppress(ValueError):  # a fact that has no such facet
            changed = spoil(fact, rng, facet)[0] if facet in wrong_facets else fact
            drawn.append((fact, changed, write_caption(fact, rng)))
    right, shown, captions = (list(column) for column in zip(*drawn, strict=True))
    better = draw_scenes(right, rng)
    if facet in wrong_facets:
        worse = draw_scenes(shown, rng)
        alike = (better.objects == 1) == (worse.objects == 1)
        worse.radius = np.where(alike, better.radius, worse.radius)
        worse.fade = better.fade.copy()
        free = np.array([fact.background is None for fact in right])
        worse.background = np.where(free, better.background, worse.background)
        if facet in ("colour", "shape", "background"):  # the layout stays, too
            worse.x, worse.y = better.x.copy(), better.y.copy()
    else:
        worse = copy.deepcopy(better)
        low = rng.uniform(0.0, 0.8, count).astype(np.float32)
        high = (low + rng.uniform(0.2, 1 - low)).astype(np.float32)
        if facet == "size":
            limit = np.array([max_radius(number) for number in better.objects], np.float32)
            better.radius, worse.radius = limit * (0.7 + 0.3 * high), limit * (0.7 + 0.3 * low)
        elif facet == "contrast":
            better.fade, worse.fade = 0.5 + 0.5 * high, 0.5 + 0.5 * low
        else:
            raise ValueError(f"unknown facet {facet!r}; expected size, contrast or one of {wrong_facets}")
    return captions, torch.from_numpy(render(better)), torch.from_numpy(render(worse))


FACET_PAIRS = ("size", "contrast", "colour", "swap", "shape", "count", "relation", "background")
