"""Memory and FLOPs of a recipe, before anything is loaded: per process, role and phase, with the arithmetic shown.

The real learner is built around networks on the meta device (:mod:`didr_core.plan.hollow`) and makes one update of each kind, counted
operator by operator (:mod:`didr_core.plan.trace`); what it holds and what was alive is the plan. Added: a CUDA context, what several
workers need, and :data:`MARGIN` for fragmentation and workspaces.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from didr_core.config import Config
from didr_core.diffusion.noise import Noise
from didr_core.networks import fsdp, optim
from didr_core.networks.loading import uncollected
from didr_core.networks.lora import LoRA
from didr_core.networks.roles import load_start
from didr_core.plan import cache, hollow
from didr_core.plan.trace import Counter, flash_attention
from didr_core.train.learner import Learner
from didr_core.types import Batch, Reward

GIB = 2**30
MARGIN = 0.05
CONTEXT = 0.6 * GIB
EPS = 1e-6


@dataclass(frozen=True)
class Line:
    """One row: whose, what, how it comes about, bytes."""

    owner: str
    what: str
    how: str
    bytes: float


@dataclass(frozen=True)
class Process:
    """What one process holds: always, and at the peak of each phase on top."""

    name: str
    count: int
    gpus: float
    held: list[Line]
    phases: list[Line]
    before: bool = False  # is over when training starts

    @property
    def total(self) -> float:
        """Bytes at the worst moment, margin included."""
        static = sum(line.bytes for line in self.held)
        return (static + max((p.bytes for p in self.phases), default=0.0)) * (1 + MARGIN)


@dataclass(frozen=True)
class Plan:
    """The whole recipe."""

    processes: list[Process]
    flops: list[tuple[str, float]]  # phase, FLOPs a sample
    samples: int  # of an iteration, over all workers
    notes: list[str] = field(default_factory=list)

    def gpu_bytes(self) -> tuple[str, float]:
        """What may lie on one GPU together at worst, and its bytes: Ray puts processes on a GPU as long as their shares add up to one."""
        on = ([p for p in self.processes if p.gpus > 0 and p.before is before] for before in (True, False))
        return max(map(self._together, on), key=lambda found: found[1])

    @staticmethod
    def _together(on: Sequence[Process]) -> tuple[str, float]:
        worst: tuple[str, float] = ("", 0.0)
        for counts in itertools.product(*(range(min(p.count, max(1, int(1 / p.gpus + EPS))) + 1) for p in on)):
            share = sum(n * min(p.gpus, 1.0) for n, p in zip(counts, on, strict=True))
            used = sum(n * p.total for n, p in zip(counts, on, strict=True))
            if share <= 1 + EPS and used > worst[1]:
                names = (p.name if n == 1 else f"{n} x {p.name}" for n, p in zip(counts, on, strict=True) if n)
                worst = (" + ".join(names), used)
        return worst

    def fits(self, gigabytes: float) -> bool:
        """On GPUs of ``gigabytes`` (1e9 bytes, as they are sold)."""
        return self.gpu_bytes()[1] <= gigabytes * 1e9

    @property
    def total_flops(self) -> float:
        """Of one sample's share of an iteration."""
        return sum(value for _, value in self.flops)


def plan(config: Config) -> Plan | None:
    """The plan of ``config``, made once (:mod:`didr_core.plan.cache`); None for families that are not diffusers pipelines: they are small.

    Raises:
        DIDRError: LoRA targets that no layer matches.
    """
    made = cache.kept(config, lambda: _told(config))
    return TypeAdapter(Plan).validate_python(made) if made else None


def _told(config: Config) -> dict[str, Any]:
    """The plan of ``config`` as JSON; empty: none."""
    with tempfile.TemporaryDirectory() as folder, uncollected():
        backbone = hollow.backbone(config.backbone, Path(folder))
        return {} if backbone is None else asdict(_plan(config, backbone))


