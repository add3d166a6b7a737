"""The run's configuration: frozen pydantic models, YAML recipes with one `base:` each, and `--set a.b=c`.

Unknown keys are errors that name the nearest key. Sizes that follow from others are computed here, once (:class:`Sizes`).
Components (algorithm, backbone, reward) bring their own small ``Config``, found by :mod:`didr_core.registry`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from didr_core import registry
from didr_core.components import WORLD, Component, Strict, build, component, locate
from didr_core.contracts import DIDRError
from didr_core.proxy import DRP
from didr_core.roles import Roles

__all__ = [
    "DRP",
    "WORLD",
    "Component",
    "Config",
    "Strict",
    "build",
    "component",
    "differentiable",
    "dump",
    "flatten",
    "load",
    "locate",
    "validate",
]

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"


class Data(Strict):
    """Prompt shards: a Parquet file, a folder of them, or a glob; read as a stream, never whole."""

    prompts: str = Field(description="training prompts")
    heldout: str | None = Field(None, description="held-out prompts, for grids and scores")
    column: str = Field("prompt", description="text column")
    id_column: str = Field("id", description="optional id column; 'shard:row' when absent")


class Guidance(Strict):
    """Classifier-free guidance scales ``w`` in ``D(null) + w (D(c) - D(null))``; 1 = none."""

    reference: float = Field(4.0, ge=0)
    assistant: float = Field(1.0, ge=0)


class Times(Strict):
    """Ranges of t in [0, 1] that the two losses draw from."""

    generator: tuple[float, float] = (0.02, 0.98)
    assistant: tuple[float, float] = (0.0, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Times:
        for key, (low, high) in (("generator", self.generator), ("assistant", self.assistant)):
            if not 0 <= low < high <= 1:
                raise ValueError(f"times.{key}=[{low}, {high}]: expected 0 <= low < high <= 1")
        return self


class Optim(Strict):
    """Adam settings of one network."""

    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: 8-bit moments (bitsandbytes)")
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(10.0, gt=0, description="gradient norm")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    decay: float = Field(
        0.0, ge=0, le=1, description="share of the run, at its end, over which the rate falls linearly to zero"
    )


class Anchor(Strict):
    """Regression to stored teacher pairs kept on during matching: holds the modes that plain matching loses."""

    pairs: str
    weight: float = Field(gt=0)
    batch: int = Field(24, ge=1, description="pairs an update, over all workers")


class Train(Strict):
    """How long and how much at once. `batch` is global: workers and micro-batches only divide it."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    micro_batch: int | None = Field(
        None, ge=1, description="samples a forward pass; none = the whole share of a worker"
    )
    assistant_updates: int = Field(2, ge=1, description="TA updates a generator update")
    assistant_warmup: int = Field(0, ge=0, description="first iterations that train the TA alone")
    ema: float = Field(0.98, ge=0, lt=1)
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    anchor: Anchor | None = None
    threads: int = Field(1, ge=1, description="CPU threads of each worker")


class Workers(Strict):
    """Who runs where (Ray). CPUs count on a laptop, GPUs and custom resources on a cluster."""

    train: int = Field(1, ge=1)
    train_cpus: float = Field(1, ge=0)
    train_gpus: float = Field(0, ge=0)
    train_resources: dict[str, float] = Field(default_factory=dict)
    encoders: int = Field(1, ge=1, description="prompt-encoder actors")
    encoder_cpus: float = Field(0.5, ge=0)
    encoder_gpus: float = Field(0, ge=0)
    rewards: int = Field(1, ge=1, description="reward-model actors")
    reward_cpus: float = Field(0.5, ge=0)
    reward_gpus: float = Field(0, ge=0)
    actor_resources: dict[str, float] = Field(default_factory=dict)
    local_cpus: int = Field(4, ge=2, description="CPUs that a Ray started on this machine is told it has")
    max_failures: int = Field(2, ge=0, description="restarts of the worker group from the last checkpoint")


class Baseline(Strict):
    """Pictures of the starting generator per prompt that standardise the reward."""

    samples: int = Field(2, ge=2)


class Evaluation(Strict):
    """What a run shows and scores of itself."""

    grid: int = Field(16, ge=1, description="held-out prompts in the before/after grid")
    prompts: int = Field(256, ge=0, description="held-out prompts scored at the end; 0 = none")
    seeds: int = Field(1, ge=1)
    world: Literal["none", "tiny"] = Field(
        "none", description="'tiny': captions of the bundled world, so the analytic checker judges too"
    )
    teacher_steps: int = Field(0, ge=0, description="DDIM steps of the guided reference in the table; 0 = not in it")
    control: str | None = Field(
        None, description="folder of a finished run to compare with: the same one without the reward (diff_instruct)"
    )
    every: int = Field(0, ge=0, description="steps between grids during training; 0 = start and end only")


class Tracking(Strict):
    """MLflow. `uri: none` tracks nothing; empty = sqlite beside the runs."""

    uri: str = ""
    experiment: str = "didr"


