"""What one update of DIDR costs on a GPU: seconds, pictures a second, achieved TFLOP/s and peak memory, by phase, beside a plain loop.

    python -m benchmarks.gpu_step                        # SDXL at full size, random weights; 512 and 1024 px; K = 1, 2, 4
    python -m benchmarks.gpu_step --size tiny --iterations 1 --resolutions 64   # the same code in seconds on a CPU

Needs didr_core alone (torch, diffusers, transformers, peft, pydantic): no Ray, no weights. "ours" is :class:`Learner` with the roles
of recipe sdxl_1gpu (bfloat16, stochastic rounding, the TA an adapter on the reference, activation checkpointing). "plain" is the loop one
writes first: three bfloat16 copies of the UNet, two AdamW, one call for each prediction and none shared, no activation checkpointing
unless ``--plain-checkpointing``. FLOPs are counted on one real step of each, operator by operator. A configuration that does not fit is
reported as such. Writes one JSON with the hardware, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hollow_sdxl
from didr_core import config as configs
from didr_core.algorithms import losses
from didr_core.backbones.sdxl import SDXL
from didr_core.config import Config
from didr_core.diffusion.noise import Noise
from didr_core.diffusion.schedule import chain_times, coeffs_like, diffuse, step
from didr_core.plan import hollow, memory
from didr_core.plan.trace import Counter
from didr_core.train.learner import Learner
from didr_core.types import Batch, Condition

GIB = 2**30


def recipe(
    size: str,
    folder: Path,
    resolution: int,
    k: int,
    batch: int,
    micro: int,
    updates: int,
    decoder: str,
    exact: bool = False,
) -> Config:
    """Recipe sdxl_1gpu's roles around random weights; ``exact``: float32 full copies, as "plain" in float32."""
    roles: dict[str, Any] = {
        "assistant": "lora",
        "rank": 32,
        "dtype": "bfloat16",
        "update": "stochastic",
        "gradient_checkpointing": True,
    }
    roles |= {"rank": 4} if size == "tiny" else {}
    tree = {
        "name": "gpu_step",
        "backbone": {"name": "sdxl", "resolution": resolution, **hollow_sdxl.backbone(size, decoder, folder)},
        "algorithm": "didr",
        "reward": hollow_sdxl.reward(size, folder),
        "drp": {"estimator": "ode", "steps": k},
        "guidance": {"reference": 8.0},
        "generator": {"lr": 5e-7},
        "assistant": {"lr": 5e-5},
        "train": {
            "steps": 1000,
            "batch": batch,
            "micro_batch": micro,
            "assistant_updates": updates,
            "ema_decay": 0.0 if exact else 0.98,
        },
        "roles": {} if exact else roles,
        "data": {"prompts": "none"},
    }
    return configs.validate(tree)


def ours(config: Config, folder: Path, device: torch.device) -> Learner:
    """The learner around random weights."""
    return Learner(
        config,
        device=device,
        backbone=hollow.backbone(config.backbone, folder, str(device)),
        reward=hollow.Reward(config.reward, str(device)),  # type: ignore[arg-type]
        phase=partial(phase, device=device),
    )


def prompts(backbone: SDXL, size: int, device: torch.device) -> Batch:
    """Random conditions of ``size`` prompts."""
    torch.manual_seed(7)
    names = [str(i) for i in range(size)]
    zeros, ones = torch.zeros(size), torch.full((size,), 0.01)
    condition = backbone.blank(size).map(torch.randn_like)
    return Batch(torch.arange(size), names, names, condition, {}, zeros, ones).to(device)


