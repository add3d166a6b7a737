"""SDXL and a reward of the published sizes with random weights, made on the device: benchmarks without files. `size: tiny` is for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.backbones.sdxl import SDXL
from didr_core.config.registry import Component
from didr_core.diffusion.schedule import VariancePreserving
from didr_core.networks.loading import quiet
from didr_core.plan import full_size
from didr_core.types import Tensors

TINY_UNET = {
    **full_size.SDXL_UNET,
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
    **full_size.TAESDXL,
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * 4),
    **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,) * 4),
}
CLIP = {"full": (1280, 32, 16, 5120, 14, 224), "tiny": (16, 2, 2, 32, 8, 32)}  # ViT-H/14, as in HPSv2.1 and PickScore


class RandomSDXL(SDXL):
    """SDXL without files: published architecture, random weights made on the device."""

    class Config(Component):
        size: str = "full"
        resolution: int = 1024
        decoder: str = "tiny"
        timestep: int = 399
        unconditional: str = "zeros"
        generator: str = "random"  # it does not start as the reference

    def __init__(self, config: Config) -> None:
        self.config = config  # type: ignore[assignment]
        self.tiny = config.size == "tiny"
        self.network_config = dict(TINY_UNET if self.tiny else full_size.SDXL_UNET)
        self.vae_config = dict(
            TINY_VAE if self.tiny else full_size.TAESDXL if config.decoder == "tiny" else full_size.SDXL_VAE
        )
        self.pixels = config.resolution
        self.latent_shape = (4, config.resolution // 8, config.resolution // 8)
        self.schedule = VariancePreserving.scaled_linear()
        self._vae = self._text = None

    def load_network(self, role: str) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return _made(
            {"generator": 0, "assistant": 1, "reference": 1}[role], lambda: UNet2DConditionModel(**self.network_config)
        )

    def load_decoder(self) -> None:
        from diffusers import AutoencoderKL, AutoencoderTiny

        make = AutoencoderTiny if self.tiny or self.config.decoder == "tiny" else AutoencoderKL  # type: ignore[attr-defined]
        self._vae = _made(2, lambda: make(**self.vae_config)).requires_grad_(False)
        if make is AutoencoderKL:
            self._vae.enable_gradient_checkpointing()


class RandomClip:
    """A ViT of HPSv2.1's size with random weights: the cosine to a fixed direction."""

    differentiable = True

    class Config(Component):
        size: str = "full"

    def __init__(self, config: Config) -> None:
        self.size = config.size

    def load(self, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        width, layers, heads, inner, patch, self.side = CLIP[self.size]
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
        }
        made = CLIPVisionConfig(**sizes, patch_size=patch, image_size=self.side)
        self.model = _made(3, lambda: CLIPVisionModel(made)).to(device).requires_grad_(False)

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {}

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        pixels = nn.functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        return nn.functional.normalize(self.model(pixels).pooler_output, dim=-1)[:, 0]


def _made(seed: int, make: Callable[[], Any]) -> Any:
    quiet()
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return make().eval()
