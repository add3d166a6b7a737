"""Score models against each other: same held-out prompts, same noise, several judges, paired intervals.

``score_models`` makes the pictures batch by batch and keeps measures only (never the pictures), so that it runs at any resolution:

- ``reward``: the reward that was trained on; ``judge``: the held-out reward, never trained on;
- ``clipped``, ``saturation``, ``latent_mean``, ``latent_std``: the watch against reward hacking, to be read against the start's;
- ``diversity``, ``layout_diversity``: root mean square difference between a prompt's pictures across noise seeds, of pixels and of
  their 8x8 means (two seeds at least);
- with ``world="tiny"`` what the analytic checker measures: utility, strict and loose accuracy, facets, and the entropies of what captions
  leave free.

The result is ``scores.json`` (means, paired differences, win rates, intervals, provenance) and ``scores.npz`` (every measured value, from
which :func:`pool` compares several training seeds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from didr_core.diffusion import sampling
from didr_core.evaluate.picture_cache import LatentCache, fingerprint
from didr_core.evaluate.scoreboard import Scores, commit, pool, provenance, read_scores, table
from didr_core.types import Backbone, Condition, NonFiniteError, Reward

Progress = Callable[[str, int, int], None]
"""``(model, pictures done, pictures to do)``."""


@dataclass(frozen=True)
class Contestant:
    """A way of making pictures. With a ``fingerprint`` its latents are cached on disk: it must change whenever they would."""

    name: str
    sampler: sampling.Sampler
    steps: int = 1
    guidance: float | None = None
    fingerprint: str | None = None


def one_step_contestant(name: str, backbone: Backbone, network: nn.Module) -> Contestant:
    """A one-step generator."""
    return Contestant(name, sampling.one_step(backbone, network))


def teacher_contestant(
    backbone: Backbone,
    network: nn.Module,
    steps: int = 50,
    guidance: float = 4.0,
    extra: str = "",
    name: str = "teacher",
) -> Contestant:
    """The reference with guided DDIM, cached: about ``2 * steps`` times as dear as one step.

    ``extra`` is whatever else the latents depend on (the text encoder's folder, say).
    """
    key = f"{fingerprint(network)}/{type(backbone.schedule).__name__}/{backbone.latent_shape}/{steps}/{guidance:g}/{extra}"
    return Contestant(name, sampling.reference(backbone, network, steps, guidance), steps, guidance, key)


@dataclass
class _Ledger:
    """Values of one model as they come in: ``{measure: [S][chunks] arrays}``."""

    values: dict[str, list[list[NDArray[Any]]]] = field(default_factory=dict)

    def add(self, seed: int, measures: Mapping[str, NDArray[Any]]) -> None:
        for name, value in measures.items():
            rows = self.values.setdefault(name, [])
            while len(rows) <= seed:
                rows.append([])
            rows[seed].append(np.asarray(value))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """``[1, S, N]`` each."""
        return {name: np.stack([np.concatenate(row) for row in rows])[None] for name, rows in self.values.items()}


@torch.no_grad()
def score_models(
    backbone: Backbone,
    contestants: Sequence[Contestant],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    reward: Reward | None = None,
    judge: Reward | None = None,
    world: str = "none",
    batch: int = 64,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
    focus: str = "aligned",
) -> Scores:
    """Make and score every contestant's pictures of every prompt with every noise seed.

    Args:
        backbone: text encoder and decoder loaded.
        contestants: models; comparisons are made for all pairs, ``focus`` (when among them) always named first.
        prompts: N held-out prompts; the noise of a picture depends on (seed, position in this list).
        seeds: S noise seeds.
        reward: the training reward. judge: the held-out one.
        world: "tiny" adds the analytic checker of the bundled world; its captions only.
        batch: prompts a batch.
        cache: folder for the latents of contestants that have a fingerprint.
        facts: provenance for scores.json, see :func:`didr_core.evaluate.scoreboard.provenance`.

    Raises:
        ValueError: no prompts, no seeds, or two contestants of one name.
        NonFiniteError: a reward is NaN or infinite (names the prompts).
    """
    names = [c.name for c in contestants]
    if not prompts or not seeds or not names or len(set(names)) < len(names) or len(set(seeds)) < len(seeds):
        raise ValueError(f"nothing to score: {len(prompts)} prompts, seeds {list(seeds)}, models {names} (each once)")
    chunks = [slice(i, min(i + batch, len(prompts))) for i in range(0, len(prompts), batch)]
    conditions = [backbone.encode(prompts[rows]).to(device) for rows in chunks]
    scorers = {
        name: _Scorer(name, r, prompts, chunks, device) for name, r in (("reward", reward), ("judge", judge)) if r
    }
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    models: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        ledger, store = _Ledger(), LatentCache.open(cache, contestant.fingerprint, backbone.latent_shape)
        seconds = made = 0.0
        for number, rows in enumerate(chunks):
            seen: list[Tensor] = []
            for place, seed in enumerate(seeds):
                began = time.perf_counter()
                latent, fresh = _latents(backbone, contestant, store, conditions[number], prompts, rows, seed, device)
                images = backbone.decode(latent).float()
                seconds, made = seconds + (time.perf_counter() - began) * bool(fresh), made + fresh
                measures = _watch(latent.float(), images)
                measures |= {name: scorer(number, images) for name, scorer in scorers.items()}
                if world == "tiny":
                    measures |= _world(images, prompts[rows])
                ledger.add(place, measures)
                seen.append(images)
                if progress:
                    progress(
                        contestant.name,
                        rows.start * len(seeds) + (place + 1) * (rows.stop - rows.start),
                        len(prompts) * len(seeds),
                    )
            if len(seen) > 1:
                ledger.add(0, _diversity(torch.stack(seen)))
            if store:
                store.save(every=60.0)
        if store:
            store.save()
        arrays[contestant.name] = ledger.arrays()
        models[contestant.name] = {
            "steps": contestant.steps,
            "guidance": contestant.guidance,
            "seconds": round(seconds, 3),
            "pictures_made": int(made),
            "pictures_cached": len(prompts) * len(seeds) - int(made),
        }
    return Scores.build(models, arrays, list(prompts), list(seeds), facts=facts, focus=focus, world=world)


class _Scorer:
    """A reward with its text features prepared once."""

    def __init__(
        self, name: str, reward: Reward, prompts: Sequence[str], chunks: Sequence[slice], device: torch.device | str
    ) -> None:
        self.name, self.reward, self.prompts, self.chunks = name, reward, prompts, chunks
        self.inputs = [{k: v.to(device) for k, v in reward.prepare(prompts[rows]).items()} for rows in chunks]

    def __call__(self, number: int, images: Tensor) -> NDArray[Any]:
        value = self.reward.score(images, self.inputs[number]).float().cpu().numpy()
        if not np.isfinite(value).all():
            prompts = np.asarray(self.prompts[self.chunks[number]], dtype=object)[~np.isfinite(value)]
            raise NonFiniteError(f"{self.name}: not finite for {len(prompts)} prompts, the first: {list(prompts[:3])}")
        return value


def _latents(
    backbone: Backbone,
    contestant: Contestant,
    store: LatentCache | None,
    condition: Condition,
    prompts: Sequence[str],
    rows: slice,
    seed: int,
    device: torch.device | str,
) -> tuple[Tensor, int]:
    """Latents of ``prompts[rows]`` and how many of them were made afresh."""
    positions = range(rows.start, rows.stop)
    z = sampling.noise(seed, positions, backbone.latent_shape).to(device)
    if store is None:
        return contestant.sampler(condition, z), len(z)
    keys = [f"{seed}/{position}/{prompts[position]}" for position in positions]
    missing = [i for i, key in enumerate(keys) if key not in store]
    if missing:
        pick = torch.tensor(missing, device=device)
        fresh = contestant.sampler(condition.map(lambda v: v[pick]), z[pick])
        for i, row in zip(missing, fresh.float().cpu(), strict=True):
            store[keys[i]] = row
    return torch.stack([store[key] for key in keys]).to(device), len(missing)


def _watch(latent: Tensor, images: Tensor) -> dict[str, NDArray[Any]]:
    """Per picture: latent mean and standard deviation, share of clipped values, mean HSV saturation."""
    flat = latent.flatten(1)
    top, bottom = images.amax(1), images.amin(1)
    measures = {
        "latent_mean": flat.mean(1),
        "latent_std": flat.std(1),
        "clipped": ((images <= 1 / 512) | (images >= 1 - 1 / 512)).float().flatten(1).mean(1),
        "saturation": ((top - bottom) / top.clamp_min(1e-6)).flatten(1).mean(1),
    }
    return {name: value.cpu().numpy() for name, value in measures.items()}


def _diversity(images: Tensor) -> dict[str, NDArray[Any]]:
    """``[S, B, 3, H, W]`` to the root mean square difference over pairs of seeds, per prompt ``[B]``."""
    small = torch.nn.functional.adaptive_avg_pool2d(images.flatten(0, 1), 8).unflatten(0, images.shape[:2])
    measures = {}
    for name, pictures in (("diversity", images), ("layout_diversity", small)):
        pairs = [(a - b).square().flatten(1).mean(1) for a, b in combinations(pictures, 2)]
        measures[name] = torch.stack(pairs).mean(0).sqrt().cpu().numpy()
    return measures


KINDS = ("single", "count", "pair", "relation")
FACETS = ("count", "colour", "shape", "relation", "background")


def _world(images: Tensor, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The analytic checker's measures; a facet that a caption does not ask for is NaN, codes say what captions left free."""
    from didr_core.world import judge

    seen = judge.assess(images.cpu().numpy(), list(captions))
    measures = {(f"right_{name}" if name in FACETS else name): seen[name].astype(np.float64) for name in judge.MEASURES}
    measures["right_relation"] = np.where(seen["kind"] == "relation", measures["right_relation"], np.nan)
    measures["right_background"] = np.where(seen["background_free"], np.nan, measures["right_background"])
    for kind in KINDS:
        measures[f"strict_{kind}"] = np.where(seen["kind"] == kind, measures["strict"], np.nan)
    groups = list(judge.POSITION_GROUPS)
    return measures | {
        "background_code": np.where(seen["background_free"], seen["background_seen"], -1),
        "position_code": seen["position_bin"],
        "position_group": np.array([groups.index(g) if g in groups else len(groups) for g in seen["position_group"]]),
    }


__all__ = [
    "Contestant",
    "Scores",
    "commit",
    "one_step_contestant",
    "pool",
    "provenance",
    "read_scores",
    "score_models",
    "table",
    "teacher_contestant",
]
