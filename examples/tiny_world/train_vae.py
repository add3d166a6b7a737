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
    """Train the autoencoder through its three stretches; one process of the group."""
    s = {**DEFAULTS, **settings}
    torch.manual_seed(s["seed"])
    vae = build_vae().to(memory_format=torch.channels_last)
    pictures = draw_pictures(s["pictures"], s["seed"], held_out=False).to(memory_format=torch.channels_last)
    joint = s["crop_steps"] + s["full_steps"]
    total = joint + s["decoder_steps"]
    ends = lambda name: name.endswith(("layers.0.weight",))  # noqa: E731 - first convolutions go to Adam
    first = training.Muon(vae.named_parameters(), s["lr"], adam_for=ends)
    second = training.Muon(vae.decoder.named_parameters(), s["lr"] * 0.6, adam_for=ends)
    ema = training.Ema(vae.parameters(), 0.995)
    checkpoint = training.Checkpoint(
        folder / "vae_state.pt", {"vae": vae, "first": first, "second": second, "ema": ema}
    )
    start = checkpoint.load()
    for step in range(start, total):
        rng = torch.Generator().manual_seed(s["seed"] * 1_000_003 + step * training.world() + training.rank())
        batch = s["batch"] * (2 if step < s["crop_steps"] else 1)
        x = pictures[torch.randint(len(pictures), (batch,), generator=rng)]
        if step < s["crop_steps"]:
            top, left = torch.randint(0, 17, (2,), generator=rng).tolist()
            x = x[:, :, top : top + 16, left : left + 16]
        optimizer = first if step < joint else second
        optimizer.scale_lr(
            training.decay(step, joint) if step < joint else training.decay(step - joint, s["decoder_steps"])
        )
        if step < joint:
            latents = vae.encoder(x)
            extra = 0.02 * whitening_loss(latents)
            noise = 0.03
        else:
            with torch.no_grad():
                latents = vae.encoder(x)
            extra = torch.zeros(())
            noise = 0.12 * float(torch.rand((), generator=rng))
        back = vae.decoder(latents + noise * torch.randn(latents.shape, generator=rng))
        error = back - x
        loss = F.smooth_l1_loss(back, x, beta=0.1) + error.square().mean() + extra
        vae.zero_grad(set_to_none=True)
        loss.backward()
        training.average_gradients(vae.parameters())
        optimizer.step()
        ema.update()
        if step == joint - 1:
            ema.copy_to_model()
        if step % 100 == 0:
            training.say(
                f"vae {step}/{total} loss {loss.item():.4f} rmse {error.square().mean().sqrt().item():.4f} {checkpoint.seconds:.0f}s"
            )
        checkpoint.save(step + 1)
    ema.copy_to_model()
    checkpoint.save(total, force=True)
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


def build(folder: Path = training.BUILD_DIR, **settings: Any) -> None:
    """Train the VAE into ``folder``/vae (fp32)."""
    training.launch(worker, folder, settings, processes=settings.get("processes"))


if __name__ == "__main__":
    build()
