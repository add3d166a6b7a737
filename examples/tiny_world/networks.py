"""The tiny world's networks: SDXL's own classes at toy size. Every function builds an untrained network from fixed sizes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

LATENT = 8
LATENT_CHANNELS = 4
IMAGE = 32
MAX_TOKENS = 20
FIRST_WIDTH, SECOND_WIDTH = 48, 80
TIME_IDS = (32, 32, 0, 0, 32, 32)
TRAIN_STEPS = 1000


def build_vae() -> AutoencoderTiny:
    """AutoencoderTiny, 32x32 pixels to 4x8x8 latents; pixels in [-1, 1] on both sides."""
    return AutoencoderTiny(
        in_channels=3,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    """The UNet of reference and generator: latents [B, 4, 8, 8], condition [B, tokens, 128], pooled [B, 80] and time ids [B, 6]."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3),
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=FIRST_WIDTH + SECOND_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=SECOND_WIDTH + 6 * 8,
    )


def text_config(tokenizer: Any, width: int, layers: int, heads: int) -> CLIPTextConfig:
    """A CLIP text tower's config; bos, eos and pad come from the tokenizer (wrong ones silently pool position 0)."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )


def build_text_encoders(tokenizer: Any) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair: hidden states of both (48 + 80 wide, before the last layer), pooled projection of the second (80)."""
    first = CLIPTextModel(text_config(tokenizer, FIRST_WIDTH, 2, 3))
    second = CLIPTextModelWithProjection(text_config(tokenizer, SECOND_WIDTH, 4, 4))
    return first, second


def build_scheduler() -> DDIMScheduler:
    """SDXL's schedule (scaled linear, epsilon, 1000 steps) sampled by DDIM."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def encode_text(
    first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, tokens] -> (hidden states [B, tokens, 128], pooled [B, 80]) exactly as StableDiffusionXLPipeline encodes."""
    one = first(ids, output_hidden_states=True)
    two = second(ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds
