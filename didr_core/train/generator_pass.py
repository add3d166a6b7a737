"""What an algorithm's loss may ask for in the generator's update, of one micro-batch: samples, the networks' answers, the DRS, the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from didr_core import drs
from didr_core.algorithms import losses
from didr_core.diffusion.noise import ahead
from didr_core.diffusion.sampling import guided_x0
from didr_core.diffusion.schedule import LATEST, coeffs_like, diffuse
from didr_core.networks import lora
from didr_core.types import Batch

if TYPE_CHECKING:
    from didr_core.train.learner import Learner


class GeneratorPass:
    """:class:`didr_core.types.GeneratorContext` for one micro-batch: what is asked for is computed once."""

    def __init__(self, learner: Learner, batch: Batch) -> None:
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

    def assistant(self, grad: bool = False) -> Tensor:
        """``D_psi(x_t)``; its weights take no gradient: they are frozen for the call."""
        learner, w = self.learner, self.learner.config.guidance.assistant
        with learner.phase("TA's answer"):
            if not grad:
                with torch.no_grad():
                    return self._evaluate(learner.assistant_net, self.x_t.detach(), self.t, w, self.batch)
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

            return denoise, lambda latent: self._reward(latent, batch)[0]

        (denoise, reward), schedule = functions(slice(None)), self.learner.backbone.schedule
        x = self.x_t.detach()
        problem = drs.Problem(
            x, self.t, schedule, denoise, reward, self._particles, config.drp.beta, self.host_t, functions
        )
        with self.learner.phase("proxy"):
            estimate = drs.estimate(config.drp, problem)
        if inner == config.guidance.reference:
            self._reference = estimate.x0
        score = estimate.score
        if config.drp.snr_gate:
            score = score * self.alpha.square()
        if config.drp.clip is not None:
            limit = config.drp.clip * losses.rms(
                (self.alpha * self.reference() - self.x_t.detach()) / self.sigma.square()
            )
            score, self.metrics["drs/clipped"] = losses.clip_rms(score, limit)
        self.metrics["reward/proxy"] = estimate.reward
        return score

    def reward(self, latent: Tensor) -> Tensor:
        """Standardised reward of clean latents ``[M * B]``: 0 is the starting generator's mean, 1 its standard deviation."""
        return self._reward(latent, self.batch)[0]

    @torch.no_grad()
    def watch(self, x0: Tensor) -> None:
        """Log the reward of the generator's own pictures; of a composite, ``reward/<part>/raw|scaled|weighted`` too."""
        self.metrics["reward/gain"], self.metrics["reward/raw"], images = self._reward(x0, self.batch, log=True)
        self.metrics["image/clipped"] = ((images <= 0) | (images >= 1)).float().flatten(1).mean(1)

    def _reward(self, latent: Tensor, batch: Batch, log: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised and raw reward ``[M * B]`` of the latents of ``batch``, and the pictures."""
        learner = self.learner
        assert learner.reward is not None, "the algorithm declares needs_reward"
        times = len(latent) // len(batch)
        inputs = {k: v.repeat(times, *([1] * (v.dim() - 1))) for k, v in batch.reward_inputs.items()}
        details = learner.reward.details if log else None
        with learner.phase("decoder"):
            images = learner.backbone.decode(latent)
        with learner.phase("reward"):
            if details:
                raw, parts = details(images, inputs)
                self.metrics |= {f"reward/{name}": value for name, value in parts.items()}
            else:
                raw = learner.reward.score(images, inputs)
        baseline = torch.zeros_like(raw) if batch.baseline is None else batch.baseline.repeat(times)
        return (raw - baseline) / learner.scale.value, raw, images

    def _particles(self, tag: str, times: int) -> Tensor:
        shape = self.learner.backbone.latent_shape
        return torch.cat([self.noise.normal(self.batch.index, shape, f"{tag}/{m}") for m in range(times)])
