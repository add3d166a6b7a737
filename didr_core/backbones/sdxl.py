"""Stable Diffusion XL: UNet, VAE, two text encoders, and the one-step convention of DMD2 and DIDR.

One step (math.md section 5): pure ``z ~ N(0, I)`` is fed AS ``x_399``, ``x0 = (z - sigma_399 eps) / alpha_399``, without guidance.
Users sample with ``LCMScheduler``, ``num_inference_steps=1, guidance_scale=0, timesteps=[399]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from didr_core.backbones._pipeline import Family, PipelineBackbone, PipelineConfig, dtype_of
from didr_core.diffusion.schedule import VariancePreserving
from didr_core.networks.loading import of_diffusers
from didr_core.types import Condition, DIDRError


class SDXL(PipelineBackbone):
    """The SDXL family, whatever its size: shapes are read from the folder's configs."""

    family = Family(
        pipeline="StableDiffusionXLPipeline",
        network="UNet2DConditionModel",
        part="unet",
        same=("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim"),
        marker="time_embedding.linear_1.weight",
        dtype=torch.float16,
    )
    lora_targets = (  # those of DMD2's and DMDR's SDXL recipes
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    schedule: VariancePreserving

    class Config(PipelineConfig):
        """`pipeline`: SDXL base. `generator`: DMD2's one-step UNet, or an official DIDR file."""

        name: str = "sdxl"
        timestep: int = Field(399, ge=0, description="what the generator is told its noise is")
        unconditional: Literal["zeros", "empty"] = Field(
            "zeros",
            description="the unconditional embedding: zeros (the SDXL pipeline's default), or the encoded empty prompt",
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        scheduler = self.scheduler_config
        for key, expected in (("beta_schedule", "scaled_linear"), ("prediction_type", "epsilon")):
            if scheduler.get(key, expected) != expected:
                raise DIDRError(
                    f"backbone.pipeline={str(self.folder)!r}: its scheduler says {key}={scheduler[key]!r}; SDXL here means {expected!r}"
                )
        self.schedule = VariancePreserving.scaled_linear(
            scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]
        )
        self._empty_prompt: Condition | None = None

    def load_network(self, role: str) -> nn.Module:
        """See :meth:`PipelineBackbone.load_network`; channels_last."""
        return super().load_network(role).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds [B, L, D]`` and ``pooled [B, P]``, float32."""
        if self._text is None:
            raise DIDRError("backbone sdxl: load_text() comes before encode()")
        with torch.no_grad():
            embeds, _, pooled, _ = self._text.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return Condition({"prompt_embeds": embeds.float(), "pooled": pooled.float()})

    def blank(self, count: int) -> Condition:
        """See :meth:`PipelineBackbone.blank`."""
        net = self.network_config
        pooled = net["projection_class_embeddings_input_dim"] - 6 * net["addition_time_embed_dim"]
        embeds = torch.zeros(count, 77, net["cross_attention_dim"])
        return Condition({"prompt_embeds": embeds, "pooled": torch.zeros(count, pooled)})

    def null(self, like: Condition) -> Condition:
        """Zeros (the SDXL pipeline's default), or the encoded empty prompt."""
        if self.config.unconditional == "zeros":
            return like.map(torch.zeros_like)
        if self._empty_prompt is None:
            loaded = self._text
            if loaded is None:
                self.load_text()
            self._empty_prompt = self.encode([""])
            self._text = loaded  # a trainer that had no text towers does not keep them
        first = next(iter(like.tensors.values()))
        return self._empty_prompt.to(first.device).tile(len(like))

    def _call(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """``eps``, float32 whatever the network computes in."""
        dtype, size = dtype_of(network), float(self.pixels)
        ids = torch.tensor([size, size, 0.0, 0.0, size, size], device=x.device, dtype=dtype).expand(len(x), 6)
        added = {"text_embeds": condition.tensors["pooled"].to(dtype), "time_ids": ids}
        out = network(
            x.to(dtype),
            time,
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out.float()  # type: ignore[no-any-return]

    def _coeffs(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.schedule.alphas_cumprod.to(like.device)[index].view(-1, *([1] * (like.dim() - 1)))
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def x0(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``(x - sigma eps) / alpha``."""
        index = self.schedule.index(t)
        alpha, sigma = self._coeffs(index, x)
        return (x.float() - sigma * self._call(network, x, index, condition)) / alpha

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        """One step from unit noise, told ``timestep`` (399)."""
        index = torch.full((len(z),), self.config.timestep, device=z.device)
        alpha, sigma = self._coeffs(index, z)
        return (z.float() - sigma * self._call(network, z, index, condition)) / alpha

    def export(self, generator: nn.Module, folder: str) -> None:
        """A StableDiffusionXLPipeline folder with the generator and an LCMScheduler, plus the bare single-file UNet, all fp16."""
        scheduler = of_diffusers("LCMScheduler").from_config(self.scheduler_config)
        self._export(generator, folder, scheduler, "didr_1step_unet_fp16.safetensors")
