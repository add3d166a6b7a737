"""Parts "pairs" and "regression": the one-step generator to start from.

``pairs`` runs the guided teacher's deterministic sampler from noise to latent for training captions. ``regression`` copies the reference's
UNet, tells it t = 399, feeds it that pure noise and pulls its clean latent to the teacher's by sqrt(squared error + 0.01). Regression
keeps what distribution matching loses: which background and which place a given noise stands for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from didr_core.config.files import replaced
from didr_core.world.captions import KIND_WEIGHTS, sample_facts, write_caption
from examples.tiny_world import training
from examples.tiny_world.assemble import assemble_generator
from examples.tiny_world.sampling import Parts, ddim, one_step, start_noise
from examples.tiny_world.tokenizer import token_ids

PAIRS: dict[str, Any] = {"count": 6400, "steps": 12, "guidance": 2.0, "batch": 64, "seed": 61}
REGRESSION: dict[str, Any] = {"steps": 900, "batch": 24, "lr": 3e-3, "ema": 0.99, "seed": 71}


def pairs_worker(folder: Path, settings: dict[str, Any]) -> None:
    """Every process makes its share, in resumable blocks of ``batch`` pairs; rank 0 joins them."""
    s = {**PAIRS, **settings}
    parts = Parts.load(folder)
    blocks = (s["count"] + s["batch"] - 1) // s["batch"]
    store = folder / "pair_blocks"
    store.mkdir(exist_ok=True)
    for block in range(training.rank(), blocks, training.world()):
        path = store / f"{block:05d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng(s["seed"] * 1_000_003 + block)
        captions = [write_caption(sample_facts(rng, KIND_WEIGHTS), rng) for _ in range(s["batch"])]
        noise = start_noise(s["batch"], s["seed"] * 1_000_003 + block)
        latents = ddim(parts.unet, noise, *parts.encode(captions), s["steps"], s["guidance"])
        ids = token_ids(parts.tokenizer, captions)
        with replaced(path) as partial:
            save_file({"noise": noise.contiguous(), "latents": latents.contiguous(), "ids": ids}, partial)
        if block % 20 == 0:
            training.say(f"pairs block {block}/{blocks}")
    if dist.is_initialized():
        dist.barrier()
    if training.rank() == 0:
        loaded = [load_file(store / f"{block:05d}.safetensors") for block in range(blocks)]
        save_file(
            {name: torch.cat([item[name] for item in loaded])[: s["count"]] for name in loaded[0]},
            folder / "pairs.safetensors",
        )
        training.say(f"pairs saved: {s['count']}")


def regression_worker(folder: Path, settings: dict[str, Any]) -> None:
    """Train the one-step UNet on the pairs; one process of the group."""
    s = {**REGRESSION, **settings}
    torch.manual_seed(s["seed"])
    parts = Parts.load(folder)
    pairs = load_file(folder / "pairs.safetensors")
    noise, latents = pairs["noise"], pairs["latents"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(memory_format=torch.channels_last)

    def loss(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        rows = torch.randint(len(noise), (s["batch"],), generator=rng)
        hidden, pooled = parts.encode_ids(pairs["ids"][rows])
        guess = one_step(unet, noise[rows].contiguous(memory_format=torch.channels_last), hidden, pooled)
        return ((guess - latents[rows]).square() + 0.01).sqrt().mean(), {}

    optimizers = training.muon_and_adam(unet.named_parameters(), s["lr"], adam_lr=1e-3)
    training.train(folder / "regression_state.pt", unet, optimizers, loss, s["steps"], s["seed"], s["ema"])
    if training.rank() == 0:
        unet.save_pretrained(folder / "regression_unet")
        training.say("regression saved")


def build_pairs(folder: Path, world: Path, **settings: Any) -> None:
    """Noise-to-latent pairs of the teacher in ``folder``/pairs.safetensors (noise, latents [N, 4, 8, 8], ids [N, tokens])."""
    training.launch(pairs_worker, folder, settings, processes=settings.get("processes"))


def build_regression(folder: Path, world: Path, **settings: Any) -> None:
    """Train ``folder``/regression_unet and put it into ``world``/generator as fp16."""
    training.launch(regression_worker, folder, settings, processes=settings.get("processes"))
    assemble_generator(folder / "regression_unet", world)
