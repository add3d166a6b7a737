"""What is measured of pictures, whoever drew them: rewards, the watch against hacking, diversity over noises, the world's checker.

- ``reward``, ``judge`` and whatever else rewards are called: their scores;
- ``clipped``, ``saturation``, ``latent_mean``, ``latent_std``: the watch against reward hacking, to be read against the start's;
- ``diversity``, ``layout_diversity``: root mean square difference between a prompt's pictures across noise seeds, of pixels and of
  their 8x8 means (two seeds at least);
- ``features``, where asked for: what distances between laws of pictures are measured on; and ``feature_diversity``, the distance between
  a prompt's pictures in them; ``lpips_diversity``, where asked for, their LPIPS (arXiv 1801.03924);
- with ``world="tiny"`` what the analytic checker measures: utility, strict and loose accuracy, facets, and the entropies of what captions
  leave free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from didr_core.config import Component, build
from didr_core.evaluate import features
from didr_core.types import DIDRError, NonFiniteError, Reward, Tensors
from didr_core.world import assess
from didr_core.world.checker import FACETS
from didr_core.world.scenes import KINDS

Values = dict[str, NDArray[Any]]
Drawn = tuple[Tensor, Mapping[str, NDArray[Any]]]
"""Pictures ``[B, 3, H, W]`` in [0, 1] of one noise seed, and what is known of them beside (:func:`of_latents`): ``{measure: [B]}``."""

SIDE = 4  # of the shrunken pictures that stand in for features


@dataclass(frozen=True)
class Judges:
    """Loaded rewards by the name of their measure, and what else is looked at. Knows no model and no noise.

    ``features`` is the reward whose picture tower gives them (none of that name: the pictures shrunk to 4 x 4); "" measures none.
    """

    rewards: Mapping[str, Reward]
    world: str = "none"
    features: str = ""
    device: torch.device | str = "cpu"
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def load(
        cls,
        rewards: Mapping[str, Component | None],
        world: str,
        device: torch.device | str = "cpu",
        *,
        features: str = "",
        lpips: bool = False,
    ) -> Self:
        """With the rewards that the configs name.

        Raises:
            DIDRError: LPIPS is asked for and not installed.
        """
        made = {name: build("rewards", config) for name, config in rewards.items() if config is not None}
        for reward in made.values():
            reward.load(device)
        return cls(made, world, features, device, load_lpips(device) if lpips else None)

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensors]:
        """What each reward makes of the prompts."""
        prepared = {name: reward.prepare(prompts) for name, reward in self.rewards.items()}
        return {name: {k: v.to(self.device) for k, v in tensors.items()} for name, tensors in prepared.items()}

    @torch.no_grad()
    def look(self, prompts: Sequence[str], inputs: Mapping[str, Tensors], drawn: Iterable[Drawn]) -> Values:
        """Everything that is measured of B prompts' pictures, seed by seed: ``{measure: [S, B]}``, ``[1, B]`` where it is one of all
        seeds together.

        Raises:
            NonFiniteError: a reward is NaN or infinite (names the prompts).
        """
        values: dict[str, list[NDArray[Any]]] = defaultdict(list)
        seen: list[Tensor] = []
        for images, known in drawn:
            seen.append(images)
            for name, value in (dict(known) | self._measures(prompts, inputs, images)).items():
                values[name].append(value)
        if len(seen) > 1:
            values |= {name: [value] for name, value in self._diversity(torch.stack(seen), values).items()}
        return {name: np.stack(rows) for name, rows in values.items()}

    def _measures(self, prompts: Sequence[str], inputs: Mapping[str, Tensors], images: Tensor) -> Values:
        measures = _watch(images)
        for name, reward in self.rewards.items():
            value = reward.score(images, inputs[name]).float().cpu().numpy()
            if not np.isfinite(value).all():
                bad = [p for p, known in zip(prompts, np.isfinite(value), strict=True) if not known]
                raise NonFiniteError(f"{name}: not finite for {len(bad)} prompts, the first: {bad[:3]}")
            measures[name] = value
        if self.features:
            measures["features"] = _features(self.rewards.get(self.features), images)
        if self.world == "tiny":
            measures |= _world(images, prompts)
        return measures

    def _diversity(self, images: Tensor, values: Mapping[str, list[NDArray[Any]]]) -> Values:
        """Of ``[S, B, 3, H, W]``, and of the features in ``values``, over pairs of seeds, per prompt ``[B]``."""
        small = F.adaptive_avg_pool2d(images.flatten(0, 1), 8).unflatten(0, images.shape[:2])
        measures = {"diversity": _apart(images), "layout_diversity": _apart(small)}
        if "features" in values:
            measures["feature_diversity"] = features.diversity(np.stack(values["features"]))
        if self.lpips:
            pairs = [self.lpips(2 * a - 1, 2 * b - 1).flatten() for a, b in combinations(images, 2)]
            measures["lpips_diversity"] = torch.stack(pairs).mean(0).cpu().numpy()
        return measures


def load_lpips(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """The published distance on AlexNet: two batches ``[B, 3, H, W]`` in [-1, 1] to ``[B, 1, 1, 1]``.

    Raises:
        DIDRError: the package is not installed.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise DIDRError(
            f"--lpips: {error}. It is no dependency, for it needs torchvision: pip install lpips, with the torchvision of your torch."
        ) from error
    made: Callable[[Tensor, Tensor], Tensor] = LPIPS(net="alex", verbose=False).to(device).eval()
    return made


