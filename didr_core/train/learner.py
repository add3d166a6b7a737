"""One iteration of DIDR: n updates of the teaching assistant, one of the generator. No I/O, no Ray.

Every random number is tied to its sample (`diffusion/noise.py`) and gradients are averaged over ranks, so the same seed and global batch
give the same update for any number of workers and micro-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from didr_core import drs
from didr_core.algorithms import losses
from didr_core.config import Config, Kind, Optim, build
from didr_core.data.teacher_pairs import TeacherPairs
from didr_core.diffusion.noise import Noise, ahead
from didr_core.diffusion.sampling import guided_x0
from didr_core.diffusion.schedule import LATEST, coeffs_like, diffuse
from didr_core.networks import fsdp, lora, optim, roles
from didr_core.networks.compiled import Blocks
from didr_core.train.distributed import Single
from didr_core.train.reward_scale import RewardScale, refuse_non_finite
from didr_core.train.rewarded import Rewarded, Seen, in_flight
from didr_core.types import Backbone, Batch, NonFiniteError, Parallel, Reward, StepReport

Which = Literal["generator", "ema", "start", "reference"]
Losses = tuple[Tensor, dict[str, Tensor]]  # a loss [B], and metrics {name: [B]}
Phase = Callable[[str], AbstractContextManager[Any]]


class Learner:
    """Networks, optimizers, reward scale and the update. Built from a Config alone."""

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device | str = "cpu",
        parallel: Parallel | None = None,
        noise: Noise | None = None,
        reward: Reward | None = None,
        backbone: Backbone | None = None,
        phase: Phase = record_function,
    ) -> None:
        """Built from ``config`` alone, unless told otherwise.

        Args:
            noise, reward, backbone: in place of the config's own; the latter two are loaded already.
            phase: entered around each part of an update, with its name: by default a range in torch's profiler.
        """
        self.config = config
        self.device = torch.device(device)
        self.noise = noise or Noise(config.seed, self.device)
        self.parallel: Parallel = parallel or Single()
        self.phase = phase
        self.backbone: Backbone = backbone or build("backbones", config.backbone)
        self.algorithm = build("algorithms", config.algorithm)
        nets = roles.networks(
            self.backbone,
            config.backbone,
            config.roles,
            device=self.device,
            seed=config.seed,
            ema=config.train.ema_decay > 0,
            workers=self.parallel.world_size,
        )
        self.fsdp = config.roles.fsdp and self.parallel.world_size > 1
        self.generator_net, self.assistant_net = nets.generator, nets.assistant
        self.reference_net, self.ema_net = nets.reference, nets.ema
        self.blocks = Blocks((nets.generator, nets.assistant, nets.reference), config.train.compile, self.device)
        self.generator_weights = self._weights(nets.generator, config.roles.generator)
        self.assistant_weights = self._weights(nets.assistant, config.roles.assistant)
        self.reward: Reward | None = None
        if self.algorithm.needs_reward and config.reward is not None:
            self.reward = reward or build("rewards", config.reward)
            if reward is None:
                self.reward.load(self.device)
            self.backbone.load_decoder()
            self.backbone.to(self.device)
        anchor = config.train.anchor
        self.anchor = TeacherPairs(anchor, self.backbone.latent_shape, self.device) if anchor else None
        self.generator_opt = optim.optimizer(self.generator_weights, config.generator, config.seed)
        self.assistant_opt = optim.optimizer(self.assistant_weights, config.assistant, config.seed)
        self.scale = RewardScale(self.device)
        self.step_count = 0

    def _weights(self, network: nn.Module, kind: Kind) -> optim.Weights:
        """Adapters are small: they always have masters."""
        return optim.Weights(network, "master" if kind == "lora" else self.config.roles.update, small=kind == "lora")

    def generator(self, which: Which = "ema") -> nn.Module:
        """The trained generator, its running average, the one training started from, or the reference."""
        if which == "start":
            return roles.start(self.backbone, self.config.backbone, self.config.roles, self.generator_net, self.device)
        return {"generator": self.generator_net, "ema": self.ema_net, "reference": self.reference_net}[which]

    def whole_average(self, everywhere: bool = False) -> nn.Module | None:
        """The generator's running average in one piece; where it is split over workers, on rank 0 alone unless ``everywhere``, and every
        worker must call it."""
        if not (self.fsdp and self.config.roles.generator == "full"):
            return self.ema_net
        state = fsdp.whole_state(self.ema_net, everywhere)
        return roles.filled(self.backbone, state, self.device) if state else None

    def gather(self) -> None:
        """Training is over: from now on :meth:`generator` gives whole networks. Every worker must call it."""
        self.ema_net = self.whole_average(everywhere=True) or self.ema_net

    def step(self, batch: Batch) -> StepReport:
        """One iteration on this rank's share of the global batch.

        Raises:
            NonFiniteError: a loss or reward is NaN or infinite on any rank; the update that saw it is not applied.
        """
        refuse_non_finite(batch, self.step_count + 1)
        batch = batch.to(self.device)
        if self.reward is not None:
            self.scale.update(batch.spread, self.parallel)
        metrics: dict[str, float] = {}
        assistant_updates = self.config.sizes.assistant_updates
        for k in range(assistant_updates):
            with self.phase("TA update"):
                metrics |= self._update_assistant(batch, f"ta{k}", self.step_count * assistant_updates + k)
        updates = self.step_count - (self.config.train.steps - self.config.sizes.generator_updates)
        if updates >= 0:
            with self.phase("generator update"):
                metrics |= self._update_generator(batch, updates)
        self.step_count += 1
        return StepReport(self.step_count, metrics)

    def assistant_loss(self, part: Batch, tag: str) -> Losses:
        """Stage I: denoising score matching on fresh samples of the current generator; ``tag`` names the update's random numbers."""
        shape = self.backbone.latent_shape
        with torch.no_grad(), self.phase("TA: fresh sample"):
            z = self.noise.normal(part.index, shape, f"{tag}/z")
            x0 = self.backbone.generate(self.generator_net, z, part.condition)
        t = ahead(self.noise.uniform(part.index, f"{tag}/t", *self.config.times.assistant), self.device)
        x_t = diffuse(self.backbone.schedule, x0, self.noise.normal(part.index, shape, f"{tag}/eps"), t)
        with self.phase("TA: forward"):
            prediction = guided_x0(self.backbone, self.assistant_net, x_t, t, part.condition, 1.0)
        alpha, sigma = coeffs_like(self.backbone.schedule, t, x_t)
        return losses.denoising_score_matching(prediction, x0, alpha, sigma), {}

    def generator_loss(self, part: Batch, meanwhile: Callable[[], object] = lambda: None) -> Losses:
        """Stage II: the algorithm's loss, and what is watched of the pictures that it was computed on. ``meanwhile``: done while a reward
        that is scored elsewhere is waited for."""
        ctx = GeneratorPass(self, part, meanwhile)
        value, metrics = self.algorithm.generator_loss(ctx)
        x0 = ctx.x0.detach()
        if self.reward is not None:
            ctx.watch()
        metrics |= ctx.metrics | {"latent/mean": x0.flatten(1).mean(1), "latent/std": x0.flatten(1).std(1)}
        return value, metrics

    def _update_assistant(self, batch: Batch, tag: str, updates: int) -> dict[str, float]:
        self.assistant_weights.zero_gradients()
        seen = self.backward(batch, "assistant", lambda part: self.assistant_loss(part, tag))
        return self._update("assistant", self.assistant_opt, self.config.assistant, updates, batch, *seen)

    def _update_generator(self, batch: Batch, updates: int) -> dict[str, float]:
        self.generator_weights.zero_gradients()
        means, finite = self.backward(batch, "generator", self.generator_loss)
        if self.anchor:
            means["loss/anchor"] = self.backward_anchor(self.anchor)
        metrics = self._update("generator", self.generator_opt, self.config.generator, updates, batch, means, finite)
        for part in ("drs", "reward"):  # a ratio of means: single samples may match perfectly
            if f"{part}/rms" in metrics:
                metrics[f"{part}/ratio"] = metrics[f"{part}/rms"] / max(metrics["matching/rms"], 1e-12)
        self._update_average()
        return metrics

    def backward(self, batch: Batch, name: str, loss: Callable[..., Losses]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the mean loss over ``batch``, added up by micro-batches to those of zero; the host waits for nothing.

        The generator's ``loss`` is given what to do meanwhile: :func:`didr_core.train.rewarded.in_flight`.

        Returns:
            Means of loss and metrics, and which samples ``[B]`` are finite in all of them.
        """
        weights = self.assistant_weights if name == "assistant" else self.generator_weights
        return self.blocks.run(lambda: self._backward(batch, weights, name, loss), weights.zero_gradients)

    def _backward(
        self, batch: Batch, weights: optim.Weights, name: str, loss: Callable[..., Losses]
    ) -> tuple[dict[str, Tensor], Tensor]:
        means: dict[str, Tensor] = {}
        finite: list[Tensor] = []
        size = self.config.sizes.micro_batch
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        for value, metrics in in_flight(parts, loss if name == "generator" else lambda part, _: loss(part)):
            seen = {f"loss/{name}": value.detach(), **{key: metric.detach() for key, metric in metrics.items()}}
            finite.append(functools.reduce(torch.logical_and, (v.isfinite() for v in seen.values())))
            with self.phase("TA: backward" if name == "assistant" else "generator: backward"):
                value.sum().div(len(batch)).backward()
                weights.gather()
            for key, metric in seen.items():
                means[key] = means.get(key, torch.zeros((), device=self.device)) + metric.sum() / len(batch)
        return means, torch.cat(finite)

    def backward_anchor(self, anchor: TeacherPairs) -> Tensor:
        """Adds the gradients of the weighted regression to this rank's share of stored pairs; ranks average to the batch's mean."""
        z, x0, condition, share = anchor.draw(self.config.seed, self.step_count, self.parallel)
        total, size = torch.zeros((), device=self.device), self.config.sizes.micro_batch
        with self.phase("generator: anchor"):
            for part in (slice(first, first + size) for first in range(0, len(z), size)):
                predicted = self.backbone.generate(self.generator_net, z[part], condition[part])
                value = share * anchor.config.weight * anchor.loss(predicted, x0[part]) * len(predicted) / len(z)
                value.backward()
                self.generator_weights.gather()
                total += value.detach()
        return total

    def _update(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        settings: Optim,
        updates: int,
        batch: Batch,
        means: dict[str, Tensor],
        finite: Tensor,
    ) -> dict[str, float]:
        """Average gradients and ``means`` over ranks, refuse what is not finite, clip, set the rate, update. Returns the means.
        Here, once an update, the host waits for the device."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights]
        flags = (~finite).sum().float()
        own = [g for g in gradients if not fsdp.is_sharded(g)]  # the others were averaged by their backward passes
        with self.phase("averaging"):
            self.parallel.mean_([flags, *means.values(), *own])
        norm = torch.nn.utils.get_total_norm(gradients)
        bad, size, *seen = torch.stack([flags, fsdp.whole(norm), *means.values()]).tolist()
        if bad > 0 or not math.isfinite(size):
            refused = [i for i, ok in zip(batch.ids, finite.tolist(), strict=True) if not ok]
            where = f"prompt ids {refused}" if refused else "its gradient, or another worker's samples"
            raise NonFiniteError(
                f"step {self.step_count + 1}: non-finite {name} loss or reward at {where}. The update was not applied and the last good "
                f"checkpoint is kept. Look at these prompts and the reward; lower {name}.lr (now {settings.lr:g}) or set drp.clip."
            )
        torch.nn.utils.clip_grads_with_norm_(weights, settings.max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * optim.rate(settings, updates, self.step_count / self.config.train.steps)
        optimizer.step()
        return dict(zip(means, seen, strict=True)) | {f"grad/{name}": size}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the generator's running average; young ones follow faster."""
        if self.ema_net is self.generator_net:
            return
        decay = min(self.config.train.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        means, values = map(optim.own_parts, (self.ema_net.parameters(), self.generator_weights.values.values()))
        torch._foreach_lerp_(means, [v.to(m.dtype) for m, v in zip(means, values, strict=True)], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs."""
        return {
            "generator": self.generator_weights.state_dict(),
            "assistant": self.assistant_weights.state_dict(),
            "ema": {} if self.ema_net is self.generator_net else self.ema_net.state_dict(),
            "generator_opt": self.generator_opt.state_dict(),
            "assistant_opt": self.assistant_opt.state_dict(),
            "scale": self.scale.state_dict(),
            "step_count": self.step_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        if self.ema_net is not self.generator_net:
            self.ema_net.load_state_dict(state["ema"])
        self.generator_weights.load_state_dict(state["generator"])
        self.assistant_weights.load_state_dict(state["assistant"])
        self.generator_opt.load_state_dict(state["generator_opt"])
        self.assistant_opt.load_state_dict(state["assistant_opt"])
        self.scale.load_state_dict(state["scale"])
        self.step_count = state["step_count"]


class GeneratorPass:
    """:class:`didr_core.types.GeneratorContext` for one micro-batch: what is asked for is computed once."""

    def __init__(self, learner: Learner, batch: Batch, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.learner, self.batch, self.noise = learner, batch, learner.noise
        backbone, config, noise = learner.backbone, learner.config, learner.noise
        shape = backbone.latent_shape
        z = noise.normal(batch.index, shape, "g/z")
        with learner.phase("generator: forward"):
            self.x0 = backbone.generate(learner.generator_net, z, batch.condition)
        self.host_t = noise.uniform(batch.index, "g/t", *config.times.generator).clamp(max=LATEST)
        self.t = ahead(self.host_t, learner.device)
        self.x_t = diffuse(backbone.schedule, self.x0, noise.normal(batch.index, shape, "g/eps"), self.t)
        self.alpha, self.sigma = coeffs_like(backbone.schedule, self.t, self.x_t)
        self.metrics: dict[str, Tensor] = {}
        self._reference: Tensor | None = None
        self._assistant: Tensor | None = None
        self._watched: Callable[[], Seen] | None = None
        self.rewarded: Rewarded | None = None
        if learner.reward is not None:
            self.rewarded = Rewarded(backbone, learner.reward, learner.scale, learner.phase)
            self.rewarded.meanwhile = [self._begin_watch, meanwhile] if learner.reward.begin else []

    def assistant(self, grad: bool = False) -> Tensor:
        """``D_psi(x_t)``; its weights take no gradient: they are frozen for the call."""
        learner, w = self.learner, self.learner.config.guidance.assistant
        if self._assistant is not None and not grad:
            return self._assistant
        with learner.phase("TA's answer"):
            if not grad:
                with torch.no_grad():
                    self._assistant = self._evaluate(learner.assistant_net, self.x_t.detach(), self.t, w, self.batch)
                return self._assistant
            with lora.frozen(learner.assistant_net):
                return self._evaluate(learner.assistant_net, self.x_t, self.t, w, self.batch)

    def _evaluate(self, network: nn.Module, x: Tensor, t: Tensor, guidance: float, batch: Batch) -> Tensor:
        condition = batch.condition.tile(len(x) // len(batch))
        return guided_x0(self.learner.backbone, network, x, t, condition, guidance)

    def reference(self, grad: bool = False) -> Tensor:
        """Guided ``D~_ref(x_t)``."""
        learner, w = self.learner, self.learner.config.guidance.reference
        if self._reference is not None and not grad:
            return self._reference
        with learner.phase("reference"):
            if grad:
                return self._evaluate(learner.reference_net, self.x_t, self.t, w, self.batch)
            with torch.no_grad():
                self._reference = self._evaluate(learner.reference_net, self.x_t.detach(), self.t, w, self.batch)
        return self._reference

    def drs(self) -> Tensor:
        """``s_r(x_t)``, gated and clipped."""
        config = self.learner.config
        inner = config.guidance.reference if config.drp.guidance is None else config.drp.guidance

        def functions(rows: slice | Tensor) -> tuple[drs.Denoise, drs.Reward]:
            batch = self.batch[rows]

            def denoise(x: Tensor, t: Tensor) -> Tensor:
                call = self.learner.reference_net, x, t, inner, batch
                if config.drp.gradient_checkpointing and torch.is_grad_enabled():
                    return checkpoint(self._evaluate, *call, use_reentrant=False)  # type: ignore[no-any-return]
                return self._evaluate(*call)

            return denoise, lambda latent: self._rewarded.of(latent, batch)

        (denoise, reward), schedule = functions(slice(None)), self.learner.backbone.schedule
        x = self.x_t.detach()
        problem = drs.Problem(
            x, self.t, schedule, denoise, reward, self._particles, config.drp.beta, self.host_t, functions
        )
        if self._rewarded.meanwhile:
            self._rewarded.meanwhile.insert(0, self.assistant)  # who asks for s_r compares it with that
        with self.learner.phase("proxy"):
            estimate = drs.estimate(config.drp, problem)
        if inner == config.guidance.reference:
            self._reference = estimate.x0
        score = estimate.score * self.alpha.square() if config.drp.snr_gate else estimate.score
        if config.drp.clip is not None:
            limit = config.drp.clip * losses.rms(
                (self.alpha * self.reference() - self.x_t.detach()) / self.sigma.square()
            )
            score, self.metrics["drs/clipped"] = losses.clip_rms(score, limit)
        self.metrics["reward/proxy"] = estimate.reward
        return score

    def reward(self, latent: Tensor) -> Tensor:
        """Standardised reward of clean latents ``[M * B]``: 0 is the starting generator's mean, 1 its standard deviation."""
        return self._rewarded.of(latent, self.batch)

    @torch.no_grad()
    def watch(self) -> None:
        """Log the reward of the generator's own pictures; of a composite, ``reward/<part>/raw|scaled|weighted`` too."""
        self._begin_watch()
        assert self._watched is not None
        seen = self._watched()
        self.metrics |= {"reward/gain": seen.gain, "reward/raw": seen.raw}
        self.metrics |= {f"reward/{name}": value for name, value in seen.parts.items()}
        self.metrics["image/clipped"] = ((seen.images <= 0) | (seen.images >= 1)).float().flatten(1).mean(1)

    @torch.no_grad()
    def _begin_watch(self) -> None:
        self._watched = self._watched or self._rewarded.begin(self.x0.detach(), self.batch, parts=True)

    @property
    def _rewarded(self) -> Rewarded:
        assert self.rewarded is not None, "the algorithm declares needs_reward"
        return self.rewarded

    def _particles(self, tag: str, times: int) -> Tensor:
        shape = self.learner.backbone.latent_shape
        return torch.cat([self.noise.normal(self.batch.index, shape, f"{tag}/{m}") for m in range(times)])
