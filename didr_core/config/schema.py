"""What a run may be told: frozen pydantic models; unknown keys are errors. Sizes that follow are computed here, once (:class:`Sizes`).

Components (algorithm, backbone, reward) bring their own small ``Config``, found by :mod:`didr_core.config.registry`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializeAsAny, field_validator, model_validator

from didr_core.config import registry
from didr_core.config.files import expanded
from didr_core.config.registry import Component, Strict, component
from didr_core.types import DIDRError

if TYPE_CHECKING:
    import torch


class Data(Strict):
    """Prompt shards: a Parquet file, a folder of them, or a glob; read as a stream, never whole."""

    prompts: str = Field(description="training prompts")
    heldout: str | None = Field(None, description="held-out prompts, for grids and scores")
    column: str = Field("prompt", description="text column")
    id_column: str = Field("id", description="optional id column; 'shard:row' when absent")
    cache: str | None = Field(
        None,
        description="folder that prompt embeddings and baselines are kept in, for any number of runs; none = `cache` beside "
        "the run where workers.precompute says so, else nothing is kept",
    )


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
    max_grad_norm: float = Field(10.0, gt=0, description="gradients are clipped to this norm")
    warmup: int = Field(0, ge=0, description="the network's own first updates, over which its rate rises linearly")
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
    micro_batch: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="samples a forward pass; auto = as many as fit on the GPU, decided before the run starts; none = the whole share "
        "of a worker",
    )
    assistant_updates: int = Field(2, ge=1, description="TA updates a generator update")
    assistant_warmup: int = Field(0, ge=0, description="first iterations that train the TA alone")
    ema_decay: float = Field(0.98, ge=0, lt=1)
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    anchor: Anchor | None = None
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    compile: Literal["auto", "none", "blocks"] = Field(
        "auto",
        description="blocks: torch.compile of the blocks that a network repeats, while it trains; auto: on GPUs, where there are many",
    )

    @property
    def at_once(self) -> int | None:
        """`micro_batch` as a number; None = the whole share, and so is an "auto" that nobody has decided."""
        return None if self.micro_batch == "auto" else self.micro_batch


Kind = Literal["full", "lora"]
Dtype = Literal["float32", "bfloat16"]
Recompute = bool | Literal["generator", "auto"]
"""In which updates activations are recomputed: in none (nor by an "auto" still undecided), in the generator's, in the TA's too."""


class Dtypes(Strict):
    """Type of the weights that forward and backward passes read, by role. An adapter has the type of its base."""

    generator: Dtype = "float32"
    assistant: Dtype = "float32"
    reference: Dtype = "float32"


class Roles(Strict):
    """How the three networks share weights, and in what precision they are held."""

    generator: Kind = Field("full", description="full: all weights train; lora: an adapter on the frozen start")
    assistant: Kind = Field("full", description="full: a copy of the reference; lora: an adapter on the reference")
    rank: int = Field(64, ge=1, description="LoRA rank")
    alpha: float | None = Field(None, gt=0, description="LoRA scale is alpha / rank; none = rank, scale 1")
    targets: tuple[str, ...] | str | None = Field(
        None, description="layers with adapters: endings of their names, or one regular expression; none = the family's"
    )
    dtype: Dtypes = Field(Dtypes(), description="one type for all, or by role")
    update: Literal["master", "stochastic"] = Field(
        "master",
        description="how bfloat16 weights move: a float32 master copy, or stochastic rounding (full networks only; less memory)",
    )
    gradient_checkpointing: Recompute = Field(
        False,
        description="recompute activations in backward: less memory, one forward more; generator = in its updates alone, not the TA's; "
        "auto = where memory asks for it, decided before the run starts",
    )
    fsdp: bool = Field(
        False,
        description="split fully trained networks over the workers (FSDP2): weights, gradients, moments, masters and average",
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return dict.fromkeys(Dtypes.model_fields, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_be_split(self) -> Roles:
        if self.fsdp and "full" not in (self.generator, self.assistant):
            raise ValueError("fsdp=true: generator and assistant are adapters, which are not split. Use fsdp=false.")
        if self.fsdp and self.update == "stochastic":
            raise ValueError(
                "fsdp=true with update=stochastic: split weights are not rounded stochastically. Use update=master, "
                "whose copy is split, too."
            )
        return self


class DRP(Strict):
    """The diffused reward proxy: how s_r is estimated (docs/method.md)."""

    estimator: str = Field("hybrid", description="a file of didr_core/drs, package.module:Class or file.py:Class")
    beta: float = Field(
        1.0, gt=0, description="reward-tilt temperature, in standard deviations of the starting generator's reward"
    )
    steps: int = Field(ge=1, description="K, denoising steps from x_t to x0; default by estimator")
    particles: int = Field(ge=1, description="M, for stochastic, importance and hybrid; default by estimator")
    split_noise: float = Field(
        0.325, gt=0, description="hybrid: sigma / alpha at and below which the posterior is taken to have one mode"
    )
    reach: float = Field(
        10.0, gt=0, description="shift, hybrid: longest shift of an x_t, in standard deviations of its noise"
    )
    guidance: float | None = Field(None, ge=0, description="guidance scale inside the proxy; none = the reference's")
    snr_gate: bool = Field(False, description="multiply s_r by alpha_t^2: silent where the posterior has many modes")
    clip: float | None = Field(
        None,
        gt=0,
        description="cap of the rms of s_r per sample, as a multiple of the rms of the reference's own score",
    )
    gradient_checkpointing: bool = Field(
        False, description="ode: recompute each step in backward; memory of one step for any K"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_estimator(cls, given: Any) -> Any:
        if not isinstance(given, dict):  # told below
            return given
        method = registry.find("drs", given.get("estimator", cls.model_fields["estimator"].default))
        return {"steps": method.steps, "particles": method.particles} | given

    @model_validator(mode="after")
    def _consistent(self) -> DRP:
        registry.find("drs", self.estimator).check(self.steps, self.particles)
        return self


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
    precompute: bool | None = Field(
        None,
        description="encoder and reward actors make all that the run needs (data.cache) and leave before training starts; none = "
        "where they would share the trainer's one GPU",
    )
    local_cpus: int = Field(4, ge=2, description="CPUs that a Ray started on this machine is told it has")
    patience_s: float = Field(
        1800, gt=0, description="seconds without an answer of a process after which the run names it and stops"
    )
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
    """MLflow. `uri: none` tracks nothing; empty = MLFLOW_TRACKING_URI of the environment, else sqlite beside the runs."""

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
        return _from_tree, (self.model_dump(mode="json"),)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        method = registry.find("algorithms", self.algorithm.name)
        if method.needs_reward and self.reward is None:
            raise ValueError(f"reward: algorithm {self.algorithm.name!r} needs one, got none; name one, e.g. pickscore")
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
        folder = self.data.cache or (f"{self.output}/cache" if self.precomputed else None)
        return expanded(folder).resolve() if folder else None

    @property
    def needs_reward(self) -> bool:
        """Whether the algorithm asks for rewards, and so for what is prepared for them."""
        return bool(registry.find("algorithms", self.algorithm.name).needs_reward)

    @property
    def black_box(self) -> bool:
        """Whether rewards are asked for whose model has no gradient: it need not sit on a trainer, actors can score for it."""
        return self.needs_reward and self.reward is not None and not differentiable(self.reward)

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


def _from_tree(tree: dict[str, Any]) -> Config:
    return Config(**tree)


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
    assistant_updates: int  # a step; 0 where the algorithm needs no TA
    generator_updates: int  # in the run: its steps without the TA's warm-up
    updates_per_step: int