def _plan(config: Config, backbone: Any) -> Plan:
    workers, size, batch = config.workers, config.sizes.micro_batch, config.train.at_once or 64
    count = Counter()
    rewards = hollow.Reward(config.reward if config.needs_reward else None, away=config.pools)
    together = size * (2 if config.pools and config.sizes.accumulation > 1 else 1)  # two micro-batches are in flight
    with Counter():  # for its short cuts on meta: weights are not drawn
        learner = Learner(
            _usual_moments(config),
            device="meta",
            backbone=backbone,
            noise=_Shapes(0),
            reward=cast(Reward, rewards),
            phase=count.phase,
        )
    context = Line("process", "CUDA context", "kernels and libraries", CONTEXT)
    judges = [*_weights("decoder", backbone._vae), *_weights("reward", rewards)]
    held = [*_held(learner, config), *_gathered(learner, config), *judges, context]
    if workers.train > 1:
        held.append(Line("process", "all-reduce bucket", "2^25 x 4 B", 4 * 2**25))
    _update(learner, count, _batch(backbone, together))
    times: dict[str, float] = {n: config.sizes.assistant_updates if n.startswith("TA:") else 1 for n in count.phases}
    times["generator: anchor"] = together / config.train.batch  # counted whole, not a sample's
    phases = [Line(*_named(name), f"{size} samples", phase.most) for name, phase in count.phases.items()]
    flops = [(name or "the rest", times[name] * p.flops / together) for name, p in count.phases.items() if p.flops]

    backbone.load_text()
    text = _weights("text", backbone._text)
    phases.append(_ending(learner, config, text, batch))
    processes = [Process("trainer", workers.train, workers.train_gpus, held, phases)]
    pools = [_pool(config, key, learner, context) for key in config.pools]
    if rewards.models or pools:
        start = _weights("generator", load_start(backbone, config.backbone, config.roles, torch.device("meta")))
        seen = Line("reward", "pictures of the start, scored", f"{size} samples", _scored(learner, size))
        own, over = [*start, *judges, context], config.precomputed
        processes.append(Process("reward actor", workers.rewards, workers.reward_gpus, own, [seen], over))
    processes += pools
    if text:
        own, over = [*text, context], config.precomputed
        processes.append(Process("encoder actor", workers.encoders, workers.encoder_gpus, own, [], over))
    notes = [
        f"latents {' x '.join(map(str, backbone.latent_shape))}, micro-batch {size}",
        f"flash attention; {MARGIN:.0%} added for fragmentation and workspaces; GB = 1e9 bytes",
    ]
    notes += [f"reward {name!r} is not known here and not counted" for name in rewards.unknown]
    return Plan(processes, flops, config.train.batch, notes)


def _pool(config: Config, key: str, learner: Learner, context: Line) -> Process:
    """The actors that score a reward while training lasts."""
    model, size, own = hollow.Reward(config.pools[key]), config.sizes.micro_batch, config.pool(key)
    latents = torch.empty(size, *learner.backbone.latent_shape, device="meta")
    with torch.no_grad():
        pictures = learner.backbone.decode(latents).requires_grad_()
    with flash_attention(), (count := Counter()):
        score = model.score(pictures, {})
        if score.requires_grad:
            score.sum().backward()
    scored = Line("reward", "pictures scored, with gradient", f"{size} samples", count.phases[""].most)
    return Process("scoring actor", own.counts[1], own.gpus or 0.0, [*_weights("reward", model), context], [scored])


