"""Random models of the real classes at toy size, built offline: what the tests train, export and load."""

from __future__ import annotations

from pathlib import Path

import torch

from didr_core.world.random_models import byte_tokenizer, clip_text_config


def sdxl_folder(folder: Path, seed: int = 0, sample_size: int = 8) -> Path:
    """A StableDiffusionXLPipeline folder: 0.2M-parameter UNet, AutoencoderTiny, two CLIP text encoders; pictures of 8 x sample_size / 2."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(byte_tokenizer(folder / "_tokenizer"))
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        cross_attention_dim=32,
    )
    channels = (8, 8, 8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_text_config(tokenizer, 16, 16)),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(tokenizer, 16, 16)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def clip_folder(folder: Path, seed: int = 1, size: int = 32) -> Path:
    """A CLIPModel folder with its tokenizer: PickScore's class."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(byte_tokenizer(folder))
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=8,
        projection_dim=16,
    )
    text = clip_text_config(tokenizer, 16, 16)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(folder)
    return folder


def prompt_shards(folder: Path, shards: int = 2, rows: int = 40, what: str = "picture") -> Path:
    """Parquet shards with ids and short prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        names = [f"{s}-{r}" for r in range(rows)]
        table = pa.table({"id": names, "prompt": [f"a {what} of {n}" for n in names]})
        pq.write_table(table, folder / f"shard-{s:03d}.parquet")
    return folder