class Config(Strict):
    """One run, whole."""

    name: str
    seed: int = Field(0, ge=0)
    output: str = Field("runs", description="folder that run folders are made in (a shared or cloud path on clusters)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backbone: Annotated[SerializeAsAny[Component], component("backbones")]
    algorithm: Annotated[SerializeAsAny[Component], component("algorithms")]
    reward: Annotated[SerializeAsAny[Component] | None, component("rewards")] = None
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
    tracking: Tracking = Tracking()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels between processes as its plain tree: a component that lives in a file is found again by its path over there."""
        return validate, (dump(self),)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        method = registry.find("algorithms", self.algorithm.name)
        if method.needs_reward and self.reward is None:
            raise ValueError(f"reward: algorithm {self.algorithm.name!r} needs one, got none; name one, e.g. pickscore")
        if self.reward and not differentiable(self.reward):
            if getattr(method, "needs_reward_gradient", False):
                raise ValueError(
                    f"reward.name={self.reward.name!r}: has no gradient, which algorithm {self.algorithm.name!r} needs; name a"
                    " differentiable reward, or say algorithm=didr and drp.estimator=importance"
                )
            if getattr(method, "uses_drs", False) and self.drp.estimator != "importance":
                raise ValueError(
                    f"reward.name={self.reward.name!r}: has no gradient, which drp.estimator={self.drp.estimator!r} needs; name a"
                    " differentiable reward, or say drp.estimator=importance"
                )
        if self.train.batch % self.workers.train:
            raise ValueError(
                f"train.batch={self.train.batch} does not divide by workers.train={self.workers.train}; every worker takes an equal share"
            )
        share = self.train.batch // self.workers.train
        if self.train.micro_batch and share % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch={self.train.micro_batch} does not divide a worker's share of {share} samples"
            )
        return self

    @property
    def sizes(self) -> Sizes:
        """Sizes that follow from the rest."""
        share = self.train.batch // self.workers.train
        micro = self.train.micro_batch or share
        method = registry.find("algorithms", self.algorithm.name)
        assistant_updates = self.train.assistant_updates if getattr(method, "needs_assistant", True) else 0
        return Sizes(
            share=share,
            micro_batch=micro,
            accumulation=share // micro,
            total_prompts=self.train.batch * self.train.steps,
            assistant_updates=assistant_updates,
            updates_per_step=assistant_updates + 1,
        )


def differentiable(reward: Component) -> bool:
    """Whether the configured reward has a gradient; of a composite, whether all its parts have."""
    parts = getattr(reward, "parts", None)
    if parts:
        return all(differentiable(part.reward) for part in parts)
    return bool(registry.find("rewards", reward.name).differentiable)


class Sizes(Strict):
    """Derived sizes, for the loop and for `didr config show`."""

    share: int
    micro_batch: int
    accumulation: int
    total_prompts: int
    assistant_updates: int  # 0 where the algorithm needs no TA
    updates_per_step: int


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe's name (in `pipelines/recipes`) or a YAML file's path, with ``a.b=c`` overrides on top.

    Raises:
        DIDRError: unknown recipe or key (names the nearest), or a value out of its range.
    """
    tree = _read(recipe)
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise DIDRError(f"--set {item!r}: expected KEY=VALUE, e.g. --set drp.beta=0.5")
        _assign(tree, key.strip(), yaml.safe_load(text))
    return validate(tree, where=f"recipe {recipe!r}")


def validate(tree: Mapping[str, Any], where: str = "config") -> Config:
    """A plain tree to a Config, with errors in words."""
    try:
        return Config(**tree)
    except ValidationError as error:
        raise DIDRError("\n".join(_explain(e, where) for e in error.errors())) from error


def dump(config: Config) -> dict[str, Any]:
    """The resolved tree, as plain YAML/JSON values; `validate(dump(c)) == c`."""
    return config.model_dump(mode="json")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``, for trackers and tables."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(recipe: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if recipe in seen:
        raise DIDRError(f"recipe {recipe!r}: `base:` goes in a circle: {' -> '.join((*seen, recipe))}")
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(recipe, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DIDRError(f"recipe: unknown {recipe!r}; known: {', '.join(known)}, or a path ending in .yaml.{hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DIDRError(f"recipe {recipe!r}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise DIDRError(f"recipe {recipe!r}: expected a mapping at the top, got {type(tree).__name__}")
    base = tree.pop("base", None)
    return _merge(_read(base, (*seen, recipe)), tree) if base else tree


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``; a component whose name changes replaces the whole section."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        renamed = (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("name", old.get("name")) != old.get("name")
        )
        merged[key] = (
            _merge(dict(old), value)
            if isinstance(value, Mapping) and isinstance(old, Mapping) and not renamed
            else value
        )
    return merged


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    if not rest:
        named = isinstance(value, str) and head in ("algorithm", "reward", "judge", "backbone")
        tree.update(_merge(tree, {head: {"name": value} if named else value}))
        return
    below = tree.setdefault(head, {})
    if not isinstance(below, dict):
        tree[head] = below = {"name": below} if isinstance(below, str) else {}
    _assign(below, rest, value)


def _explain(error: Any, where: str) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _known_keys(), 1, 0.5) or difflib.get_close_matches(
            key.rpartition(".")[2], [k.rpartition(".")[2] for k in _known_keys()], 1
        )
        hint = f" Did you mean {near[0]!r}?" if near else " See `didr config show`."
        return f"{where}: unknown key {key!r} (value {error['input']!r}).{hint}"
    if error["type"] == "missing":
        return f"{where}: {key!r} is missing; it has no default."
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {key}: {message}" + (
        f" (got {error['input']!r})" if not isinstance(error["input"], Mapping) else ""
    )


def _known_keys(model: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in (model or Config).model_fields.items():
        keys.append(prefix + name)
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel) and part is not Component:
                keys += _known_keys(part, f"{prefix}{name}.")
    return keys
