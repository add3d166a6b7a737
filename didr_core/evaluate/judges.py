"""Everything that scores one generator at a time, loaded once: pictures of held-out prompts, both rewards, features for distances.

`benchmarks.pareto` and sweeps judge dozens of generators with one of these; what was measured is kept in a file and not measured again.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from didr_core.config import Config, build
from didr_core.evaluate.scores import Contestant, score_models
from didr_core.types import Reward, Tensors

Measured = dict[str, NDArray[Any]]
"""``{measure: [1, S, N]}`` and ``features [1, S, N, D]``."""

SIDE = 4  # of the shrunken pictures that stand in for features


class _Watched:
    """A reward, keeping the features ``[B, D]`` of every batch of pictures that it scores: batch by batch, noise seed by noise seed.

    Features are the reward's own, of its picture tower; a reward without ``features`` gets pictures shrunk to 4 x 4 pixels.
    """

    differentiable = False

    def __init__(self, reward: Any) -> None:
        self.reward, self.prepare, self.load, self.check = reward, reward.prepare, reward.load, reward.check
        self.features: list[NDArray[np.float32]] = []

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """The reward's scores."""
        look = getattr(self.reward, "features", None)
        found = look(images) if look else F.adaptive_avg_pool2d(images, SIDE).flatten(1)
        self.features.append(found.float().cpu().numpy())
        return self.reward.score(images, inputs)  # type: ignore[no-any-return]


class Judges:
    """Text towers, decoder, training reward and held-out judge of a recipe. Measures are kept in ``work/scores``.

    Features come from the held-out judge, or from the training reward where there is no judge.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[str],
        noise_seeds: Sequence[int],
        work: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.prompts, self.noise_seeds, self.work = config, list(prompts), list(noise_seeds), work
        self.device = device
        self.backbone = build("backbones", config.backbone)
        self.backbone.load_text()
        self.backbone.load_decoder()
        getattr(self.backbone, "to", lambda _: None)(device)
        self.rewards: dict[str, Reward] = {}
        for name, component in (("reward", config.reward), ("judge", config.judge)):
            if component is not None:
                self.rewards[name] = build("rewards", component)
                self.rewards[name].load(device)

    def first(self, prompts: int, seeds: int = 1) -> Self:
        """The same judges for the first prompts and noise seeds only: a quick look. Noise belongs to a prompt's place, so pictures stay."""
        few = copy.copy(self)
        few.prompts, few.noise_seeds = self.prompts[:prompts], self.noise_seeds[:seeds]
        return few

    def measure(self, contestant: Contestant, key: str) -> Measured:
        """All that is known of its pictures; ``key`` must change whenever the pictures would.

        Raises:
            NonFiniteError: a reward is NaN or infinite (names the prompts).
        """
        wanted = json.dumps([key, self.prompts, self.noise_seeds])
        file = self.work / "scores" / f"{contestant.name}.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as stored:
                if str(stored["wanted"]) == wanted:
                    return {name: stored[name] for name in stored.files if name != "wanted"}
        measured = self.look(contestant)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part.npz")
        np.savez_compressed(part, wanted=np.array(wanted), **measured)  # type: ignore[arg-type]
        os.replace(part, file)
        return measured

    def look(self, contestant: Contestant) -> Measured:
        """:meth:`measure` without files."""
        scorers: dict[str, Any] = dict(self.rewards)
        watched = _Watched(scorers.get("judge") or scorers["reward"])
        scorers["judge" if "judge" in scorers else "reward"] = watched
        scores = score_models(
            self.backbone,
            [contestant],
            self.prompts,
            seeds=self.noise_seeds,
            reward=scorers.get("reward"),
            judge=scorers.get("judge"),
            world=self.config.evaluation.world,
            device=self.device,
            cache=self.work / "teacher",
        )
        rows, seeds = watched.features, len(self.noise_seeds)
        by_batch = [np.stack(rows[i : i + seeds]) for i in range(0, len(rows), seeds)]  # [S, B, D] each
        return {**scores.arrays[contestant.name], "features": np.concatenate(by_batch, 1)[None]}
