"""Stable Diffusion XL: UNet, VAE, two text encoders, and the one-step convention of DMD2 and DIDR.

One step (math.md section 5): pure ``z ~ N(0, I)`` is fed AS ``x_399``, ``x0 = (z - sigma_399 eps) / alpha_399``, without guidance.
Users sample with ``LCMScheduler``, ``num_inference_steps=1, guidance_scale=0, timesteps=[399]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from didr_core.backbones._pipeline import Family, PipelineBackbone, PipelineConfig, dtype_of, read_json
from didr_core.diffusion.noise import constant
from didr_core.diffusion.schedule import VariancePreserving, expand
from didr_core.networks.loading import class_of
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
        original="input_blocks.",
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
        unconditional: Literal["zeros", "empty"] | None = Field(
            None,
            description="the unconditional embedding: zeros, or the encoded empty prompt; none = as model_index.json says",
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.schedule = schedule_of(self.scheduler_config, str(self.folder))
        if config.timestep >= len(self.schedule.alphas_cumprod):
            raise DIDRError(
                f"backbone.timestep={config.timestep}: the scheduler has {len(self.schedule.alphas_cumprod)} (num_train_timesteps)"
            )
        index = read_json(self.folder / "model_index.json")
        self.unconditional = config.unconditional or (
            "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty"
        )
        self._empty_prompt: Condition | None = None

    def check(self) -> None:
        """See :meth:`PipelineBackbone.check`; prompts are padded to what both text encoders take."""
        super().check()
        for folder, tokens in self.tokenizers().items():
            text = read_json(self.folder / folder.name.replace("tokenizer", "text_encoder") / "config.json")
            if tokens > (most := text.get("max_position_embeddings", 77)):
                raise DIDRError(
                    f"backbone.pipeline={str(self.folder)!r}: {folder.name}/tokenizer_config.json says model_max_length={tokens}, its text "
                    f"encoder takes {most}. Expected the tokenizer that was saved with it."
                )

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
        net = self.network_config
        pooled = net["projection_class_embeddings_input_dim"] - 6 * net["addition_time_embed_dim"]
        embeds = torch.zeros(count, 77, net["cross_attention_dim"])
        return Condition({"prompt_embeds": embeds, "pooled": torch.zeros(count, pooled)})

    def null(self, like: Condition) -> Condition:
        """Zeros, or the encoded empty prompt, see :class:`Config`."""
        if self.unconditional == "zeros":
            return like.map(torch.zeros_like)
        if self._empty_prompt is None:
            loaded = self._text
            if loaded is None:
                self.load_text()
            self._empty_prompt = self.encode([""])
            self._text = loaded  # a trainer that had no text towers does not keep them
        first = next(iter(like.tensors.values()))
        return self._empty_prompt.to(first.device).tile(len(like))

    def _unscaled(self, latent: Tensor, vae: Any) -> Tensor:
        if vae.get("latents_mean") is None or vae.get("latents_std") is None:
            return latent / vae.scaling_factor
        keys = ("latents_mean", "latents_std")
        mean, std = (constant(tuple(vae[key]), latent.device, latent.dtype).view(1, -1, 1, 1) for key in keys)
        return latent * std / vae.scaling_factor + mean

    def _call(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """``eps``, float32 whatever the network computes in."""
        dtype, size = dtype_of(network), float(self.pixels)
        ids = constant((size, size, 0.0, 0.0, size, size), x.device, dtype).expand(len(x), 6)
        added = {"text_embeds": condition.tensors["pooled"].to(dtype), "time_ids": ids}
        out = network(
            x.to(dtype),
            time,
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out.float()  # type: ignore[no-any-return]

    def _x0(self, network: nn.Module, x: Tensor, index: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = (expand(values, x) for values in self.schedule.at(index))
        return (x.float() - sigma * self._call(network, x, index, condition)) / alpha

    def x0(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``(x - sigma eps) / alpha``."""
        return self._x0(network, x, self.schedule.index(t), condition)

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        """One step from unit noise, told ``timestep`` (399)."""
        return self._x0(network, z, torch.full((len(z),), self.config.timestep, device=z.device), condition)

    def export(self, generator: nn.Module, folder: str) -> None:
        """A StableDiffusionXLPipeline folder with the generator and an LCMScheduler, plus the bare single-file UNet, all fp16."""
        make, levels = class_of("LCMScheduler"), self.schedule.alphas_cumprod
        plain = {"clip_sample": False, "thresholding": False}
        scheduler = make.from_config(self.scheduler_config, **plain)
        difference = (scheduler.alphas_cumprod / levels - 1).abs().max()
        if difference > 1e-3:  # what the file leaves to its class, or that Euler's does otherwise
            betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
            own = {"rescale_betas_zero_snr": False, "trained_betas": betas.tolist()}
            scheduler = make.from_config(self.scheduler_config, **plain, **own)
        self._export(generator, folder, scheduler, "didr_1step_unet_fp16.safetensors")


def schedule_of(scheduler: Mapping[str, Any], where: str) -> VariancePreserving:
    """The noise levels that diffusers makes of a scheduler's configuration.

    Raises:
        DIDRError: a class without alphas_cumprod (EDM, flow matching), another prediction than epsilon, one that clips x0, or levels of
            which x0 cannot be had.
    """
    said = f"backbone.pipeline={where!r}: its scheduler ({scheduler.get('_class_name')})"
    plain = "Expected that of SDXL base: epsilon, scaled_linear betas, nothing clipped."
    usual = scheduler.get("beta_schedule") == "scaled_linear" and not scheduler.get("trained_betas")
    euler = str(scheduler.get("_class_name")).startswith("Euler") or scheduler.get("clip_sample") is False
    if usual and euler and not scheduler.get("rescale_betas_zero_snr"):
        made, settings = None, scheduler
    else:  # what the file leaves to its class
        made, settings = _stock(scheduler, said, plain)
    flow = any(scheduler.get(key) for key in ("use_flow_sigmas", "thresholding"))
    if settings.get("prediction_type", "epsilon") != "epsilon" or settings.get("clip_sample") or flow:
        names = ("prediction_type", "clip_sample", "use_flow_sigmas", "thresholding")
        raise DIDRError(f"{said} says {', '.join(f'{k}={settings[k]!r}' for k in names if settings.get(k))}. {plain}")
    if made is None:
        keys = ("beta_start", "beta_end", "num_train_timesteps")
        return VariancePreserving.scaled_linear(*(scheduler[key] for key in keys))
    if not made.alphas_cumprod.min() > 0:
        raise DIDRError(f"{said} ends in pure noise (rescale_betas_zero_snr), of which epsilon tells nothing. {plain}")
    return VariancePreserving(made.alphas_cumprod)


def _stock(scheduler: Mapping[str, Any], said: str, plain: str) -> tuple[Any, Mapping[str, Any]]:
    """The scheduler as diffusers makes it, and its settings."""
    import diffusers

    make = getattr(diffusers, str(scheduler.get("_class_name")), None)
    try:
        made = make.from_config(dict(scheduler)) if make else None
    except Exception as error:  # whatever a setting leads it to
        raise DIDRError(f"{said} cannot be made by diffusers ({error}). {plain}") from error
    if not isinstance(getattr(made, "alphas_cumprod", None), Tensor):
        raise DIDRError(f"{said} has no table of noise levels (alphas_cumprod). {plain}")
    return made, made.config  # type: ignore[union-attr]
