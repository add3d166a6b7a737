"""Score models against each other: same held-out prompts, same noise, the training reward and the held-out judge.

An :class:`Evaluator` encodes the prompts once, then makes any number of models' pictures batch by batch and keeps measures only (never
the pictures), so that it runs at any resolution:

- ``reward``: the reward that was trained on; ``judge``: the held-out reward, never trained on;
- ``clipped``, ``saturation``, ``latent_mean``, ``latent_std``: the watch against reward hacking, to be read against the start's;
- ``diversity``, ``layout_diversity``: root mean square difference between a prompt's pictures across noise seeds, of pixels and of
  their 8x8 means (two seeds at least);
- ``features``, where asked for: what distances between laws of pictures are measured on;
- with ``world="tiny"`` what the analytic checker measures: utility, strict and loose accuracy, facets, and the entropies of what captions
  leave free.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from didr_core.config import Component, Config, build
from didr_core.data.cache import read_arrays, write_arrays
from didr_core.diffusion import sampling
from didr_core.evaluate.contestants import Contestant
from didr_core.evaluate.scores import Scores
from didr_core.types import Backbone, Condition, NonFiniteError, Reward, Tensors
from didr_core.world import assess
from didr_core.world.checker import FACETS
from didr_core.world.scenes import KINDS

Progress = Callable[[str, int, int], None]
"""``(model, pictures done, pictures to do)``."""
Measured = dict[str, NDArray[Any]]
"""``{measure: [1, S, N]}``, and ``features [1, S, N, D]`` where they are looked at."""

SIDE = 4  # of the shrunken pictures that stand in for features


@contextmanager
def text_towers(backbone: Backbone, device: torch.device | str = "cpu") -> Iterator[None]:
    """Text towers are there inside the block and gone after it: a trainer does not keep them."""
    backbone.load_text()
    backbone.to(device)
    try:
        yield
    finally:
        backbone.free_text()


@dataclass(frozen=True)
class _Part:
    """A batch of the prompts, made ready: ``first`` is the place of its first prompt in the list, ``inputs`` are by reward."""

    first: int
    prompts: Sequence[str]
    condition: Condition
    inputs: Mapping[str, Tensors]

    def head(self, count: int) -> _Part:
        """Its first ``count`` prompts."""
        rows = slice(0, count)
        inputs = {name: {k: v[rows] for k, v in tensors.items()} for name, tensors in self.inputs.items()}
        return replace(self, prompts=self.prompts[rows], condition=self.condition[rows], inputs=inputs)


class Evaluator:
    """Prompts, noise and rewards, made ready once for any number of models."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        reward: Reward | None = None,
        judge: Reward | None = None,
        world: str = "none",
        features: bool = False,
        batch: int = 64,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> None:
        """Encode ``prompts``: text towers are needed now and not later.

        Args:
            backbone: text encoder and decoder loaded.
            prompts: N held-out prompts; the noise of a picture depends on (seed, position in this list).
            seeds: S noise seeds.
            reward: the training reward. judge: the held-out one.
            world: "tiny" adds the analytic checker of the bundled world; its captions only.
            features: measure ``features`` too, the judge's own of its picture tower (the reward's, where there is no judge).
            batch: prompts a batch.
            cache: folder for the latents of contestants that have a fingerprint.

        Raises:
            ValueError: no prompts, no seeds, or a seed twice.
        """
        if not prompts or not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"nothing to score: {len(prompts)} prompts, seeds {list(seeds)} (each once)")
        self.backbone, self.prompts, self.seeds = backbone, list(prompts), list(seeds)
        self.rewards = {name: r for name, r in (("reward", reward), ("judge", judge)) if r is not None}
        self.world, self.features, self.device, self.cache = world, features, device, cache
        self._parts = [self._ready(i, self.prompts[i : i + batch]) for i in range(0, len(prompts), batch)]

    @classmethod
    def of(
        cls,
        config: Config,
        prompts: Sequence[str],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        backbone: Backbone | None = None,
        reward: Reward | None = None,
        **more: Any,
    ) -> Self:
        """With what a recipe names: backbone, decoder, reward and judge are loaded where they are not given."""
        backbone = backbone or build("backbones", config.backbone)
        backbone.load_decoder()
        reward = reward or _loaded(config.reward, device)
        judge, world = _loaded(config.judge, device), config.evaluation.world
        with text_towers(backbone, device):
            return cls(backbone, prompts, seeds, reward=reward, judge=judge, world=world, device=device, **more)

    @torch.no_grad()
    def _ready(self, first: int, prompts: Sequence[str]) -> _Part:
        condition = self.backbone.encode(prompts).to(self.device)
        prepared = {name: reward.prepare(prompts) for name, reward in self.rewards.items()}
        inputs = {name: {k: v.to(self.device) for k, v in tensors.items()} for name, tensors in prepared.items()}
        return _Part(first, prompts, condition, inputs)

    def first(self, prompts: int, seeds: int = 1) -> Self:
        """The same for the first prompts and noise seeds only: a quick look. Noise belongs to a prompt's place, so pictures stay."""
        few = copy.copy(self)
        few.prompts, few.seeds = self.prompts[:prompts], self.seeds[:seeds]
        few._parts = [part.head(prompts - part.first) for part in self._parts if part.first < prompts]
        return few

    def compare(
        self,
        contestants: Sequence[Contestant],
        *,
        facts: Mapping[str, Any] | None = None,
        focus: str = "aligned",
        progress: Progress | None = None,
    ) -> Scores:
        """Every contestant's pictures of every prompt with every noise seed, compared in all pairs.

        Args:
            facts: for scores.json, see :func:`didr_core.evaluate.scores.origin`. focus: named first in its pairs.

        Raises:
            ValueError: no contestants, or two of one name.
            NonFiniteError: a reward is NaN or infinite (names the prompts).
        """
        names = [c.name for c in contestants]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"nothing to score: models {names} (each once)")
        found = {c.name: self._look(c, progress) for c in contestants}
        models, arrays = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
        return Scores.build(models, arrays, self.prompts, self.seeds, facts=facts, focus=focus, world=self.world)

    def measure(self, contestant: Contestant) -> Measured:
        """All measures of its pictures.

        Raises:
            NonFiniteError: a reward is NaN or infinite (names the prompts).
        """
        return self._look(contestant)[1]

    def measured(self, contestant: Contestant, key: str, folder: Path) -> Measured:
        """:meth:`measure`, kept in ``folder``; ``key`` must change whenever the pictures or the rewards would."""
        wanted = hashlib.sha256(json.dumps([key, self.prompts, self.seeds, self.features]).encode()).hexdigest()[:16]
        file = folder / f"{contestant.name}-{wanted}.npz"
        measured = read_arrays(file)
        if measured is None:
            measured = self.measure(contestant)
            write_arrays(file, measured)
        return dict(measured)

    @torch.no_grad()
    def _look(self, contestant: Contestant, progress: Progress | None = None) -> tuple[dict[str, Any], Measured]:
        """What is known of the model itself, and its measures."""
        values: dict[str, dict[int, list[NDArray[Any]]]] = defaultdict(lambda: defaultdict(list))
        seconds, made, total = 0.0, 0, len(self.prompts) * len(self.seeds)
        for part in self._parts:
            seen: list[Tensor] = []
            for place, seed in enumerate(self.seeds):
                began = time.perf_counter()
                latent, fresh = self._latents(contestant, part, seed)
                images = self.backbone.decode(latent).float()
                seconds, made = seconds + (time.perf_counter() - began) * bool(fresh), made + fresh
                for name, value in self._measures(part, latent, images).items():
                    values[name][place].append(value)
                seen.append(images)
                if progress:
                    progress(contestant.name, part.first * len(self.seeds) + len(seen) * len(part.prompts), total)
            if len(seen) > 1:
                for name, value in _diversity(torch.stack(seen)).items():
                    values[name][0].append(value)
        row = {"steps": contestant.steps, "guidance": contestant.guidance, "seconds": round(seconds, 3)}
        row |= {"pictures_made": made, "pictures_cached": total - made}
        return row, {
            name: np.stack([np.concatenate(parts) for parts in by_seed.values()])[None]
            for name, by_seed in values.items()
        }

    def _latents(self, contestant: Contestant, part: _Part, seed: int) -> tuple[Tensor, int]:
        positions = range(part.first, part.first + len(part.prompts))
        z = sampling.noise(seed, positions, self.backbone.latent_shape).to(self.device)
        names = [f"{seed}/{position}/{prompt}" for position, prompt in zip(positions, part.prompts, strict=True)]
        return contestant.latents(part.condition, z, names, self.cache)

    def _measures(self, part: _Part, latent: Tensor, images: Tensor) -> dict[str, NDArray[Any]]:
        """Everything that is measured of a batch of pictures, ``[B]`` each."""
        measures = _watch(latent.float(), images)
        for name, reward in self.rewards.items():
            value = reward.score(images, part.inputs[name]).float().cpu().numpy()
            if not np.isfinite(value).all():
                prompts = [p for p, known in zip(part.prompts, np.isfinite(value), strict=True) if not known]
                raise NonFiniteError(f"{name}: not finite for {len(prompts)} prompts, the first: {prompts[:3]}")
            measures[name] = value
        if self.features:
            measures["features"] = _features(self.rewards.get("judge", self.rewards.get("reward")), images)
        if self.world == "tiny":
            measures |= _world(images, part.prompts)
        return measures


