"""The sections of a recipe, each a frozen pydantic model: what a key means, what it may be, rules between keys of one section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from didr_core.config import registry
from didr_core.config.registry import Strict


class Data(Strict):
    """Prompts: a file, a folder or a glob; Parquet is read as a stream, other kinds (data/readers.py) whole."""

    prompts: str = Field(description="training prompts")
    heldout: str | None = Field(None, description="held-out prompts, for grids and scores")
    column: str = Field("prompt", description="text column")
    id_column: str = Field("id", description="optional id column; 'shard:row' when absent")
    allow_overlap: bool = Field(False, description="held-out prompts may be training prompts too; else a run refuses")
    cache: str | None = Field(
        None,
        description="folder that prompt embeddings and baselines are kept in, for any number of runs; none = `cache` beside "
        "the run where workers.precompute says so, else nothing is kept",
    )


class Guidance(Strict):
    """Classifier-free guidance scales ``w`` in ``D(null) + w (D(c) - D(null))``; 1 = none."""

    reference: float = Field(4.0, ge=0, description="of the reference's score, which the generator is drawn to")
    assistant: float = Field(1.0, ge=0, description="of the teaching assistant's")


class Times(Strict):
    """Ranges of t in [0, 1] that the two losses draw from."""

    generator: tuple[float, float] = Field((0.02, 0.98), description="of the generator's update")
    assistant: tuple[float, float] = Field((0.0, 1.0), description="of the teaching assistant's denoising loss")

    @model_validator(mode="after")
    def _ordered(self) -> Times:
        for key, (low, high) in (("generator", self.generator), ("assistant", self.assistant)):
            if not 0 <= low < high <= 1:
                raise ValueError(f"times.{key}=[{low}, {high}]: expected 0 <= low < high <= 1")
        return self


class Optim(Strict):
    """Adam settings of one network."""

    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: 8-bit moments (bitsandbytes)")
    lr: float = Field(gt=0, description="learning rate")
    betas: tuple[float, float] = Field((0.0, 0.99), description="Adam's; a first of 0 keeps one moment less")
    eps: float = Field(1e-8, gt=0, description="Adam's, below which a gradient moves nothing")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as AdamW's")
    max_grad_norm: float = Field(10.0, gt=0, description="gradients are clipped to this norm")
    warmup: int = Field(0, ge=0, description="the network's own first updates, over which its rate rises linearly")
    decay: float = Field(
        0.0, ge=0, le=1, description="share of the run, at its end, over which the rate falls linearly to zero"
    )


class Anchor(Strict):
    """Regression to stored teacher pairs kept on during matching: holds the modes that plain matching loses."""

    pairs: str = Field(description="file of noise and teacher latents, which `didr pairs` makes")
    weight: float = Field(gt=0, description="of the regression loss beside the matching one")
    batch: int = Field(24, ge=1, description="pairs an update, over all workers")


class Train(Strict):
    """How long and how much at once. `batch` is global: workers and micro-batches only divide it."""

    steps: int = Field(ge=1, description="iterations: TA updates and one of the generator, warm-up included")
    batch: int = Field(ge=1, description="prompts an iteration, over all workers")
    micro_batch: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="samples a forward pass; auto = as many as fit on the GPU, decided before the run starts; none = the whole share "
        "of a worker",
    )
    assistant_updates: int = Field(2, ge=1, description="TA updates a generator update")
    assistant_warmup: int = Field(0, ge=0, description="first iterations that train the TA alone")
    ema_decay: float = Field(0.98, ge=0, lt=1, description="of the generator's running average, which is exported")
    checkpoint_every: int = Field(100, ge=1, description="iterations; what a crash can cost")
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones")
    anchor: Anchor | None = Field(None, description="regression to stored teacher pairs beside matching")
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

    generator: Dtype = Field("float32", description="of the generator")
    assistant: Dtype = Field("float32", description="of the teaching assistant")
    reference: Dtype = Field("float32", description="of the reference, frozen")


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
        0.45, gt=0, description="hybrid: sigma / alpha at and below which the posterior is taken to have one mode"
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

    train: int = Field(
        1, ge=1, description="workers that train; [2, 8]: eight, as few as two (train_min) while nodes are missing"
    )
    train_min: int | None = Field(None, ge=1, description="fewest workers to go on with where nodes left; none = train")
    train_cpus: float = Field(1, ge=0, description="CPUs of each")
    train_gpus: float = Field(0, ge=0, description="GPUs of each; a part of one where it is shared")
    train_resources: dict[str, float] = Field(
        default_factory=dict, description="custom resources of each, e.g. {trainer: 1}"
    )
    encoders: int = Field(1, ge=1, description="prompt-encoder actors")
    encoder_cpus: float = Field(0.5, ge=0, description="CPUs of each encoder actor")
    encoder_gpus: float = Field(0, ge=0, description="GPUs of each encoder actor")
    rewards: int = Field(1, ge=1, description="reward-model actors")
    reward_cpus: float = Field(0.5, ge=0, description="CPUs of each reward actor")
    reward_gpus: float = Field(0, ge=0, description="GPUs of each reward actor")
    actor_resources: dict[str, float] = Field(
        default_factory=dict, description="custom resources of every actor, e.g. {reward: 1}"
    )
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

    @model_validator(mode="before")
    @classmethod
    def _range(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("train"), list | tuple):
            if len(given["train"]) != 2:
                raise ValueError(f"train={given['train']}: expected a number of workers, or [fewest, most]")
            least, most = given["train"]
            return given | {"train": most, "train_min": least}
        return given


class Baseline(Strict):
    """Pictures of the starting generator per prompt that standardise the reward."""

    samples: int = Field(2, ge=2, description="pictures a prompt")


class Evaluation(Strict):
    """What a run shows and scores of itself."""

    grid: int = Field(16, ge=1, description="held-out prompts in the before/after grid")
    prompts: int = Field(256, ge=0, description="held-out prompts scored at the end; 0 = none")
    seeds: int = Field(1, ge=1, description="noises a held-out prompt; diversity needs two")
    world: Literal["none", "tiny"] = Field(
        "none", description="'tiny': captions of the bundled world, so the analytic checker judges too"
    )
    teacher_steps: int = Field(0, ge=0, description="DDIM steps of the guided reference in the table; 0 = not in it")
    control: str | None = Field(
        None,
        description="finished run to compare with, the same without the reward (diff_instruct); or its kept scores, a .json",
    )
    every: int = Field(0, ge=0, description="steps between looks (grid, held-out measures) during training; 0 = none")
    watch: int = Field(64, ge=0, description="held-out prompts of a look, two noises each; 0 = grids alone")


class Tracking(Strict):
    """MLflow. `uri: none` tracks nothing; empty = MLFLOW_TRACKING_URI of the environment, else sqlite beside the runs."""

    uri: str = Field(
        "",
        description="MLflow's address; none = track nothing; empty = MLFLOW_TRACKING_URI, else sqlite beside the runs",
    )
    experiment: str = Field(
        "didr", description="the MLflow experiment (Weights & Biases: project) that runs are listed under"
    )
    also: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="trackers beside MLflow, each a package to install"
    )
    system: bool = Field(True, description="CPU, memory and GPU use of the driver's machine in MLflow, every 10 s")
    weights: bool = Field(
        False, description="the exported weights in MLflow's model, too, not its card and configs alone"
    )
