"""Score models against each other: same held-out prompts, same noise, the training reward and the held-out judge.

An :class:`Evaluator` encodes the prompts once, then makes any number of models' pictures batch by batch and keeps what its
:class:`didr_core.evaluate.judges.Judges` measure of them (never the pictures), so that it runs at any resolution. Workers of one
process group share the work: each draws and measures its part of the prompts, and all get the whole.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from didr_core.config import Config, build, fingerprint
from didr_core.data.cache import read_arrays, write_arrays
from didr_core.diffusion import sampling
from didr_core.evaluate.contestants import Contestant
from didr_core.evaluate.judges import Drawn, Judges, of_latents
from didr_core.evaluate.scores import Scores
from didr_core.train.distributed import Single
from didr_core.types import Backbone, Condition, Parallel, Reward, Tensors

Progress = Callable[[str, int, int], None]
"""``(model, pictures done, pictures to do)``."""
Measured = dict[str, NDArray[Any]]
"""``{measure: [1, S, N]}``, and ``features [1, S, N, D]`` where they are looked at."""


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
        parallel: Parallel | None = None,
        keep: int = 0,
    ) -> None:
        """Encode ``prompts``: text towers are needed now and not later.

        Args:
            backbone: text encoder and decoder loaded.
            prompts: N held-out prompts; the noise of a picture depends on (seed, position in this list).
            seeds: S noise seeds.
            reward: the training reward. judge: the held-out one.
            world: "tiny" adds the analytic checker of the bundled world; its captions only.
            features: measure ``features`` too, the judge's own of its picture tower (the reward's, where there is no judge).
            batch: prompts a batch, at most.
            cache: folder for the latents of contestants that have a fingerprint.
            parallel: workers that make the same evaluator and share its work; each must make the same calls.
            keep: of how many of the first prompts the latents of the first seed stay, in ``kept``: ``{model: [keep, C, h, w]}``, CPU.

        Raises:
            ValueError: no prompts, no seeds, or a seed twice.
        """
        if not prompts or not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"nothing to score: {len(prompts)} prompts, seeds {list(seeds)} (each once)")
        self.backbone, self.prompts, self.seeds = backbone, list(prompts), list(seeds)
        rewards = {name: r for name, r in (("reward", reward), ("judge", judge)) if r is not None}
        self.judges = Judges(rewards, world, ("judge" if judge else "reward") if features else "", device)
        self.device, self.cache, self.parallel = device, cache, parallel or Single()
        self.keep, self.kept = min(keep, len(prompts)), dict[str, Tensor]()
        if len(prompts) < self.parallel.world_size:  # not one for each: all do the whole
            self.parallel = Single()
        rank, workers = self.parallel.rank, self.parallel.world_size
        parts = -(-len(prompts) // (batch * workers)) * workers  # as many for each
        shares = np.array_split(np.arange(len(prompts)), min(parts, len(prompts)))[rank::workers]
        self._parts = [self._ready(int(share[0]), self.prompts[share[0] : share[-1] + 1]) for share in shares]

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
        world = config.evaluation.world
        mine = Judges.load({"reward": None if reward else config.reward, "judge": config.judge}, world, device).rewards
        reward, judge = reward or mine.get("reward"), mine.get("judge")
        with text_towers(backbone, device):
            return cls(backbone, prompts, seeds, reward=reward, judge=judge, world=world, device=device, **more)

    @torch.no_grad()
    def _ready(self, first: int, prompts: Sequence[str]) -> _Part:
        condition = self.backbone.encode(prompts).to(self.device)
        return _Part(first, prompts, condition, self.judges.prepare(prompts))

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
        return Scores.build(models, arrays, self.prompts, self.seeds, facts=facts, focus=focus, world=self.judges.world)

    def measure(self, contestant: Contestant) -> Measured:
        """All measures of its pictures.

        Raises:
            NonFiniteError: a reward is NaN or infinite (names the prompts).
        """
        return self._look(contestant)[1]

    def measured(self, contestant: Contestant, key: str, folder: Path) -> Measured:
        """:meth:`measure`, kept in ``folder``; ``key`` must change whenever the pictures or the rewards would."""
        wanted = fingerprint.digest(key, self.prompts, self.seeds, bool(self.judges.features))
        file = folder / f"{contestant.name}-{wanted}.npz"
        if (measured := read_arrays(file)) is None:
            measured = self.measure(contestant)
            write_arrays(file, measured)
        return dict(measured)

    @torch.no_grad()
    def _look(self, contestant: Contestant, progress: Progress | None = None) -> tuple[dict[str, Any], Measured]:
        """What is known of the model itself, and its measures."""
        seconds, made = 0.0, 0
        done, total = 0, len(self.prompts) * len(self.seeds)
        few = np.zeros((self.keep, *self.backbone.latent_shape))

        def drawn(part: _Part) -> Iterator[Drawn]:
            nonlocal seconds, made, done
            for seed in self.seeds:
                began = time.perf_counter()
                latent, fresh = self._latents(contestant, part, seed)
                images = self.backbone.decode(latent).float()
                seconds, made = seconds + (time.perf_counter() - began) * bool(fresh), made + fresh
                if seed == self.seeds[0] and part.first < self.keep:
                    few[part.first : part.first + len(latent)] = latent[: self.keep - part.first].float().cpu()
                yield images, of_latents(latent)
                done += len(part.prompts) * self.parallel.world_size  # the others are about as far
                if progress:
                    progress(contestant.name, min(done, total), total)

        values = [self.judges.look(part.prompts, part.inputs, drawn(part)) for part in self._parts]
        measured = {name: self._whole([part[name] for part in values])[None] for name in values[0]}
        seconds, made = self._sum(np.array([seconds, made])).tolist()
        if self.keep:
            self.kept[contestant.name] = torch.from_numpy(self._sum(few)).float()
        row = {"steps": contestant.steps, "guidance": contestant.guidance, "seconds": round(seconds, 3)}
        return row | {"pictures_made": int(made), "pictures_cached": total - int(made)}, measured

    def _whole(self, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """One measure of this worker's parts ``[S, b, ...]`` to that of all prompts ``[S, N, ...]``."""
        if self.parallel.world_size == 1:
            return np.concatenate(values, 1)
        whole = np.zeros((len(values[0]), len(self.prompts), *values[0].shape[2:]))
        for part, value in zip(self._parts, values, strict=True):
            whole[:, part.first : part.first + len(part.prompts)] = value
        summed = self._sum(whole)
        kind = values[0].dtype
        return (np.rint(summed) if kind.kind in "iub" else summed).astype(kind)

    def _sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over all workers; numbers that one has and the others hold zeros for come back as they were."""
        mine = torch.from_numpy(values).to(self.device)
        self.parallel.mean_([mine])
        return np.asarray(mine.cpu().numpy() * self.parallel.world_size)

    def _latents(self, contestant: Contestant, part: _Part, seed: int) -> tuple[Tensor, int]:
        positions = range(part.first, part.first + len(part.prompts))
        z = sampling.noise(seed, positions, self.backbone.latent_shape).to(self.device)
        names = [f"{seed}/{position}/{prompt}" for position, prompt in zip(positions, part.prompts, strict=True)]
        return contestant.latents(part.condition, z, names, self.cache)
