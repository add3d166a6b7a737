"""Stable Diffusion XL: UNet, VAE, two text encoders, and the one-step convention of DMD2 and DIDR.

One step (math.md section 5): pure ``z ~ N(0, I)`` is fed AS ``x_399``, ``x0 = (z - sigma_399 eps) / alpha_399``, without guidance.
Users sample with ``LCMScheduler``, ``num_inference_steps=1, guidance_scale=0, timesteps=[399]``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from didr_core.config import Component, locate
from didr_core.contracts import Condition, DIDRError
from didr_core.images import clamp_straight_through
from didr_core.schedule import VariancePreserving
from didr_core.weights import check_folder, quiet

UNET_FILE = "diffusion_pytorch_model.safetensors"


class SDXL:
    """The SDXL family, whatever its size: shapes are read from the folder's configs."""

    class Config(Component):
        """`pipeline`: a StableDiffusionXLPipeline folder, the reference. `generator`: a UNet folder, or one file of its weights."""

        name: str = "sdxl"
        pipeline: str
        generator: str | None = None
        timestep: int = 399
        unconditional: Literal["zeros", "empty"] = "zeros"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = locate(config.pipeline)
        self.check()
        unet = json.loads((self.folder / "unet" / "config.json").read_text())
        scheduler = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        self.vae_config = json.loads((self.folder / "vae" / "config.json").read_text())
        self.schedule = VariancePreserving.scaled_linear(
            scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]
        )
        size = unet["sample_size"]
        self.latent_shape = (unet["in_channels"], size, size)
        stages = len(self.vae_config.get("block_out_channels") or self.vae_config["decoder_block_out_channels"])
        self.pixels = size * 2 ** (stages - 1)
        self._text: Any = None
        self._vae: Any = None
        self._empty: Condition | None = None

    def check(self) -> None:
        """Raises DIDRError unless the folders hold what the config says."""
        check_folder(
            "backbone.pipeline", self.folder, "model_index.json", "_class_name", ("StableDiffusionXLPipeline",)
        )
        check_folder("backbone.pipeline", self.folder / "unet", "config.json", "_class_name", ("UNet2DConditionModel",))
        check_folder(
            "backbone.pipeline", self.folder / "vae", "config.json", "_class_name", ("AutoencoderKL", "AutoencoderTiny")
        )
        if self.config.generator is None:
            return
        path = locate(self.config.generator)
        if path.is_dir():
            found = check_folder("backbone.generator", path, "config.json", "_class_name", ("UNet2DConditionModel",))
            reference = json.loads((self.folder / "unet" / "config.json").read_text())
            for key in (
                "in_channels",
                "cross_attention_dim",
                "addition_embed_type",
                "projection_class_embeddings_input_dim",
            ):
                if found.get(key) != reference.get(key):
                    raise DIDRError(
                        f"backbone.generator={str(path)!r}: {key}={found.get(key)!r} differs from the pipeline's {reference.get(key)!r}; "
                        "generator and reference must be of one family"
                    )
        elif not path.is_file():
            raise DIDRError(
                f"backbone.generator={str(path)!r}: no such file or folder. Expected a UNet folder or one .safetensors/.bin file."
            )

    def load_network(self, role: str) -> nn.Module:
        """The UNet of ``role``, float32, channels_last, eval. The TA starts as the reference, as DMD2's fake UNet does.

        Raises:
            DIDRError: a single file whose keys are not this UNet's.
        """
        from diffusers import UNet2DConditionModel

        quiet()
        if role == "generator" and self.config.generator is not None:
            path = locate(self.config.generator)
            unet = (
                self._from_file(path)
                if path.is_file()
                else UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32)
            )
        else:
            unet = UNet2DConditionModel.from_pretrained(self.folder, subfolder="unet", torch_dtype=torch.float32)
        return unet.to(memory_format=torch.channels_last).eval()  # type: ignore[no-any-return]

    def _from_file(self, path: Path) -> Any:
        from diffusers import UNet2DConditionModel
        from safetensors.torch import load_file

        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(self.folder, subfolder="unet"))
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        missing, unexpected = unet.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        if missing or unexpected:
            raise DIDRError(
                f"backbone.generator={str(path)!r}: {len(missing)} keys missing (e.g. {missing[:1]}), {len(unexpected)} unexpected "
                f"(e.g. {unexpected[:1]}); expected the diffusers layout of the pipeline's UNet"
            )
        return unet

    def load_decoder(self) -> None:
        """Load the VAE, frozen."""
        import diffusers

        quiet()
        cls = getattr(diffusers, self.vae_config["_class_name"])
        vae = cls.from_pretrained(self.folder, subfolder="vae", torch_dtype=torch.float32)
        self._vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def load_text(self) -> None:
        """Load tokenizers and text encoders."""
        from diffusers import StableDiffusionXLPipeline

        quiet()
        self._text = StableDiffusionXLPipeline.from_pretrained(self.folder, unet=None, vae=None)
        self._text.set_progress_bar_config(disable=True)

    def to(self, device: torch.device | str) -> SDXL:
        """Move what is loaded."""
        if self._vae is not None:
            self._vae.to(device)
        if self._text is not None:
            self._text.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> Condition:
        """``prompt_embeds [B, L, D]`` and ``pooled [B, P]``, float32."""
        if self._text is None:
            raise DIDRError("backbone sdxl: load_text() comes before encode()")
        with torch.no_grad():
            embeds, _, pooled, _ = self._text.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return Condition({"prompt_embeds": embeds.float(), "pooled": pooled.float()})

    def null(self, like: Condition) -> Condition:
        """Zeros (the SDXL pipeline's default), or the encoded empty prompt."""
        if self.config.unconditional == "zeros":
            return like.map(torch.zeros_like)
        if self._empty is None:
            loaded = self._text
            if loaded is None:
                self.load_text()
            self._empty = self.encode([""])
            self._text = loaded  # a trainer that had no text towers does not keep them
        first = next(iter(like.tensors.values()))
        return self._empty.to(first.device).tile(len(like))

    def _call(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        size = float(self.pixels)
        ids = torch.tensor([size, size, 0.0, 0.0, size, size], device=x.device).expand(len(x), 6)
        added = {"text_embeds": condition.tensors["pooled"], "time_ids": ids}
        out = network(
            x,
            time,
            encoder_hidden_states=condition.tensors["prompt_embeds"],
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
        return (x - sigma * self._call(network, x, index, condition)) / alpha

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        """One step from unit noise, told ``timestep`` (399)."""
        index = torch.full((len(z),), self.config.timestep, device=z.device)
        alpha, sigma = self._coeffs(index, z)
        return (z - sigma * self._call(network, z, index, condition)) / alpha

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1]; the clamp is straight-through."""
        if self._vae is None:
            raise DIDRError("backbone sdxl: load_decoder() comes before decode()")
        latent = latent / self.vae_config["scaling_factor"] + (self.vae_config.get("shift_factor") or 0.0)
        return clamp_straight_through(self._vae.decode(latent, return_dict=False)[0].float() / 2 + 0.5)

    def export(self, generator: nn.Module, folder: str) -> None:
        """A StableDiffusionXLPipeline folder with the generator and an LCMScheduler, plus the bare single-file UNet, all fp16."""
        from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from safetensors.torch import save_file

        quiet()
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(self.folder, subfolder="unet"))
        unet.load_state_dict({k: v.detach().cpu().float() for k, v in generator.state_dict().items()})
        pipe = StableDiffusionXLPipeline.from_pretrained(self.folder, unet=unet)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.to(torch.float16).save_pretrained(folder)
        state = {k: v.half().contiguous() for k, v in generator.state_dict().items()}
        save_file({k: v.cpu() for k, v in state.items()}, Path(folder) / "didr_1step_unet_fp16.safetensors")