def _loaded(config: Component | None, device: torch.device | str) -> Reward | None:
    if config is None:
        return None
    reward: Reward = build("rewards", config)
    reward.load(device)
    return reward


def _features(reward: Reward | None, images: Tensor) -> NDArray[Any]:
    """``[B, D]``, float32: of the reward's picture tower; for a reward without ``features`` the pictures shrunk to 4 x 4 pixels."""
    found = reward.features(images) if reward and reward.features else F.adaptive_avg_pool2d(images, SIDE).flatten(1)
    return np.asarray(found.float().cpu().numpy())


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
    small = F.adaptive_avg_pool2d(images.flatten(0, 1), 8).unflatten(0, images.shape[:2])
    measures = {}
    for name, pictures in (("diversity", images), ("layout_diversity", small)):
        pairs = [(a - b).square().flatten(1).mean(1) for a, b in combinations(pictures, 2)]
        measures[name] = torch.stack(pairs).mean(0).sqrt().cpu().numpy()
    return measures


def _world(images: Tensor, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The analytic checker's measures; a facet that a caption does not ask for is NaN, codes say what captions left free."""
    seen = assess.assess(images.cpu().numpy(), captions)
    measures = {f"right_{n}" if n in FACETS else n: seen[n].astype(np.float64) for n in assess.MEASURES}
    measures["right_relation"] = np.where(seen["kind"] == "relation", measures["right_relation"], np.nan)
    measures["right_background"] = np.where(seen["background_free"], np.nan, measures["right_background"])
    for kind in KINDS:
        measures[f"strict_{kind}"] = np.where(seen["kind"] == kind, measures["strict"], np.nan)
    return measures | {name: seen[name] for name in ("background_code", "position_code", "position_group")}
