"""Several rewards at once: ``r = sum_i weight_i * raw_i / scale_i``.

``scale_i`` is a fixed number: part i's standard deviation over pictures that the *starting* generator makes for one prompt, pooled over
prompts; where the recipe gives none it is measured once, before training, and written into the run's config (:mod:`didr_core.data.scales`).
Why fixed, and why this one:

- ``raw / scale`` puts PickScore's 22 and HPSv2's 30 on one axis, so that equal weights pull equally hard, whatever the units.
- A composite is then a reward like any other: the same formula on every worker, in the held-out scores and after a resume.
- Its own baseline and spread are measured as for any reward (`data/feed.py`), so that ``drp.beta`` stays what it
  is: the temperature in standard deviations of the starting generator's *whole* reward. Only the ratios of weights matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor

from didr_core.config import Component, Placed, Strict, build, component
from didr_core.types import Begin, DIDRError, Scored, Tensors


class Part(Strict):
    """One reward of a composite. A negative weight pushes it down."""

    weight: float = 1.0
    reward: Annotated[SerializeAsAny[Component], component("rewards")]
    scale: float | None = Field(
        None, gt=0, description="its standard deviation within a prompt; none = measured at start"
    )

    @field_validator("reward")
    @classmethod
    def _plain(cls, value: Component) -> Component:
        if isinstance(value, Composite.Config):
            raise ValueError("a composite inside a composite: list its parts here instead")
        return value

    @field_validator("weight")
    @classmethod
    def _counts(cls, value: float) -> float:
        if not value:
            raise ValueError("weight=0: such a part is computed for nothing; leave it out")
        return value


class Composite:
    """A weighted sum of standardised rewards; differentiable where all its parts are."""

    class Config(Placed):
        """`parts`: at least one. `measure_prompts`: training prompts that missing scales are measured on."""

        name: str = "composite"
        parts: tuple[Part, ...] = Field(min_length=1)
        measure_prompts: int = Field(64, ge=2)

    def __init__(self, config: Config) -> None:
        self.parts = config.parts
        self.names = part_names(config)
        self.rewards = [build("rewards", part.reward) for part in config.parts]
        self.differentiable = all(reward.differentiable for reward in self.rewards)

    def check(self) -> None:
        """Raises DIDRError with the part that is not what the config says."""
        for number, (part, reward) in enumerate(zip(self.parts, self.rewards, strict=True)):
            try:
                reward.check()
            except DIDRError as error:
                raise DIDRError(f"reward.parts[{number}] ({part.reward.name}): {error}") from error

    def tokenizers(self) -> dict[Path, int]:
        """The parts', see :class:`didr_core.types.Reward`."""
        return {k: v for reward in self.rewards for k, v in (reward.tokenizers() or {}).items()}

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load every part."""
        for reward in self.rewards:
            reward.load(device)

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the parts prepare, as ``"<number>/<name>"``."""
        return {f"{n}/{k}": v for n, reward in enumerate(self.rewards) for k, v in reward.prepare(prompts).items()}

    def raw(self, images: Tensor, inputs: Tensors) -> dict[str, Tensor]:
        """The parts' own scores ``{name: [B]}``, on their published scales."""
        return {name: wait().float() for name, wait in self._asked(images, inputs).items()}

    def _asked(self, images: Tensor, inputs: Tensors, weight: Tensor | None = None) -> dict[str, Callable[[], Tensor]]:
        """Parts that are scored elsewhere are asked now, those here when they are waited for."""
        waits: dict[str, Callable[[], Tensor]] = {}
        for n, (part, name, reward) in enumerate(zip(self.parts, self.names, self.rewards, strict=True)):
            own = {k.removeprefix(f"{n}/"): v for k, v in inputs.items() if k.startswith(f"{n}/")}
            waits[name] = partial(reward.score, images, own)
            if reward.begin:
                of_part = None if weight is None else weight * part.weight / (part.scale or 1.0)
                waits[name] = partial(_first, reward.begin(images, own, of_part))
        return waits

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``sum_i weight_i raw_i / scale_i``, ``[B]``.

        Raises:
            DIDRError: a part has no scale.
        """
        return self.details(images, inputs)[0]

    def details(self, images: Tensor, inputs: Tensors) -> Scored:
        """:meth:`score`; and for the logs, ``[B]`` each: ``<part>/raw``, ``<part>/scaled`` (raw / scale), ``<part>/weighted``."""
        return self._begin(images, inputs)()

    @property
    def begin(self) -> Begin | None:
        """See :class:`didr_core.types.Reward`; None where all parts are here."""
        return self._begin if any(reward.begin for reward in self.rewards) else None

    def _begin(self, images: Tensor, inputs: Tensors, weight: Tensor | None = None) -> Callable[[], Scored]:
        return partial(self._sum, self._asked(images, inputs, weight))

    def _sum(self, waits: dict[str, Callable[[], Tensor]]) -> Scored:
        log: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for part, (name, wait) in zip(self.parts, waits.items(), strict=True):
            raw = wait().float()
            if part.scale is None:
                raise DIDRError(
                    f"reward.parts: {name} has scale=None. `didr align` measures it at start; elsewhere set the scale that is in the "
                    "run's config.yaml."
                )
            scaled = raw / part.scale
            weighted = part.weight * scaled
            log |= {f"{name}/raw": raw, f"{name}/scaled": scaled, f"{name}/weighted": weighted}
            total = total + weighted
        assert isinstance(total, Tensor)
        return total, log


def _first(wait: Callable[[], Scored]) -> Tensor:
    return wait()[0]


def part_names(config: Composite.Config) -> list[str]:
    """A name for each part: its reward's (of a plug-in, the class's), numbered from the second of a name on."""
    plain = [part.reward.name.rpartition(":")[2] for part in config.parts]
    before = [plain[:n].count(name) for n, name in enumerate(plain)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(plain, before, strict=True)]


def with_scales(config: Composite.Config, scales: Sequence[Any]) -> Composite.Config:
    """``config`` with ``scales`` in the parts that have none."""
    parts = tuple(
        part if part.scale is not None else part.model_copy(update={"scale": float(scale)})
        for part, scale in zip(config.parts, scales, strict=True)
    )
    return config.model_copy(update={"parts": parts})
