"""Many trainings of one recipe at once, by the learner's own update: networks this small wait for Python, and replicas wait together.

Replicas differ in their seed, and in the weight and the margin of the reward. Their networks are stacked, the rows of a batch belong to
them in turn (``[R * B]``, replica-major), and :class:`didr_core.train.learner.Learner` does not know. Its losses are a sample's own, so a
replica's gradient is, too; what is not is told apart here: random numbers (:class:`EachSeed`), and the mean over a batch and the clip of
gradients (:class:`EachAlone`). Every replica ends where it would alone, to rounding (`benchmarks/tests/test_replicas.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.exact_world import BatchNoise, batches
from didr_core import drs
from didr_core.backbones.gaussian_mixture import GaussianMixture
from didr_core.config import Config, build
from didr_core.diffusion.noise import Noise
from didr_core.train.learner import Learner
from didr_core.types import Reward, Tensors


@dataclass(frozen=True)
class Replica:
    """One training: what is followed is ``weight * (r - margin)``."""

    seed: int
    weight: float = 1.0
    margin: float = 0.0


class Stacked(nn.Module):
    """``copies`` of one network with weights of their own ``[R, ...]``; each takes its share of the rows of the arguments."""

    def __init__(self, network: nn.Module, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.names = [name for name, _ in network.named_parameters()]
        self.weights = nn.ParameterList(p.detach().expand(copies, *p.shape).clone() for p in network.parameters())
        self.shape = [network]  # in a list: its own weights are nobody's parameters

    def forward(self, *args: Tensor) -> Tensor:
        """``[R * B, ...]`` to ``[R * B, ...]``."""
        weights = [value.unbind(0) for value in self.weights]
        shares = zip(*(a.chunk(self.copies) for a in args), strict=True)
        return torch.cat(
            [
                functional_call(self.shape[0], dict(zip(self.names, (w[i] for w in weights), strict=True)), share)
                for i, share in enumerate(shares)
            ]
        )


class Family(GaussianMixture):
    """The mixture's own networks, those that are trained ``copies`` times."""

    def __init__(self, config: GaussianMixture.Config, copies: int) -> None:
        super().__init__(config)
        self.copies = copies

    def load_network(self, role: str) -> nn.Module:
        """As the base, stacked."""
        network = super().load_network(role)
        return network if role == "reference" else Stacked(network, self.copies)


class Weighted:
    """A reward of which every replica's rows have their own multiple, from their own margin."""

    differentiable = True
    details = features = begin = None

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``weight * (r - margin) [B]``."""
        found: Tensor = inputs["weight"] * (self.reward.score(images, inputs) - inputs["margin"])
        return found


class EachSeed(Noise):
    """The draws that :class:`BatchNoise` makes for each replica's seed alone."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds[0])
        self.seeds = seeds

    def _each(self, index: Any, draw: str, *args: Any) -> Tensor:
        own = index[: len(index) // len(self.seeds)]
        draws = {seed: getattr(BatchNoise(seed), draw)(own, *args) for seed in set(self.seeds)}
        return torch.cat([draws[seed] for seed in self.seeds])

    def normal(self, index: Tensor | Sequence[int], shape: Sequence[int], tag: str) -> Tensor:
        """``[R * B, *shape]`` standard normal."""
        return self._each(index, "normal", shape, tag)

    def uniform(self, index: Tensor | Sequence[int], tag: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``[R * B]`` uniform."""
        return self._each(index, "uniform", tag, low, high)


class EachAlone:
    """Gradients of the mean over all rows become those of the mean over each replica's, cut to ``limit`` each."""

    rank, world_size = 0, 1

    def __init__(self, copies: int, limit: float) -> None:
        self.copies, self.limit = copies, limit

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Everything else is a scalar, and stays as it is."""
        stacks = [t for t in tensors if t.dim()]
        norms = sum((t.flatten(1).square().sum(1) for t in stacks), torch.zeros(self.copies)).sqrt() * self.copies
        scale = self.copies * (self.limit / (norms + 1e-6)).clamp_max(1)
        for t in stacks:
            t.mul_(scale.view(-1, *[1] * (t.dim() - 1)))


def learner(config: Config, replicas: Sequence[Replica]) -> Learner:
    """One for all; ``config`` is that of one replica, its seed left aside."""
    count, limit = len(replicas), config.generator.max_grad_norm
    if config.assistant.max_grad_norm != limit:
        raise ValueError("generator.max_grad_norm and assistant.max_grad_norm: expected the same number")
    update: dict[str, Any] = {"train": config.train.model_copy(update={"batch": count * config.train.batch})}
    for name in ("generator", "assistant"):  # each has been cut already
        update[name] = getattr(config, name).model_copy(update={"max_grad_norm": count * limit})
    return Learner(
        config.model_copy(update=update),
        noise=EachSeed([r.seed for r in replicas]),
        parallel=EachAlone(count, limit),
        reward=Weighted(build("rewards", config.reward)) if config.reward else None,  # type: ignore[arg-type]
        backbone=Family(config.backbone, count),  # type: ignore[arg-type]
    )


def train(
    config: Config, replicas: Sequence[Replica], updates: int, halfway: Callable[[Learner], None] = lambda _: None
) -> tuple[Learner, float]:
    """Trained replicas, and reference calls a sample of a generator update; ``halfway`` is called after half of the updates."""
    trained, calls = learner(config, replicas), [0]
    trained.reference_net.register_forward_hook(lambda _m, args, _out: calls.__setitem__(0, calls[0] + len(args[0])))
    rows = {
        name: torch.tensor([getattr(r, name) for r in replicas]).repeat_interleave(config.train.batch)
        for name in ("weight", "margin")
    }
    for done, batch in enumerate(batches(config.train.batch, updates, len(replicas), rows), 1):
        trained.step(batch)
        if done == updates // 2:
            halfway(trained)
    return trained, calls[0] / max(1, updates * config.train.batch * len(replicas))


def together(estimates: Sequence[drs.Estimate]) -> drs.Estimate:
    """Those of all replicas, in their order."""
    return drs.Estimate(**{key: torch.cat([vars(e)[key] for e in estimates]) for key in vars(estimates[0])})


@torch.no_grad()
def samples(trained: Learner, copies: int, count: int) -> Tensor:
    """``[R, count, D]`` of the running averages, from the same noise."""
    z = torch.randn(count, *trained.backbone.latent_shape, generator=torch.Generator().manual_seed(99))
    names = trained.backbone.encode([""] * (copies * count))
    return trained.backbone.generate(trained.generator("ema"), z.repeat(copies, 1), names).view(copies, *z.shape)
