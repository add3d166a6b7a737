"""The published architectures at full size, as the configs of pipeline folders without weights: no memory, no hub.

For memory plans, FLOP counts, layout tests and random-weight benchmarks. Backbones read the folder they are given and never this file.
``PARTS[family][part]`` is a class of diffusers or transformers and its settings; parts are named as the folders of the pipeline are.

Facts from the published ``config.json`` files of stabilityai/stable-diffusion-xl-base-1.0, madebyollin/taesdxl, Tongyi-MAI/Z-Image and
Z-Image-Turbo (which share all of these), madebyollin/taef1; held to the published parameter counts by tests/plan/test_published.py.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]

SDXL_UNET: Settings = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # the number of heads, by diffusers' old name
    "cross_attention_dim": 2048,  # 768 + 1280
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # 1280 + 6 * 256
}

_KL_VAE: Settings = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
}

SDXL_VAE: Settings = {**_KL_VAE, "latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}

ZIMAGE_VAE: Settings = {
    **_KL_VAE,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

TAESDXL: Settings = {"latent_channels": 4, "scaling_factor": 1.0}

TAEF1: Settings = {"latent_channels": 16, "scaling_factor": 1.0}
"""Z-Image decodes with FLUX.1's autoencoder, so FLUX.1's small one decodes its latents too."""

_CLIP_TEXT: Settings = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}

SDXL_TEXT: Settings = {  # CLIP ViT-L/14
    **_CLIP_TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}

SDXL_TEXT_2: Settings = {  # OpenCLIP ViT-bigG/14
    **_CLIP_TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

ZIMAGE_TRANSFORMER: Settings = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}

ZIMAGE_TEXT: Settings = {  # Qwen3-4B
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


SDXL_SCHEDULER: Settings = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}

ZIMAGE_SCHEDULER: Settings = {"shift": 6.0, "use_dynamic_shifting": False}

PARTS: Mapping[str, Mapping[str, tuple[str, Settings]]] = {
    "sdxl": {
        "unet": ("UNet2DConditionModel", SDXL_UNET),
        "vae": ("AutoencoderKL", SDXL_VAE),
        "decoder": ("AutoencoderTiny", TAESDXL),
        "text_encoder": ("CLIPTextModel", SDXL_TEXT),
        "text_encoder_2": ("CLIPTextModelWithProjection", SDXL_TEXT_2),
        "scheduler": ("EulerDiscreteScheduler", SDXL_SCHEDULER),
    },
    "zimage": {
        "transformer": ("ZImageTransformer2DModel", ZIMAGE_TRANSFORMER),
        "vae": ("AutoencoderKL", ZIMAGE_VAE),
        "decoder": ("AutoencoderTiny", TAEF1),
        "text_encoder": ("Qwen3Model", ZIMAGE_TEXT),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", ZIMAGE_SCHEDULER),
    },
}
"""`decoder` lies beside the pipeline, in no folder of it: a cheap decoder for rewards."""


def write(family: str, folder: Path, **parts: tuple[str, Settings]) -> Path:
    """Make ``folder`` a pipeline folder of ``family`` without weights, ``parts`` in place of the published ones; returns it."""
    made = {**PARTS[family], **parts}
    for part, (name, settings) in made.items():
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_complete(name, settings) | {"_class_name": name, "architectures": [name]}))
    (folder / "model_index.json").write_text(json.dumps({p: ["", name] for p, (name, _) in made.items()}))
    return folder


def _complete(name: str, settings: Settings) -> dict[str, Any]:
    """``settings`` with the class's own defaults for what they leave out."""
    import diffusers
    import transformers

    if hasattr(diffusers, name):
        signature = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        defaults = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}
        return {**defaults, **settings}
    return getattr(transformers, name).config_class(**settings).to_dict()
