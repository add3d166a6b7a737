"""The published architectures at full size, as plain data, and each network on the meta device: shapes and dtypes, no memory, no hub.

For memory plans, FLOP counts, layout tests and random-weight benchmarks. Backbones read the folder they are given and never this file.
``NETWORKS[family][part]`` makes a network; parts are named as the folders of the family's diffusers pipeline are.

Facts from the published ``config.json`` files of stabilityai/stable-diffusion-xl-base-1.0, madebyollin/taesdxl, Tongyi-MAI/Z-Image and
Z-Image-Turbo (which share all of these), madebyollin/taef1; held to the published parameter counts by tests/plan/test_full_size.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

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


def sdxl_unet() -> nn.Module:
    """``UNet2DConditionModel``: generator, teaching assistant or reference."""
    from diffusers import UNet2DConditionModel

    return _on_meta(lambda: UNet2DConditionModel(**SDXL_UNET))


def sdxl_vae() -> nn.Module:
    """``AutoencoderKL``, encoder and decoder."""
    return _autoencoder(SDXL_VAE)


def taesdxl() -> nn.Module:
    """``AutoencoderTiny``: the cheap decoder for rewards."""
    return _tiny_autoencoder(TAESDXL)


def sdxl_text() -> nn.Module:
    """``CLIPTextModel``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return _on_meta(lambda: CLIPTextModel(CLIPTextConfig(**SDXL_TEXT)))


def sdxl_text_2() -> nn.Module:
    """``CLIPTextModelWithProjection``."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return _on_meta(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_TEXT_2)))


def zimage_transformer() -> nn.Module:
    """``ZImageTransformer2DModel``: generator, teaching assistant or reference."""
    from diffusers import ZImageTransformer2DModel

    return _on_meta(lambda: ZImageTransformer2DModel(**ZIMAGE_TRANSFORMER))


def zimage_vae() -> nn.Module:
    """``AutoencoderKL`` with 16 channels, encoder and decoder."""
    return _autoencoder(ZIMAGE_VAE)


def taef1() -> nn.Module:
    """``AutoencoderTiny`` with 16 channels."""
    return _tiny_autoencoder(TAEF1)


def zimage_text() -> nn.Module:
    """``Qwen3Model``, without a language-model head."""
    from transformers import Qwen3Config, Qwen3Model

    return _on_meta(lambda: Qwen3Model(Qwen3Config(**ZIMAGE_TEXT)))


NETWORKS: Mapping[str, Mapping[str, Callable[[], nn.Module]]] = {
    "sdxl": {
        "unet": sdxl_unet,
        "vae": sdxl_vae,
        "decoder": taesdxl,
        "text_encoder": sdxl_text,
        "text_encoder_2": sdxl_text_2,
    },
    "zimage": {
        "transformer": zimage_transformer,
        "vae": zimage_vae,
        "decoder": taef1,
        "text_encoder": zimage_text,
    },
}


def parameters(network: nn.Module) -> int:
    """How many there are, shared ones counted once."""
    return sum(p.numel() for p in network.parameters())


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def _autoencoder(settings: Settings) -> nn.Module:
    from diffusers import AutoencoderKL

    return _on_meta(lambda: AutoencoderKL(**settings))


def _tiny_autoencoder(settings: Settings) -> nn.Module:
    from diffusers import AutoencoderTiny

    return _on_meta(lambda: AutoencoderTiny(**settings))