def of_latents(latent: Tensor) -> Values:
    """Per picture: mean and standard deviation of its latent."""
    flat = latent.float().flatten(1)
    return {"latent_mean": flat.mean(1).cpu().numpy(), "latent_std": flat.std(1).cpu().numpy()}


def _features(reward: Reward | None, images: Tensor) -> NDArray[Any]:
    """``[B, D]``, float32: of the reward's picture tower; for a reward without ``features`` the pictures shrunk to 4 x 4 pixels."""
    found = reward.features(images) if reward and reward.features else F.adaptive_avg_pool2d(images, SIDE).flatten(1)
    return np.asarray(found.float().cpu().numpy())


def _watch(images: Tensor) -> Values:
    """Per picture: share of clipped values, mean HSV saturation."""
    top, bottom = images.amax(1), images.amin(1)
    measures = {
        "clipped": ((images <= 1 / 512) | (images >= 1 - 1 / 512)).float().flatten(1).mean(1),
        "saturation": ((top - bottom) / top.clamp_min(1e-6)).flatten(1).mean(1),
    }
    return {name: value.cpu().numpy() for name, value in measures.items()}


def _apart(images: Tensor) -> NDArray[Any]:
    """``[S, B, 3, H, W]`` to the root mean square difference over pairs of seeds ``[B]``."""
    pairs = [(a - b).square().flatten(1).mean(1) for a, b in combinations(images, 2)]
    return np.asarray(torch.stack(pairs).mean(0).sqrt().cpu().numpy())


def _world(images: Tensor, captions: Sequence[str]) -> Values:
    """The analytic checker's measures; a facet that a caption does not ask for is NaN, codes say what captions left free."""
    seen = assess.assess(images.cpu().numpy(), captions)
    measures = {f"right_{n}" if n in FACETS else n: seen[n].astype(np.float64) for n in assess.MEASURES}
    measures["right_relation"] = np.where(seen["kind"] == "relation", measures["right_relation"], np.nan)
    measures["right_background"] = np.where(seen["background_free"], np.nan, measures["right_background"])
    for kind in KINDS:
        measures[f"strict_{kind}"] = np.where(seen["kind"] == kind, measures["strict"], np.nan)
    return measures | {name: seen[name] for name in ("background_code", "position_code", "position_group")}
