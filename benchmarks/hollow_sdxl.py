"""Pipeline folders without weights, and toy sizes of their parts: benchmarks of the real code around random weights, without files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPConfig

from didr_core.plan import published

TINY_UNET = {
    **published.PARTS["sdxl"]["unet"],
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
TINY_VAE = {
    **published.PARTS["sdxl"]["decoder"],
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * 4),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,) * 4),
}
TINY_CLIP = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def backbone(size: str, decoder: str, folder: Path) -> dict[str, Any]:
    """The options of backbone `sdxl` in a recipe: of the published sizes, or tiny ones written into ``folder``."""
    if size == "full":  # no such folders: the published sizes are taken
        return {"pipeline": "none", "generator": "none"} | ({"decoder": "none"} if decoder == "tiny" else {})
    return {"pipeline": str(published.write("sdxl", folder, unet=TINY_UNET, vae=TINY_VAE)), "generator": "none"}


def reward(size: str, folder: Path) -> dict[str, Any]:
    """The options of a reward in a recipe: HPSv2's towers, or tiny ones written into ``folder``."""
    if size == "full":
        return {"name": "hpsv2", "path": "none"}
    clip = folder / "clip"
    clip.mkdir(parents=True, exist_ok=True)
    vision = {**TINY_CLIP, "patch_size": 8, "image_size": 32}
    settings = CLIPConfig(text_config=TINY_CLIP, vision_config=vision, projection_dim=16).to_dict()
    (clip / "config.json").write_text(json.dumps(settings))
    return {"name": "pickscore", "path": str(clip)}
