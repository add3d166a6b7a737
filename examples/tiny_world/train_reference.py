"""Part "reference": the multi-step text-to-image teacher (UNet and both text encoders, trained jointly by epsilon prediction)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTokenizer

from didr_core.world.captions import draw_scenes, sample_facts, write_caption
from didr_core.world.scenes import render
from examples.tiny_world import training
from examples.tiny_world.assemble import assemble_pipeline
from examples.tiny_world.networks import TRAIN_STEPS, build_scheduler, build_text_encoders, build_unet, encode_text
from examples.tiny_world.sampling import predict
from examples.tiny_world.tokenizer import token_ids

DEFAULTS: dict[str, Any] = {
    "scenes": 120_000,
    "steps": 4400,
    "batch": 32,
    "lr": 4e-3,
    "ema": 0.998,
    "drop": 0.1,
    "seed": 21,
    "kinds": {"single": 0.15, "count": 0.2, "pair": 0.25, "relation": 0.4},  # relations, learnt last, come most often
}


@torch.no_grad()
def encode_scenes(
    vae: Any, tokenizer: Any, count: int, kinds: dict[str, float], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training pairs: latents [count, 4, 8, 8] (times scaling_factor) and caption ids [count, tokens]; training facts only."""
    rng = np.random.default_rng(seed)
    latents, ids = [], []
    while count > 0:
        facts = [sample_facts(rng, kinds, held_out=False) for _ in range(min(2000, count))]
        pictures = torch.from_numpy(render(draw_scenes(facts, rng))) * 2 - 1
        latents.append(
            vae.encoder(pictures.contiguous(memory_format=torch.channels_last)).contiguous() * vae.config.scaling_factor
        )
        ids.append(token_ids(tokenizer, [write_caption(fact, rng) for fact in facts]))
        count -= len(facts)
    return torch.cat(latents), torch.cat(ids)


def prepare(folder: Path, s: dict[str, Any]) -> None:
    """Render and encode the training scenes once (a quarter of a minute for 100,000), kept in the build folder."""
    path = folder / "latents.pt"
    if path.exists():
        return
    vae = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    latents, ids = encode_scenes(vae, tokenizer, s["scenes"], s["kinds"], s["seed"] + 1)
    training.say(f"{len(latents)} scenes encoded, latent mean {latents.mean():.3f} std {latents.std():.3f}")
    torch.save({"latents": latents, "ids": ids.to(torch.int16)}, path)


def worker(folder: Path, settings: dict[str, Any]) -> None:
    """Train UNet and text encoders; one process of the group."""
    s = {**DEFAULTS, **settings}
    torch.manual_seed(s["seed"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    data = torch.load(folder / "latents.pt", weights_only=True, mmap=True)
    latents, ids = data["latents"], data["ids"]
    unet = build_unet().to(memory_format=torch.channels_last)
    first, second = build_text_encoders(tokenizer)
    model = torch.nn.ModuleDict({"unet": unet, "first": first, "second": second})
    named = [(name.split(".", 1)[1], parameter) for name, parameter in model.named_parameters()]
    acp, batch = build_scheduler().alphas_cumprod, s["batch"]

    def loss(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        index = torch.randint(len(latents), (batch,), generator=rng)
        x0 = latents[index]
        # Stratified over the batch: less variance than independent draws.
        t = ((torch.arange(batch) + torch.rand(batch, generator=rng)) / batch * TRAIN_STEPS).long()
        eps = torch.randn(x0.shape, generator=rng)
        level = acp[t].view(-1, 1, 1, 1)
        x = (level.sqrt() * x0 + (1 - level).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        hidden, pooled = encode_text(first, second, ids[index].long())
        keep = (torch.rand(batch, generator=rng) >= s["drop"]).float()
        guess = predict(unet, x, t, hidden * keep[:, None, None], pooled * keep[:, None])
        return (guess - eps).square().mean(), {}

    optimizers = training.muon_and_adam(named, s["lr"])
    training.train(folder / "reference_state.pt", model, optimizers, loss, s["steps"], s["seed"], s["ema"])
    if training.rank() == 0:
        unet.save_pretrained(folder / "unet")
        first.save_pretrained(folder / "text_encoder")
        second.save_pretrained(folder / "text_encoder_2")
        training.say("reference saved")


def build(folder: Path, world: Path, **settings: Any) -> None:
    """Train the reference into ``folder``/{unet, text_encoder, text_encoder_2} (fp32) and put the pipeline into ``world`` as fp16."""
    prepare(folder, {**DEFAULTS, **settings})
    training.launch(worker, folder, settings, processes=settings.get("processes"))
    assemble_pipeline(folder, world)
