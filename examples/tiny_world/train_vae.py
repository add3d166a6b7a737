"""Part "vae": an AutoencoderTiny whose latents are white.

Phase one trains encoder and decoder, first on 16x16 crops (the network is convolutional, crops are four times cheaper), with a loss that
pulls the latents' channel covariance to the identity. Phase two keeps the encoder fixed and trains the decoder on slightly noisy latents,
because generators do not hit latents exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from didr_core.world.captions import draw_scenes, sample_facts
from didr_core.world.scenes import render
from examples.tiny_world import training
from examples.tiny_world.assemble import tidy_config
from examples.tiny_world.networks import build_vae

DEFAULTS = {
    "pictures": 16000,
    "crop_steps": 1400,
    "full_steps": 700,
    "decoder_steps": 1400,
    "batch": 32,
    "lr": 5e-3,
    "seed": 11,
}


def draw_pictures(count: int, seed: int, held_out: bool | None = None) -> torch.Tensor:
    """Scenes of all kinds as [count, 3, 32, 32] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    facts = [sample_facts(rng, held_out=held_out) for _ in range(count)]
    return torch.from_numpy(render(draw_scenes(facts, rng))) * 2 - 1


def whitening_loss(latents: torch.Tensor) -> torch.Tensor:
    """Squared distance of the latents' mean from 0 and of their channel covariance from the identity."""
    flat = latents.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    covariance = centred @ centred.mT / flat.shape[1]
    return mean.square().sum() + (covariance - torch.eye(len(covariance))).square().sum()


def worker(folder: Path, settings: dict[str, Any]) -> None:
    """Train the autoencoder, then its decoder alone; one process of the group."""
    s = {**DEFAULTS, **settings}
    torch.manual_seed(s["seed"])
    vae = build_vae().to(memory_format=torch.channels_last)
    pictures = draw_pictures(s["pictures"], s["seed"], held_out=False).to(memory_format=torch.channels_last)

    def drawn(batch: int, rng: torch.Generator) -> torch.Tensor:
        return pictures[torch.randint(len(pictures), (batch,), generator=rng)]

    def rebuilt(
        x: torch.Tensor, latents: torch.Tensor, noise: float, rng: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        back = vae.decoder(latents + noise * torch.randn(latents.shape, generator=rng))
        square = (back - x).square().mean()
        return F.smooth_l1_loss(back, x, beta=0.1) + square, {"rmse": square.sqrt().item()}

    def white(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        crops = step < s["crop_steps"]
        x = drawn(s["batch"] * (2 if crops else 1), rng)
        if crops:
            top, left = torch.randint(0, 17, (2,), generator=rng).tolist()
            x = x[:, :, top : top + 16, left : left + 16]
        latents = vae.encoder(x)
        loss, told = rebuilt(x, latents, 0.03, rng)
        return loss + 0.02 * whitening_loss(latents), told

    def noisy(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = drawn(s["batch"], rng)
        with torch.no_grad():
            latents = vae.encoder(x)
        return rebuilt(x, latents, 0.12 * float(torch.rand((), generator=rng)), rng)

    joint, seed = s["crop_steps"] + s["full_steps"], s["seed"]
    for name, part, rate, loss, steps in (
        ("vae", vae, s["lr"], white, joint),
        ("vae_decoder", vae.decoder, s["lr"] * 0.6, noisy, s["decoder_steps"]),
    ):
        # The first convolutions go to Adam.
        optimizers = training.muon_and_adam(
            part.named_parameters(), rate, adam_for=lambda n: n.endswith("layers.0.weight")
        )
        training.train(folder / f"{name}_state.pt", part, optimizers, loss, steps, seed, ema=0.995)
        seed += 1
    if training.rank() == 0:
        finish(vae, pictures[:2048], folder)


@torch.no_grad()
def finish(vae: Any, pictures: torch.Tensor, folder: Path) -> None:
    """Set ``scaling_factor`` so that ``encode(x) * scaling_factor`` has unit variance, and save the fp32 folder."""
    latents = vae.encoder(pictures)
    scale = float(1 / latents.std())
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(folder / "vae")
    tidy_config(folder / "vae")
    spread = (latents * scale).transpose(0, 1).flatten(1).std(1)
    training.say(
        f"vae saved, scaling_factor {scale:.4f}, std by channel {spread.tolist()}, mean {latents.mean((0, 2, 3)).tolist()}"
    )


def build(folder: Path, world: Path, **settings: Any) -> None:
    """Train the VAE into ``folder``/vae (fp32)."""
    training.launch(worker, folder, settings, processes=settings.get("processes"))
