"""Put trained parts from the build folder into the committed world folder: fp16 safetensors in stock diffusers' layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.tiny_world.networks import build_scheduler


def tidy_config(folder: Path) -> None:
    """Drop what a saved config should not carry: where it was loaded from, and the key that AutoencoderTiny warns about."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if config["_class_name"] == "AutoencoderTiny":
        config.pop("block_out_channels", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def assemble_pipeline(build: Path, world: Path) -> None:
    """Make ``world``/pipeline, which stock ``StableDiffusionXLPipeline`` loads, from ``build``/{unet, vae, text_encoder*, tokenizer}."""
    vae = AutoencoderTiny.from_pretrained(build / "vae", torch_dtype=torch.float16)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(build / "text_encoder", dtype=torch.float16),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(build / "text_encoder_2", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(build / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(build / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(build / "unet", torch_dtype=torch.float16),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    shutil.rmtree(world / "pipeline", ignore_errors=True)
    pipeline.save_pretrained(world / "pipeline")
    for part in ("vae", "unet"):
        tidy_config(world / "pipeline" / part)


def assemble_generator(source: Path, world: Path) -> None:
    """``world``/generator, a UNet folder in fp16, from an fp32 UNet folder."""
    shutil.rmtree(world / "generator", ignore_errors=True)
    UNet2DConditionModel.from_pretrained(source, torch_dtype=torch.float16).save_pretrained(world / "generator")
    tidy_config(world / "generator")
