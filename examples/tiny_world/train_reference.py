"""Part "reference": the multi-step text-to-image teacher (UNet and both text encoders, trained jointly by epsilon prediction)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from didr_core.world.captions import draw_scenes, sample_facts, write_caption
from didr_core.world.scenes import render
from examples.tiny_world import training
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
    "kinds": {
        "single": 0.15,
        "count": 0.2,
        "pair": 0.25,
        "relation": 0.4,
    },  # relations learn last, so they come more often
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
    from diffusers import AutoencoderTiny
    from transformers import CLIPTokenizer

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
    from transformers import CLIPTokenizer

    s = {**DEFAULTS, **settings}
    torch.manual_seed(s["seed"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    data = torch.load(folder / "latents.pt", weights_only=True, mmap=True)
    latents, ids = data["latents"], data["ids"]
    unet = build_unet().to(memory_format=torch.channels_last)
    first, second = build_text_encoders(tokenizer)
    model = torch.nn.ModuleDict({"unet": unet, "first": first, "second": second})
    named = [(name.split(".", 1)[1], parameter) for name, parameter in model.named_parameters()]
    optimizer = training.Muon(named, s["lr"])
    ema = training.Ema(model.parameters(), s["ema"])
    checkpoint = training.Checkpoint(
        folder / "reference_state.pt", {"model": model, "optimizer": optimizer, "ema": ema}
    )
    start = checkpoint.load()
    acp = build_scheduler().alphas_cumprod
    batch, losses = s["batch"], []
    for step in range(start, s["steps"]):
        seed = s["seed"] * 1_000_003 + step * training.world() + training.rank()
        rng = torch.Generator().manual_seed(seed)
        index = torch.randint(len(latents), (batch,), generator=rng)
        x0 = latents[index]
        # Stratified over the batch: less variance than independent draws.
        t = ((torch.arange(batch) + torch.rand(batch, generator=rng)) / batch * TRAIN_STEPS).long()
        eps = torch.randn(x0.shape, generator=rng)
        level = acp[t].view(-1, 1, 1, 1)
        x = level.sqrt() * x0 + (1 - level).sqrt() * eps
        hidden, pooled = encode_text(first, second, ids[index].long())
        keep = (torch.rand(batch, generator=rng) >= s["drop"]).float()
        guess = predict(
            unet,
            x.contiguous(memory_format=torch.channels_last),
            t,
            hidden * keep[:, None, None],
            pooled * keep[:, None],
        )
        loss = (guess - eps).square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        training.average_gradients(model.parameters())
        optimizer.scale_lr(training.decay(step, s["steps"]))
        optimizer.step()
        ema.update()
        losses.append(loss.item())
        if step % 100 == 0:
            training.say(f"reference {step}/{s['steps']} loss {np.mean(losses[-100:]):.4f} {checkpoint.seconds:.0f}s")
        checkpoint.save(step + 1)
    ema.copy_to_model()
    checkpoint.save(s["steps"], force=True)
    if training.rank() == 0:
        unet.save_pretrained(folder / "unet")
        first.save_pretrained(folder / "text_encoder")
        second.save_pretrained(folder / "text_encoder_2")
        training.say("reference saved")


def build(folder: Path = training.BUILD_DIR, **settings: Any) -> None:
    """Train the reference into ``folder``/{unet, text_encoder, text_encoder_2} (fp32)."""
    prepare(folder, {**DEFAULTS, **settings})
    training.launch(worker, folder, settings, processes=settings.get("processes"))


if __name__ == "__main__":
    build()
