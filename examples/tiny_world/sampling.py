"""Sampling helpers shared by the build, the tests and the card: DDIM with guidance, one step, decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.tiny_world.networks import LATENT, LATENT_CHANNELS, TIME_IDS, build_scheduler, encode_text
from examples.tiny_world.tokenizer import token_ids

ONE_STEP_T = 399


@dataclass
class Parts:
    """The pipeline's networks in fp32 on the CPU, in eval mode."""

    unet: UNet2DConditionModel
    vae: AutoencoderTiny
    first: CLIPTextModel
    second: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer

    @staticmethod
    def load(pipeline: Path, unet: Path | None = None) -> Parts:
        """Load a pipeline folder; ``unet`` replaces its UNet by another UNet folder (the one-step generator)."""
        network = UNet2DConditionModel.from_pretrained(unet or pipeline / "unet", torch_dtype=torch.float32)
        return Parts(
            network.eval().to(memory_format=torch.channels_last),
            AutoencoderTiny.from_pretrained(pipeline / "vae", torch_dtype=torch.float32).eval(),
            CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval(),
            CLIPTextModelWithProjection.from_pretrained(pipeline / "text_encoder_2", dtype=torch.float32).eval(),
            CLIPTokenizer.from_pretrained(pipeline / "tokenizer"),
        )

    @torch.no_grad()
    def encode_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_text(self.first, self.second, ids)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_text(self.first, self.second, token_ids(self.tokenizer, captions))


def predict(unet: Any, x: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """eps [B, 4, 8, 8] of x at timesteps t [B]."""
    size = torch.tensor(TIME_IDS, dtype=torch.float32).expand(len(x), -1)  # SDXL's, the same for every picture
    return unet(x, t, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": size}).sample


def start_noise(count: int, seed: int) -> torch.Tensor:
    """Seeded N(0, I) latents [count, 4, 8, 8]."""
    return torch.randn(count, LATENT_CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ddim(
    unet: Any, noise: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor, steps: int, guidance: float
) -> torch.Tensor:
    """Deterministic DDIM latents [B, 4, 8, 8] with classifier-free guidance against zeros."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    x = noise
    both = torch.cat([torch.zeros_like(hidden), hidden]), torch.cat([torch.zeros_like(pooled), pooled])
    for t in scheduler.timesteps:
        if guidance > 1:
            eps = predict(unet, torch.cat([x, x]), t.expand(2 * len(x)), *both)
            free, told = eps.chunk(2)
            eps = free + guidance * (told - free)
        else:
            eps = predict(unet, x, t.expand(len(x)), hidden, pooled)
        x = scheduler.step(eps, t, x).prev_sample
    return x


def one_step(unet: Any, noise: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Clean latents from pure N(0, I) noise that the network is told is x_399; keeps the graph."""
    acp = build_scheduler().alphas_cumprod[ONE_STEP_T]
    eps = predict(unet, noise, torch.full((len(noise),), ONE_STEP_T), hidden, pooled)
    return (noise - (1 - acp).sqrt() * eps) / acp.sqrt()


@torch.no_grad()
def decode(vae: AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 32, 32] in [0, 1]."""
    return (vae.decoder(latents / vae.config.scaling_factor) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample(
    parts: Parts, captions: list[str], seed: int, steps: int = 1, guidance: float = 4.0, batch: int = 64
) -> torch.Tensor:
    """Pictures [N, 3, 32, 32] in [0, 1]: one step without guidance, or ``steps`` of guided DDIM; noise depends on the seed only."""
    noise = start_noise(len(captions), seed)
    out = []
    for first in range(0, len(captions), batch):
        hidden, pooled = parts.encode(captions[first : first + batch])
        z = noise[first : first + batch]
        if steps == 1:
            latents = one_step(parts.unet, z, hidden, pooled)
        else:
            latents = ddim(parts.unet, z, hidden, pooled, steps, guidance)
        out.append(decode(parts.vae, latents))
    return torch.cat(out)