class Plain:
    """The loop one writes first: three copies, nothing shared, nothing recomputed."""

    def __init__(
        self, config: Config, folder: Path, device: torch.device, dtype: torch.dtype, checkpointing: bool
    ) -> None:
        self.config, self.device = config, device
        self.backbone: SDXL = hollow.backbone(config.backbone, folder, str(device))
        nets = [self.backbone.load_network(role).to(device, dtype) for role in ("generator", "assistant", "reference")]
        self.generator, self.assistant, self.reference = nets
        self.reference.requires_grad_(False)
        for net in nets:
            if checkpointing:
                net.enable_gradient_checkpointing()
        self.backbone.load_decoder()
        self.backbone.to(device)
        self.reward = hollow.Reward(config.reward, str(device))
        self.optimizers = [
            torch.optim.AdamW(net.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
            for net, o in ((self.generator, config.generator), (self.assistant, config.assistant))
        ]

    def guided(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        null = self.backbone.x0(self.reference, x, t, self.backbone.null(condition))
        told = self.backbone.x0(self.reference, x, t, condition)
        return null + self.config.guidance.reference * (told - null)

    def step(self, batch: Batch) -> None:
        for k in range(self.config.train.assistant_updates):
            with phase("TA update", self.device):
                self._update(1, batch, lambda part, k=k: self._assistant(part, f"ta{k}"))
        with phase("generator update", self.device):
            self._update(0, batch, self._generator)

    def _update(self, which: int, batch: Batch, loss: Callable[[Batch], Tensor]) -> None:
        optimizer, net = self.optimizers[which], (self.generator, self.assistant)[which]
        optimizer.zero_grad()
        size = self.config.sizes.micro_batch
        for start in range(0, len(batch), size):
            (loss(batch[start : start + size]).sum() / len(batch)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()

    def _assistant(self, part: Batch, tag: str) -> Tensor:
        noise, shape, schedule = Noise(self.config.seed), self.backbone.latent_shape, self.backbone.schedule
        with torch.no_grad():
            x0 = self.backbone.generate(self.generator, noise.normal(part.index, shape, f"{tag}/z"), part.condition)
        t = noise.uniform(part.index, f"{tag}/t", *self.config.times.assistant)
        x_t = diffuse(schedule, x0, noise.normal(part.index, shape, f"{tag}/eps"), t)
        predicted = self.backbone.x0(self.assistant, x_t, t, part.condition)
        return losses.denoising_score_matching(predicted, x0, *coeffs_like(schedule, t, x_t))

    def _generator(self, part: Batch) -> Tensor:
        noise, shape, schedule = Noise(self.config.seed), self.backbone.latent_shape, self.backbone.schedule
        x0 = self.backbone.generate(self.generator, noise.normal(part.index, shape, "g/z"), part.condition)
        t = noise.uniform(part.index, "g/t", *self.config.times.generator)
        x_t = diffuse(schedule, x0, noise.normal(part.index, shape, "g/eps"), t).detach()
        alpha, sigma = coeffs_like(schedule, t, x_t)
        with phase("proxy", self.device):
            drs = self._drs(x_t, t, part) / 0.1  # 0.1: the square root of the batch's spread
        with torch.no_grad():
            reference = self.guided(x_t, t, part.condition)
            told = self.backbone.x0(self.assistant, x_t, t, part.condition)
        weight = losses.normalizer(x0.detach(), reference)
        return losses.matching(x0, weight * (told - losses.tilted_target(reference, drs, alpha, sigma)))

    def _drs(self, x_t: Tensor, t: Tensor, part: Batch) -> Tensor:
        x = leaf = x_t.clone().requires_grad_()
        times = chain_times(t, self.config.drp.steps)
        clean = self.guided(x, t, part.condition)
        for before, now in pairwise(times):
            x = step(self.backbone.schedule, x, clean, before, now)
            clean = self.guided(x, now, part.condition)
        score = self.reward.score(self.backbone.decode(clean), {})
        return torch.autograd.grad(score.sum(), leaf)[0] / self.config.drp.beta


PHASES: dict[str, list[float]] = {}
"""Seconds, calls and peak bytes of each phase since the last clearing."""


@contextmanager
def phase(name: str, device: torch.device) -> Iterator[None]:
    """Add what happens inside to :data:`PHASES`."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    outer = PHASES.setdefault("_peak", [0.0])
    if cuda:
        outer[0] = max(outer[0], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        yield
    finally:
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        outer[0] = max(outer[0], peak)
        row = PHASES.setdefault(name, [0.0, 0.0, 0.0])
        row[:] = [row[0] + time.perf_counter() - began, row[1] + 1, max(row[2], peak)]


def measure(make: Callable[[], Any], batch_size: int, iterations: int, device: torch.device) -> dict[str, Any]:
    """Build, warm up with one counted step, then time ``iterations``."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        subject = make()
        batch = prompts(subject.backbone, batch_size, device)
        with Counter() as count:
            subject.step(batch)
        PHASES.clear()
        with phase("update", device):
            for _ in range(iterations):
                subject.step(batch)
    except torch.cuda.OutOfMemoryError:
        return {"fits": False}
    seconds = PHASES["update"][0] / iterations
    peak = PHASES.pop("_peak")[0]
    return {
        "fits": True,
        "s_per_update": seconds,
        "images_per_s": batch_size / seconds,
        "tflop_per_update": count.flops / 1e12,
        "achieved_tflops": count.flops / 1e12 / seconds,
        "peak_gib": peak / GIB if device.type == "cuda" else None,
        "phases": {
            name: {"s_per_update": total / iterations, "calls": int(n / iterations), "peak_gib": most / GIB}
            for name, (total, n, most) in PHASES.items()
            if name != "update"
        },
    }


def planned(config: Config) -> dict[str, float]:
    """What `didr doctor` says of the same step."""
    plan = memory.plan(config)
    assert plan is not None
    return {"tflop_per_update": plan.total_flops * plan.samples / 1e12, "peak_gib": plan.processes[0].total / GIB}


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers are of."""
    packages = ("torch", "diffusers", "transformers", "peft")
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if cuda else None,
        "cuda": torch.version.cuda,
        "versions": {p: version(p) for p in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every configuration, print a line each, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="K of the proxy")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--assistant-updates", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--decoder", choices=("tiny", "kl"), default="tiny")
    parser.add_argument("--loops", nargs="+", choices=("ours", "plain"), default=["ours", "plain"])
    parser.add_argument("--plain-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu_step.json"))
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(tempfile.mkdtemp())
    report: dict[str, Any] = {
        "hardware": hardware(device),
        "arguments": vars(given) | {"output": str(given.output)},
        "rows": [],
    }
    for resolution in given.resolutions:
        for k in given.steps:
            config = recipe(
                given.size,
                folder,
                resolution,
                k,
                given.batch,
                given.micro_batch,
                given.assistant_updates,
                given.decoder,
            )
            loops: dict[str, Callable[[], Any]] = {
                "ours": lambda c=config: ours(c, folder, device),  # type: ignore[misc]
                "plain": lambda c=config: Plain(c, folder, device, torch.bfloat16, given.plain_checkpointing),  # type: ignore[misc]
            }
            for name in given.loops:
                row = {
                    "loop": name,
                    "resolution": resolution,
                    "K": k,
                    **measure(loops[name], given.batch, given.iterations, device),
                }
                if name == "ours":
                    row["planned"] = planned(config)
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                given.output.parent.mkdir(parents=True, exist_ok=True)
                given.output.write_text(
                    json.dumps(report, indent=1) + "\n"
                )  # after each row: a later one may end the process
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
