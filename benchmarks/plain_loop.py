"""The loop one writes first, to stand beside the learner: three copies of the network, nothing shared, one call for each prediction.

It computes DIDR's own update with the estimator `ode` (held to the learner's by a test), for SDXL alone. Precision, activation
checkpointing (diffusers' own) and sizes are those of the config that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from didr_core.algorithms import losses
from didr_core.backbones.sdxl import SDXL
from didr_core.config import Config
from didr_core.diffusion.noise import Noise
from didr_core.diffusion.schedule import chain_times, coeffs_like, diffuse, step
from didr_core.plan import hollow
from didr_core.types import Batch, Condition


class Plain:
    """Random weights of the config's sizes, on ``device``; ``phase`` as the learner's."""

    def __init__(
        self, config: Config, folder: Path, device: torch.device, phase: Any = record_function, noise: Any = None
    ) -> None:
        self.config, self.phase, self.noise = config, phase, noise or Noise(config.seed)
        self.backbone: SDXL = hollow.backbone(config.backbone, folder, str(device))
        dtype = getattr(torch, config.roles.dtype.generator)
        nets = [self.backbone.load_network(role).to(device, dtype) for role in ("generator", "assistant", "reference")]
        self.generator, self.assistant, self.reference = nets
        self.reference.requires_grad_(False)
        for net in nets:
            if config.roles.gradient_checkpointing:
                net.enable_gradient_checkpointing()
        self.backbone.load_decoder()
        self.backbone.to(device)
        self.reward = hollow.Reward(config.reward, str(device))
        self.optimizers = [
            torch.optim.AdamW(net.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
            for net, o in ((self.generator, config.generator), (self.assistant, config.assistant))
        ]

    def step(self, batch: Batch) -> None:
        """One iteration: TA updates, then the generator's."""
        for k in range(self.config.train.assistant_updates):
            with self.phase("TA update"):
                self.backward(batch, lambda part, k=k: self.assistant_loss(part, f"ta{k}"))
                self._update(1)
        with self.phase("generator update"):
            self.backward(batch, self.generator_loss)
            self._update(0)

    def backward(self, batch: Batch, loss: Callable[[Batch], Tensor]) -> None:
        """Gradients of the mean loss, added up by micro-batches."""
        size = self.config.sizes.micro_batch
        for start in range(0, len(batch), size):
            with self.phase("forward and backward"):
                (loss(batch[start : start + size]).sum() / len(batch)).backward()

    def _update(self, which: int) -> None:
        net, optimizer = (self.generator, self.assistant)[which], self.optimizers[which]
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    def assistant_loss(self, part: Batch, tag: str) -> Tensor:
        """Denoising score matching on fresh samples ``[B]``."""
        noise, shape, schedule = self.noise, self.backbone.latent_shape, self.backbone.schedule
        with torch.no_grad():
            x0 = self.backbone.generate(self.generator, noise.normal(part.index, shape, f"{tag}/z"), part.condition)
        t = noise.uniform(part.index, f"{tag}/t", *self.config.times.assistant)
        x_t = diffuse(schedule, x0, noise.normal(part.index, shape, f"{tag}/eps"), t)
        predicted = self.backbone.x0(self.assistant, x_t, t, part.condition)
        return losses.denoising_score_matching(predicted, x0, *coeffs_like(schedule, t, x_t))

    def generator_loss(self, part: Batch) -> Tensor:
        """DIDR's matching loss ``[B]``."""
        noise, shape, schedule = self.noise, self.backbone.latent_shape, self.backbone.schedule
        x0 = self.backbone.generate(self.generator, noise.normal(part.index, shape, "g/z"), part.condition)
        t = noise.uniform(part.index, "g/t", *self.config.times.generator)
        x_t = diffuse(schedule, x0, noise.normal(part.index, shape, "g/eps"), t).detach()
        alpha, sigma = coeffs_like(schedule, t, x_t)
        with self.phase("proxy"):
            drs = self._drs(x_t, t, part) / 0.1  # 0.1: the square root of the batch's spread
        with torch.no_grad():
            reference = self._guided(x_t, t, part.condition)
            told = self.backbone.x0(self.assistant, x_t, t, part.condition)
        weight = losses.normalizer(x0.detach(), reference)
        return losses.matching(x0, weight * (told - losses.tilted_target(reference, drs, alpha, sigma)))

    def _guided(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        null = self.backbone.x0(self.reference, x, t, self.backbone.null(condition))
        told = self.backbone.x0(self.reference, x, t, condition)
        return null + self.config.guidance.reference * (told - null)

    def _drs(self, x_t: Tensor, t: Tensor, part: Batch) -> Tensor:
        x = leaf = x_t.clone().requires_grad_()
        times = chain_times(t, self.config.drp.steps)
        clean = self._guided(x, t, part.condition)
        for before, now in pairwise(times):
            x = step(self.backbone.schedule, x, clean, before, now)
            clean = self._guided(x, now, part.condition)
        score = self.reward.score(self.backbone.decode(clean), {})
        return torch.autograd.grad(score.sum(), leaf)[0] / self.config.drp.beta
