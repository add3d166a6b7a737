"""What everyone shares: the few Protocols and frozen dataclasses that the packages of `didr_core` speak through.

Shape legend, used in every file: ``B`` batch, ``M`` particles, ``K`` denoising steps, ``C H W`` latent or image axes.
A latent tensor is ``[B, *latent_shape]``; an image tensor is ``[B, 3, H, W]`` in ``[0, 1]``; times are ``[B]`` in ``[0, 1]``
(0 = clean, 1 = pure noise) whatever the family, see :mod:`didr_core.diffusion.schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:  # every one of Ray's helper processes imports this module, and torch takes a second
    import torch
    from torch import Tensor, nn

Tensors: TypeAlias = "Mapping[str, Tensor]"
Scored: TypeAlias = "tuple[Tensor, Tensors]"
"""``(score [B], {name: [B]})``, the latter values for the logs."""
Begin: TypeAlias = "Callable[[Tensor, Tensors, Tensor | None], Callable[[], Scored]]"


class DIDRError(Exception):
    """A mistake that the user can mend: the message names the key, the value, what was expected and the fix."""


class NonFiniteError(DIDRError):
    """A loss or a reward is NaN or infinite. Carries the prompt ids; the last good checkpoint is untouched."""


class NoAnswerError(DIDRError):
    """A process or thread hangs. Who tells it ends the process hard: an ordinary exit would wait for the thread."""


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told about ``B`` prompts: named tensors, each with leading axis ``B``."""

    tensors: Tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Condition:
        """Apply ``fn`` to every tensor."""
        return Condition({k: fn(v) for k, v in self.tensors.items()})

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return self.map(lambda v: v[rows])

    def tile(self, times: int) -> Condition:
        """Particle-major repetition: ``[B, ...] -> [times * B, ...]``."""
        return self if times == 1 else self.map(lambda v: v.repeat(times, *([1] * (v.dim() - 1))))

    def cat(self, other: Condition) -> Condition:
        """Concatenate along the batch."""
        import torch

        return Condition({k: torch.cat([v, other.tensors[k]]) for k, v in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """Move what networks compute with. Integers (lengths) stay on the host, which reads them: it would wait for a GPU's."""
        return self.map(lambda v: v.to(device) if v.is_floating_point() else v)


@dataclass(frozen=True)
class Batch:
    """One training batch, made by the prompt pipeline. Everything has leading axis ``B``.

    ``index`` is the global sample index: position in the endless, seeded prompt stream. All random numbers of a sample are
    derived from it, so that the update does not depend on how many workers share the batch.
    ``baseline`` / ``spread`` are the mean and the unbiased variance of the raw reward over a few pictures that the *starting* generator
    makes for the prompt; they standardise rewards, so that beta means the same for every reward.
    """

    index: Tensor  # [B] int64, on the host: random numbers are drawn there
    ids: Sequence[str]
    prompts: Sequence[str]
    condition: Condition
    reward_inputs: Tensors = field(default_factory=dict)  # what Reward.prepare made of the prompts
    baseline: Tensor | None = None  # [B] float32
    spread: Tensor | None = None  # [B] float32, variance

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """Some samples: a slice, or their numbers ``[b]``, on the host."""
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        ids, prompts = ([values[i] for i in numbers] for values in (self.ids, self.prompts))
        return replace(self.map(lambda v: v[rows]), index=self.index[rows], ids=ids, prompts=prompts)

    def to(self, device: torch.device | str) -> Batch:
        """Move tensors to ``device``, all but ``index`` and the condition's integers."""
        rest = replace(self, condition=Condition({})).map(lambda v: v.to(device))
        return replace(rest, condition=self.condition.to(device))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Apply ``fn`` to every tensor but ``index``."""
        return replace(
            self,
            condition=self.condition.map(fn),
            reward_inputs={k: fn(v) for k, v in self.reward_inputs.items()},
            baseline=None if self.baseline is None else fn(self.baseline),
            spread=None if self.spread is None else fn(self.spread),
        )


class Schedule(Protocol):
    """Forward process ``x_t = alpha_t x0 + sigma_t eps`` with t in [0, 1]."""

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``t [B] -> (alpha [B], sigma [B])``, float32 or better."""


class Backbone(Protocol):
    """A model family: how its networks are loaded, called, decoded and exported. One file each in `backbones/`."""

    schedule: Schedule
    latent_shape: tuple[int, ...]
    lora_targets: tuple[str, ...] | None  # layers that adapters go on; None: every linear and convolution layer
    usage: str  # the model card's code; empty: none
    fingerprint: Callable[[Literal["text", "start"]], str] | None
    """A hash of what :meth:`encode`, or the starting generator's pictures, follow from; None: of all that the config names."""

    def to(self, device: torch.device | str) -> None:
        """Move decoder and text towers; networks are moved by those who hold them."""

    def check(self) -> None:
        """Cheap look at the weights folders (preflight). Raises DIDRError when they are not what the config says."""

    def tokenizers(self) -> Mapping[Path, int] | None:
        """Folders of tokenizers, and how many tokens of a prompt are read, for a count of the prompts that are cut."""

    def load_network(self, role: str) -> nn.Module:
        """Load ``role`` in {"generator", "reference", "assistant"}, float32, eval mode."""

    def load_decoder(self) -> None:
        """Make :meth:`decode` usable (latents -> images)."""

    def load_text(self) -> None:
        """Make :meth:`encode` usable. Who calls it on a trainer calls :meth:`free_text` before training goes on."""

    def free_text(self) -> None:
        """Let go of what :meth:`load_text` loaded: text towers never sit on a trainer."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts to conditions, without grad."""

    def null(self, like: Condition) -> Condition:
        """The unconditional condition, as many rows as ``like``."""

    def x0(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Denoiser prediction converted to ``x0``: the only place where eps, v or flow is known. Float32 in and out, cast here to what
        ``network`` computes in."""

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        """One-step generator: noise ``z ~ N(0, I)`` to a clean latent."""

    def decode(self, latent: Tensor) -> Tensor:
        """Latents to images ``[B, 3, H, W]`` in [0, 1], differentiable."""

    def export(self, generator: nn.Module, folder: str) -> None:
        """Write what stock diffusers loads, and the single-file weights."""


class Reward(Protocol):
    """A score of pictures given prompts; higher is better. One file each in `rewards/`."""

    differentiable: bool
    details: Callable[[Tensor, Tensors], Scored] | None
    """Of a reward made of others: values for the logs beside the score."""
    begin: Begin | None
    """Of a reward that is scored elsewhere (`rewards/remote.py`): ``(images, inputs, weight)`` go out, and who calls what it gives waits
    for the answer; None: the reward is here. ``weight`` ``[B]`` is the gradient of the loss in each score, where it is known."""
    features: Callable[[Tensor], Tensor] | None
    """Picture features ``[B, F]``, for distances between models."""

    def check(self) -> None:
        """Cheap look at the weights (preflight). Raises DIDRError when they are not what the config says."""

    def tokenizers(self) -> Mapping[Path, int] | None:
        """As a backbone's."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load weights; `prepare` and `score` need it."""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text features ``{name: [B, ...]}``; runs in reward-model actors, once per prompt."""

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``images [B, 3, H, W]`` in [0, 1] -> raw scores ``[B]`` on the published scale."""


class GeneratorContext(Protocol):
    """What the learner offers to an algorithm's generator loss. Networks are evaluated only when a method is called."""

    x0: Tensor  # generator's output, with grad
    t: Tensor  # [B]
    x_t: Tensor  # x0 diffused to t, with grad through x0
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]

    def assistant(self, grad: bool = False) -> Tensor:
        """``D_psi(x_t, t, c)``; with ``grad``, differentiable in ``x_t`` (never in the network's weights)."""

    def reference(self, grad: bool = False) -> Tensor:
        """Guided ``D~_ref(x_t, t, c)``; without grad it is shared with the DRP's first evaluation."""

    def drs(self) -> Tensor:
        """The Diffused Reward Score ``s_r(x_t)``, gated and clipped, without grad."""

    def reward(self, latent: Tensor) -> Tensor:
        """Standardised reward ``[B]`` of clean latents, differentiable."""


class Algorithm(Protocol):
    """One method: its equations and nothing else. One file each in `algorithms/`."""

    needs_reward: bool
    needs_reward_gradient: bool  # False: the reward may be a black box
    needs_assistant: bool  # False: the TA is not trained
    uses_drs: bool  # asks for ``ctx.drs()``, so that the estimator's needs are checked

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss ``[B]`` and per-sample metrics ``{name: [B]}``."""


def _nothing(*_: Any) -> None:
    """Stands for a method that a component leaves out."""


OPTIONAL: Mapping[str, Mapping[str, Any]] = {
    "algorithms": {"needs_reward_gradient": False, "needs_assistant": True, "uses_drs": False},
    "backbones": {
        **{"lora_targets": None, "usage": "", "fingerprint": None},
        **dict.fromkeys(("to", "check", "free_text", "tokenizers"), _nothing),
    },
    "rewards": {"details": None, "begin": None, "features": None, "check": _nothing, "tokenizers": _nothing},
    "drs": {},
}
"""What a component may leave out, by kind, and what it then has: :func:`didr_core.config.registry.find` fills it in."""


@dataclass(frozen=True)
class StepReport:
    """What one iteration says of itself: global means, the same on every rank."""

    step: int
    metrics: dict[str, float]
    alarms: tuple[str, ...] = ()


class Parallel(Protocol):
    """The collective calls that the learner needs; :class:`didr_core.train.distributed.Single` when there is one process."""

    rank: int
    world_size: int

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average in place over ranks."""