class _Shapes(Noise):
    """Random numbers of a recipe without the numbers; times are its latest, where estimators do most."""

    def normal(self, index: Tensor | Sequence[int], shape: Sequence[int], tag: str) -> Tensor:
        return torch.empty(len(index), *shape, device="meta")

    def uniform(self, index: Tensor | Sequence[int], tag: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.full((len(index),), high)


def _usual_moments(config: Config) -> Config:
    """8-bit moments are made by a library for CUDA alone: here as float32, and counted as a quarter."""
    usual = {k: getattr(config, k).model_copy(update={"optimizer": "adamw"}) for k in ("generator", "assistant")}
    return config.model_copy(update=usual)


def _batch(backbone: Any, size: int) -> Batch:
    names = [str(i) for i in range(size)]
    return Batch(torch.arange(size), names, names, backbone.blank(size).to("meta"))


def _update(learner: Learner, count: Counter, batch: Batch) -> None:
    """The forward and backward passes of one update of each kind, with gradients and moments of earlier ones there."""
    with flash_attention(), count:
        if learner.config.sizes.assistant_updates:
            learner.backward(batch, "assistant", lambda part: learner.assistant_loss(part, "ta0"))
        learner.backward(batch, "generator", learner.generator_loss)
        if learner.anchor:
            learner.backward_anchor(learner.anchor)


def _scored(learner: Learner, size: int) -> int:
    """Most bytes alive while ``size`` pictures are made and scored without gradient."""
    batch, count = _batch(learner.backbone, size), Counter()
    with torch.no_grad(), flash_attention(), count:
        z = learner.noise.normal(batch.index, learner.backbone.latent_shape, "")
        pictures = learner.backbone.decode(learner.backbone.generate(learner.generator(), z, batch.condition))
        if learner.reward is not None:
            learner.reward.score(pictures, {})
    return count.phases[""].most


def _base(network: nn.Module) -> nn.Module:
    return network.base if isinstance(network, LoRA) else network


def _trained(learner: Learner) -> dict[str, tuple[optim.Weights, torch.optim.Optimizer]]:
    trained = {"generator": (learner.generator_weights, learner.generator_opt)}
    if learner.config.sizes.assistant_updates:
        trained["assistant"] = (learner.assistant_weights, learner.assistant_opt)
    return trained


def _held(learner: Learner, config: Config) -> list[Line]:
    """Weights, masters, gradients, moments and average: each tensor once; adapters before the bases that they lie in."""
    seen: dict[tuple[int, int], Tensor] = {}  # kept alive: another tensor would get its address
    lines: list[Line] = []

    def add(owner: str, what: str, tensors: Iterable[Tensor], parts: int = 1, small: bool = False) -> None:
        # by place: gradients of adapters are views of one storage
        places = {(t.untyped_storage()._cdata, int(t.storage_offset())): t for t in tensors if t.dim()}
        new = {place: t for place, t in places.items() if place not in seen}
        seen.update(new)
        if new:
            how, size = _times(new.values())
            how += (", 8-bit: a quarter" if small else "") + (f" / {parts} workers" if parts > 1 else "")
            lines.append(Line(owner, what, how, size / parts / (4 if small else 1)))

    for role, (weights, optimizer) in _trained(learner).items():
        with Counter():
            optim.begin(optimizer)
        full = getattr(config.roles, role) == "full"
        parts = config.workers.train if full and config.roles.fsdp else 1
        add(role, "weights" if full else "adapter", weights.network.parameters(), parts)
        add(role, "master weights", weights.values.values(), parts)
        trained = (*weights.values.values(), *weights.network.parameters())  # adapters have gradients of their own
        add(role, "gradients", (v.grad for v in trained if v.grad is not None), parts)
        small = getattr(config, role).optimizer == "adamw8bit"
        add(role, "Adam moments", (t for s in optimizer.state.values() for t in s.values()), parts, small)
        if role == "generator":
            add(role, "running average", learner.ema_net.parameters(), parts)
    users = {"reference": learner.reference_net, "generator": learner.generator_net, "TA": learner.assistant_net}
    sharing = [name for name, net in users.items() if _base(net) is _base(learner.reference_net)]
    add("reference", f"weights (base of {', '.join(sharing)})", _base(learner.reference_net).parameters())
    add("generator", "frozen start", _base(learner.generator_net).parameters())
    return sorted(lines, key=lambda line: line.owner != "reference")


def _times(tensors: Iterable[Tensor]) -> tuple[str, float]:
    """Bytes of ``tensors``, and their arithmetic by type."""
    counts: dict[torch.dtype, int] = {}
    for t in tensors:
        counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    how = (f"{n / 1e6:,.0f}M x {d.itemsize} B ({str(d).removeprefix('torch.')})" for d, n in counts.items())
    return " + ".join(how), sum(n * d.itemsize for d, n in counts.items())


def _weights(owner: str, network: nn.Module | None) -> list[Line]:
    weights = list(network.parameters()) if network is not None else []
    return [Line(owner, "weights", *_times(weights))] if weights else []


def _gathered(learner: Learner, config: Config) -> list[Line]:
    """Of split networks: the block in use and the next one, and the gradient of a block in float32, twice (to reduce, and reduced)."""
    split = [w.network for role, (w, _) in _trained(learner).items() if getattr(config.roles, role) == "full"]
    if not split or not config.roles.fsdp or config.workers.train == 1:
        return []
    largest = max(max(fsdp.unit_sizes(network)) for network in split)
    width = max(next(network.parameters()).element_size() for network in split)
    how = f"largest block {largest / 1e6:,.0f}M x (2 x {width} B + 2 x 4 B)"
    return [Line("split networks", "gathered blocks", how, largest * (2 * width + 8))]


def _named(phase: str) -> tuple[str, str]:
    """Row's owner and what: `TA: backward` is the backward pass of a TA update."""
    owner, colon, what = phase.rpartition(": ")
    return f"{owner} update" if colon else "generator update", what or "the rest"


def _ending(learner: Learner, config: Config, text: list[Line], batch: int) -> Line:
    """Grid and scores: text towers, the start where it is not a base that is there, the held-out judge, pictures without gradient."""
    backbone: Any = learner.backbone
    decoder = 0.0
    if backbone._vae is None:  # a run without a reward decodes nothing before
        backbone.load_decoder()
        decoder = sum(line.bytes for line in _weights("decoder", backbone._vae))
    full = list(learner.generator_net.parameters()) if config.roles.generator == "full" else []
    split = config.roles.fsdp and config.workers.train > 1
    sizes = {
        "text": sum(line.bytes for line in text),
        "decoder": decoder,
        "start": _times(full)[1],
        "whole average": sum(p.numel() for p in full) * 4 * split,
        "judge": _times(hollow.Reward(config.judge).parameters())[1],
        f"{batch} pictures": _scored(learner, batch),
    }
    how = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items() if size)
    return Line("end of the run", "grid and scores", how, sum(sizes.values()))
