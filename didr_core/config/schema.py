"""One run's configuration, whole: its sections (:mod:`didr_core.config.sections`), rules between them, sizes that follow.

Components (algorithm, backbone, reward) bring their own small ``Config``, found by :mod:`didr_core.config.registry`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from didr_core.config import registry
from didr_core.config.files import cache_folder, expanded
from didr_core.config.limits import Limits
from didr_core.config.registry import Actors, Component, Strict, component
from didr_core.config.sections import (
    DRP,
    Baseline,
    Data,
    Evaluation,
    Guidance,
    Optim,
    Roles,
    Times,
    Tracking,
    Train,
    Workers,
)
from didr_core.types import DIDRError

if TYPE_CHECKING:
    import torch


class Config(Strict):
    """One run, whole."""

    name: str = Field(description="the beginning of the run folder's name, and MLflow's")
    seed: int = Field(0, ge=0, description="of all random numbers: each is tied to (seed, sample)")
    output: str = Field(
        "runs",
        description="folder that run folders are made in; on clusters one that all nodes share, or an address such as s3://bucket/runs",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where a process sees one")
    backbone: Annotated[SerializeAsAny[Component], component("backbones")] = Field(
        description="model family and its files: didr_core/backbones"
    )
    algorithm: Annotated[SerializeAsAny[Component], component("algorithms")] = Field(
        description="how the generator learns: didr_core/algorithms"
    )
    reward: Annotated[SerializeAsAny[Component] | None, component("rewards")] = Field(
        None, description="what it is aligned with: didr_core/rewards"
    )
    judge: Annotated[SerializeAsAny[Component] | None, component("rewards")] = Field(
        None, description="held-out reward; never trained on"
    )
    drp: DRP = Field(default_factory=lambda: DRP.model_validate({}))
    guidance: Guidance = Guidance()
    times: Times = Times()
    generator: Optim
    assistant: Optim
    train: Train
    roles: Roles = Roles()
    data: Data
    baseline: Baseline = Baseline()
    workers: Workers = Workers()
    evaluation: Evaluation = Evaluation()
    alarms: Limits = Limits()
    tracking: Tracking = Tracking()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as its plain tree: a component that lives in a file is found again by its path over there."""
        return Config.model_validate, (self.model_dump(mode="json"),)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        method = registry.find("algorithms", self.algorithm.name)
        if method.needs_reward and self.reward is None:
            raise ValueError(f"reward: algorithm {self.algorithm.name!r} needs one, got none; name one, e.g. pickscore")
        if self.judge and "actors" in [placement(part) for part in leaves("judge", self.judge).values()]:
            raise ValueError("judge.placement='actors': only `reward`, which is trained on, has actors; leave it out")
        if self.reward and not differentiable(self.reward):
            if method.needs_reward_gradient:
                raise ValueError(
                    f"reward.name={self.reward.name!r}: has no gradient, which algorithm {self.algorithm.name!r} needs; name a"
                    " differentiable reward, or say algorithm=didr and drp.estimator=importance"
                )
            if method.uses_drs and registry.find("drs", self.drp.estimator).needs_reward_gradient:
                raise ValueError(
                    f"reward.name={self.reward.name!r}: has no gradient, which drp.estimator={self.drp.estimator!r} needs; name a"
                    " differentiable reward, or say drp.estimator=importance"
                )
        if self.train.batch % self.workers.train:
            raise ValueError(
                f"train.batch={self.train.batch} does not divide by workers.train={self.workers.train}; every worker takes an equal share"
            )
        least = self.workers.train_min
        if least is not None and least > self.workers.train:
            raise ValueError(f"workers.train_min={least}: expected at most workers.train={self.workers.train}")
        share = self.train.batch // self.workers.train
        if self.train.at_once and share % self.train.at_once:
            raise ValueError(
                f"train.micro_batch={self.train.micro_batch} does not divide a worker's share of {share} samples"
            )
        return self

    @property
    def torch_device(self) -> torch.device:
        """`device`, with "auto" = CUDA where this process sees one.

        Raises:
            DIDRError: "cuda" is asked for and there is none.
        """
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise DIDRError(
                "device='cuda': this process sees no CUDA device. Use device=auto or cpu, or give the worker a GPU."
            )
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def precomputed(self) -> bool:
        """Whether prompts are encoded and baselines made before training starts."""
        workers = self.workers
        shared = workers.train == 1 and workers.train_gpus > 0 and workers.encoder_gpus + workers.reward_gpus > 0
        return shared if workers.precompute is None else workers.precompute

    @property
    def cache(self) -> Path | None:
        """The folder that they are kept in (not told: in `output`); None: they are not."""
        beside = cache_folder() if "://" in self.output else expanded(self.output)
        folder = self.data.cache or (beside / "cache" if self.precomputed else None)
        return expanded(folder).resolve() if folder else None

    @property
    def needs_reward(self) -> bool:
        """Whether the algorithm asks for rewards, and so for what is prepared for them."""
        return bool(registry.find("algorithms", self.algorithm.name).needs_reward)

    @property
    def uses_drs(self) -> bool:
        """Whether the algorithm asks for the diffused reward score, and so for what `drp` says."""
        return bool(registry.find("algorithms", self.algorithm.name).uses_drs)

    @property
    def black_box(self) -> bool:
        """Whether rewards are asked for whose model has no gradient: it need not sit on a trainer, actors can score for it."""
        return self.needs_reward and self.reward is not None and not differentiable(self.reward)

    @property
    def pools(self) -> dict[str, Component]:
        """The rewards that pools of actors score while training lasts, by key: those :attr:`in_actors`, a black box whole."""
        if self.reward is None or not self.black_box:
            return self.in_actors
        return self.in_actors or {"reward": self.reward}

    def pool(self, key: str) -> Actors:
        """What is asked of the actors of :attr:`pools`' ``key``, with `workers` for what it leaves open."""
        own, usual = getattr(self.pools[key], "actors", Actors()), self.workers
        usual_of = {"count": usual.rewards, "cpus": usual.reward_cpus, "gpus": usual.reward_gpus}
        return own.model_copy(update={k: v for k, v in usual_of.items() if getattr(own, k) is None})

    @property
    def in_actors(self) -> dict[str, Component]:
        """The rewards, or parts of a composite, that say so (`placement`): only on Ray, where a black box may be anywhere."""
        if self.reward is None or not self.needs_reward:
            return {}
        whole = placement(self.reward)
        return {k: v for k, v in leaves("reward", self.reward).items() if "actors" in (whole, placement(v))}

    @property
    def sizes(self) -> Sizes:
        """Sizes that follow from the rest."""
        share = self.train.batch // self.workers.train
        micro = self.train.at_once or share
        method = registry.find("algorithms", self.algorithm.name)
        assistant_updates = self.train.assistant_updates if method.needs_assistant else 0
        warmup = min(self.train.assistant_warmup, self.train.steps) if assistant_updates else 0
        return Sizes(
            share=share,
            micro_batch=micro,
            accumulation=share // micro,
            total_prompts=self.train.batch * self.train.steps,
            assistant_updates=assistant_updates,
            generator_updates=self.train.steps - warmup,
            updates_per_step=assistant_updates + 1,
        )


def leaves(key: str, reward: Component) -> dict[str, Component]:
    """``reward`` by its key; of a composite, its parts by theirs."""
    parts = getattr(reward, "parts", None)
    return {f"{key}.parts[{n}].reward": part.reward for n, part in enumerate(parts)} if parts else {key: reward}


def placement(reward: Component) -> str:
    """Where its model is: "local" or "actors"."""
    return getattr(reward, "placement", "local")


def differentiable(reward: Component) -> bool:
    """Whether the configured reward has a gradient; of a composite, whether all its parts have."""
    return all(registry.find("rewards", leaf.name).differentiable for leaf in leaves("", reward).values())


class Sizes(Strict):
    """Derived sizes, for the loop and for `didr config show`."""

    share: int
    micro_batch: int
    accumulation: int
    total_prompts: int
    assistant_updates: int  # a step; 0 where the algorithm needs no TA
    generator_updates: int  # in the run: its steps without the TA's warm-up
    updates_per_step: int
