"""Memory and FLOPs of a recipe, before anything is loaded: per process, role and phase, with the arithmetic shown.

Weights, gradients, moments, masters and averages are parameter counts times bytes. Activations come from :mod:`didr_core.plan.footprint`:
each network is run on the meta device at this recipe's size, and what would be alive is counted. Added to both: a CUDA context, and
:data:`MARGIN` for fragmentation and workspaces. LoRA's own activations and FLOPs (a few per cent) are inside it.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from torch import nn

from didr_core.config import Config, Optim, registry
from didr_core.drs.problem import Calls, Estimator
from didr_core.networks import fsdp
from didr_core.networks.roles import starts_as_reference
from didr_core.plan import shapes
from didr_core.plan.footprint import NOTHING, Cost
from didr_core.types import DIDRError

GIB = 2**30
MARGIN = 0.05
CONTEXT = 0.6 * GIB
EPS = 1e-6
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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

    @property
    def total(self) -> float:
        """Bytes at the worst moment, margin included."""
        static = sum(line.bytes for line in self.held)
        return (static + max((p.bytes for p in self.phases), default=0.0)) * (1 + MARGIN)


@dataclass(frozen=True)
class Plan:
    """The whole recipe."""

    processes: list[Process]
    flops: list[tuple[str, str, float]]  # phase, evaluations, FLOPs a sample
    samples: int  # of an iteration, over all workers
    notes: list[str] = field(default_factory=list)

    def gpu_bytes(self) -> tuple[str, float]:
        """What may lie on one GPU together at worst, and its bytes: Ray puts processes on a GPU as long as their shares add up to one."""
        on = [p for p in self.processes if p.gpus > 0]
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
        return sum(value for _, _, value in self.flops)


def plan(config: Config) -> Plan | None:
    """The plan of ``config``; None for families that are not described in `full_size.py` (there is nothing to count).

    Raises:
        DIDRError: LoRA targets that no layer matches.
    """
    of = shapes.family(config.backbone)
    if of is None:
        return None
    workers = config.workers
    costs = _Costs(config, of)
    held = [
        *_reference(config, costs),
        *_trained("generator", config, costs),
        *(_trained("assistant", config, costs) if config.sizes.assistant_updates else []),
        *_gathered(config, costs),
        *_judges(config, of, costs),
        Line("process", "CUDA context", "kernels and libraries", CONTEXT),
    ]
    if workers.train > 1:
        held.append(Line("process", "all-reduce bucket", "2^25 x 4 B", 4 * 2**25))
    trainer = Process("trainer", workers.train, workers.train_gpus, held, _phases(config, costs))
    processes = [trainer]
    if costs.reward_parameters:
        dtype = costs.dtypes["generator"]
        weights = Line("generator", "weights", *_times(costs.parameters, dtype))
        b = config.sizes.micro_batch
        once = max(shapes.network_cost(of, dtype, None, False).peak, costs.decode_plain.peak, costs.reward_plain.peak)
        phases = [Line("reward", "pictures of the start, scored", f"{b} x {once / GIB:.2f} GiB", b * once)]
        lines = [weights, *_judges(config, of, costs), Line("process", "CUDA context", "", CONTEXT)]
        processes.append(Process("reward actor", workers.rewards, workers.reward_gpus, lines, phases))
    text = shapes.text_parameters(of)
    if text:
        dtype = getattr(config.backbone, "text_dtype", "float32")
        lines = [Line("text", "weights", *_times(text, dtype)), Line("process", "CUDA context", "", CONTEXT)]
        processes.append(Process("encoder actor", workers.encoders, workers.encoder_gpus, lines, []))
    notes = [
        f"{'published sizes' if not of.folder else of.folder}, latents {of.side} x {of.side}, {of.tokens} prompt tokens, "
        f"micro-batch {config.sizes.micro_batch}",
        f"flash attention; {MARGIN:.0%} added for fragmentation, workspaces and LoRA activations; GB = 1e9 bytes",
    ]
    notes += [f"reward {name!r} is not known here and not counted" for name in costs.unknown]
    return Plan(processes, _flops(config, costs), config.train.batch, notes)


class _Costs:
    """What one sample costs, in every way that this recipe uses it."""

    def __init__(self, config: Config, of: shapes.Family) -> None:
        roles = config.roles
        self.family = of
        self.network = shapes.network(of)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.shared = roles.generator == "lora" and starts_as_reference(config.backbone)
        self.dtypes = {
            "generator": roles.dtype.reference if self.shared else roles.dtype.generator,
            "assistant": roles.dtype.reference if roles.assistant == "lora" else roles.dtype.assistant,
            "reference": roles.dtype.reference,
        }
        backbone = registry.find("backbones", config.backbone.name)
        targets = roles.targets or backbone.lora_targets
        self.adapter = adapter_parameters(self.network, targets, roles.rank)
        check = roles.gradient_checkpointing
        self.generator = shapes.network_cost(of, self.dtypes["generator"], True, check)
        self.assistant = shapes.network_cost(of, self.dtypes["assistant"], True, check)
        self.reference = shapes.network_cost(of, self.dtypes["reference"], False, check)
        self.plain = {role: shapes.network_cost(of, dtype, None, False) for role, dtype in self.dtypes.items()}
        method = registry.find("algorithms", config.algorithm.name)
        self.drs = bool(method.uses_drs)
        self.reward_parameters = 0
        self.decode = self.decode_plain = self.reward = self.reward_plain = NOTHING
        self.unknown: list[str] = []
        if method.needs_reward and config.reward is not None:
            self.reward_parameters, self.reward, self.reward_plain, self.unknown = shapes.rewards(config.reward)
            self.decode, self.decode_plain = shapes.decoder_cost(of, True), shapes.decoder_cost(of, False)
            self.decoder_parameters = shapes.decoder_parameters(of)


def adapter_parameters(network: nn.Module, targets: tuple[str, ...] | str | None, rank: int) -> int:
    """``rank (inputs + outputs)`` of every layer that ``targets`` names, as peft matches names.

    Raises:
        DIDRError: there is none.
    """
    total = 0
    for name, layer in network.named_modules():
        if isinstance(targets, str):
            matches = re.fullmatch(targets, name) is not None
        else:
            matches = targets is None or any(name == t or name.endswith(f".{t}") for t in targets)
        if matches and isinstance(layer, nn.Linear):
            total += rank * (layer.in_features + layer.out_features)
        elif matches and isinstance(layer, nn.Conv2d):
            total += rank * (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1] + layer.out_channels)
    if not total:
        raise DIDRError(f"roles.targets={targets!r}: no layer of {type(network).__name__} has such a name.")
    return total


def _times(count: float, dtype: str) -> tuple[str, float]:
    return f"{count / 1e6:,.0f}M x {BYTES[dtype]} B ({dtype})", count * BYTES[dtype]


def _reference(config: Config, costs: _Costs) -> list[Line]:
    users = ["reference"]
    users += ["generator"] if costs.shared else []
    users += ["TA"] if config.roles.assistant == "lora" else []
    return [
        Line("reference", f"weights (base of {', '.join(users)})", *_times(costs.parameters, costs.dtypes["reference"]))
    ]


def _trained(role: str, config: Config, costs: _Costs) -> list[Line]:
    """Weights, masters, gradients, moments and average of one trained role."""
    kind, optim = getattr(config.roles, role), getattr(config, role)
    dtype, count, lines = costs.dtypes[role], costs.parameters, []
    if kind == "lora":
        if role == "generator" and not costs.shared:
            lines.append(Line(role, "frozen start", *_times(count, dtype)))
        count = costs.adapter
    update = "master" if kind == "lora" else config.roles.update
    mastered = dtype == "bfloat16" and update == "master"
    size, how = _moments(optim, dtype == "bfloat16" and update == "stochastic")
    own = [
        ("adapter" if kind == "lora" else "weights", *_times(count, dtype)),
        *([("master weights", *_times(count, "float32"))] if mastered else []),
        ("gradients", *_times(count, "float32" if mastered else dtype)),
        ("Adam moments", f"{count / 1e6:,.0f}M x {size} B ({how})", count * size),
        *(
            [("running average", *_times(count, "float32"))]
            if role == "generator" and config.train.ema_decay > 0
            else []
        ),
    ]
    parts = config.workers.train if kind == "full" and _split(config) else 1
    split = f" / {parts} workers" if parts > 1 else ""
    return [*lines, *(Line(role, what, how + split, size / parts) for what, how, size in own)]


def _split(config: Config) -> bool:
    return config.roles.fsdp and config.workers.train > 1


def _gathered(config: Config, costs: _Costs) -> list[Line]:
    """Of split networks: the block in use and the next one, and the gradient of a block in float32, twice (to reduce, and reduced)."""
    if not _split(config):
        return []
    largest = max(fsdp.unit_sizes(costs.network))
    bytes_ = max(BYTES[costs.dtypes[r]] for r in ("generator", "assistant") if getattr(config.roles, r) == "full")
    how = f"largest block {largest / 1e6:,.0f}M x (2 x {bytes_} B + 2 x 4 B)"
    return [Line("split networks", "gathered blocks", how, largest * (2 * bytes_ + 8))]


def _moments(optim: Optim, stochastic: bool) -> tuple[int, str]:
    if optim.optimizer == "adamw8bit":
        return 2, "two, 8-bit"
    if stochastic and optim.betas[0] == 0:
        return 4, "one, float32: betas[0] = 0"
    return 8, "two, float32"


def _judges(config: Config, of: shapes.Family, costs: _Costs) -> list[Line]:
    if not costs.reward_parameters:
        return []
    return [
        Line("decoder", "weights", *_times(costs.decoder_parameters, of.decode_dtype)),
        Line("reward", "weights", *_times(costs.reward_parameters, "float32")),
    ]


def _calls(config: Config) -> Calls:
    """Of the reference and the reward inside the proxy, a sample, as the estimator says."""
    estimator: type[Estimator] = registry.find("drs", config.drp.estimator)
    return estimator.calls(config.drp.steps, config.drp.particles)


def _phases(config: Config, costs: _Costs) -> list[Line]:
    """Peaks on top of what is always held."""
    b, c = config.sizes.micro_batch, _factor(config.guidance.reference)
    inner = config.guidance.reference if config.drp.guidance is None else config.drp.guidance
    phases = []
    if config.sizes.assistant_updates:
        phases.append(Line("TA update", "forward and backward", _shown(b, costs.assistant), b * costs.assistant.peak))
    kept, chain = b * costs.generator.kept, 0.0
    pictures = 1
    if costs.drs:
        calls = _calls(config)
        graphs, rollouts, pictures = calls.differentiated, calls.plain, calls.rewarded
        kept_steps = 1 if config.drp.gradient_checkpointing and graphs else graphs
        samples = b * _factor(inner)
        chain = float(kept_steps * samples * costs.reference.kept)
        walk = samples * (config.drp.particles if rollouts else 1) * costs.plain["reference"].peak
        block = samples * (costs.reference.peak - costs.reference.kept) if graphs else 0.0
        how = f"generator kept {kept / GIB:.2f} + {kept_steps} x {samples} samples of the reference {chain / GIB:.2f} + its block"
        phases.append(Line("generator update", "proxy", how, kept + chain + max(walk, block)))
    else:
        phases.append(
            Line("generator update", "reference", f"{b * c} samples", kept + b * c * costs.plain["reference"].peak)
        )
    if costs.reward_parameters:
        judged = b * pictures * max(costs.decode.plus(costs.reward).peak, 1)
        how = f"kept {(kept + chain) / GIB:.2f} + {b * pictures} pictures x {costs.decode.plus(costs.reward).peak / GIB:.2f} GiB"
        phases.append(Line("generator update", "decoder and reward", how, kept + chain + judged))
    phases.append(Line("generator update", "backward", _shown(b, costs.generator), b * costs.generator.peak))
    phases.append(_ending(config, costs))
    return phases


def _ending(config: Config, costs: _Costs) -> Line:
    """Grid and scores: text towers, the start where it is not a base that is there, the held-out judge, pictures without gradient."""
    of, batch = costs.family, config.train.micro_batch or 64
    text = shapes.text_parameters(of) * BYTES[getattr(config.backbone, "text_dtype", "float32")]
    full = costs.parameters if config.roles.generator == "full" else 0
    start, gathered = full * BYTES[costs.dtypes["generator"]], full * BYTES["float32"] * _split(config)
    judge = shapes.rewards(config.judge)[0] * BYTES["float32"]
    made = batch * max(costs.plain["generator"].peak, shapes.decoder_cost(of, False).peak)
    sizes = {"text": text, "start": start, "whole average": gathered, "judge": judge, f"{batch} pictures": made}
    how = " + ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
    return Line("end of the run", "grid and scores", how, sum(sizes.values()))


def _shown(samples: int, cost: Cost) -> str:
    return f"{samples} x {cost.peak / GIB:.2f} GiB"


def _factor(guidance: float) -> int:
    """Guided predictions run the network twice."""
    return 1 if guidance == 1.0 else 2


def _flops(config: Config, costs: _Costs) -> list[tuple[str, str, float]]:
    """A sample's share of an iteration."""
    n, g = config.sizes.assistant_updates, config.guidance
    rows = []
    if n:
        one = costs.plain["generator"].forward + costs.assistant.forward + costs.assistant.backward
        rows.append(("TA updates", f"{n} x (fresh sample + forward + backward)", n * one))
    own = costs.generator.forward + costs.generator.backward
    rows.append(("generator", "forward + backward", own))
    rows.append(("TA's answer", "forward", _factor(g.assistant) * costs.plain["assistant"].forward))
    plain, pictures = costs.plain["reference"].forward, 1
    if costs.drs:
        calls = _calls(config)
        graphs, rollouts, pictures = calls.differentiated, calls.plain, calls.rewarded
        inner = g.reference if config.drp.guidance is None else config.drp.guidance
        again = costs.reference.forward if config.drp.gradient_checkpointing else 0.0
        proxy = graphs * (costs.reference.forward + costs.reference.backward + again) + rollouts * plain
        text = f"{_factor(inner)} x ({graphs} with backward + {rollouts} without)"
        rows.append((f"proxy ({config.drp.estimator})", text, _factor(inner) * proxy))
    if not costs.drs or config.drp.guidance not in (None, g.reference):
        rows.append(("reference", f"{_factor(g.reference)} x forward", _factor(g.reference) * plain))
    if costs.reward_parameters:
        seen = costs.decode.forward + costs.decode.backward + costs.reward.forward + costs.reward.backward
        watch = costs.decode_plain.forward + costs.reward_plain.forward
        rows.append(("decoder and reward", f"{pictures} with backward + 1 for the logs", pictures * seen + watch))
    return rows
