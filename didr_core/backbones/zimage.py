"""Z-Image: a 6B transformer trained as a rectified flow, FLUX.1's autoencoder, Qwen3-4B as text encoder.

``x_s = (1 - s) x0 + s eps``. The network is told ``1 - s`` (0 is noise, 1 is clean) and answers ``o = x0 - eps``, the velocity
towards the picture, so ``x0 = x + s o``. One step from ``z ~ N(0, I)`` at ``s = 1`` is ``x0 = z + o(z)``; N steps are N Euler steps on
the scheduler's sigmas. Users sample with the stock pipeline, ``num_inference_steps=N, guidance_scale=0.0``.

Guidance here is ``D(null) + w (D(c) - D(null))``; the stock pipeline's ``guidance_scale=g`` is ``w = g + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from didr_core.backbones._pipeline import Dtype, Family, PipelineBackbone, PipelineConfig, dtype_of, read_json
from didr_core.config import locate
from didr_core.diffusion.schedule import RectifiedFlow, expand
from didr_core.networks.loading import class_of
from didr_core.types import Condition, DIDRError

ODD_SIGMAS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
)


class ZImage(PipelineBackbone):
    """The Z-Image family, whatever its size."""

    family = Family(
        pipeline="ZImagePipeline",
        network="ZImageTransformer2DModel",
        part="transformer",
        same=("in_channels", "cap_feat_dim", "all_patch_size", "all_f_patch_size"),
        marker="cap_embedder.1.weight",
        dtype=torch.bfloat16,  # float16 overflows
        original=".attention.qkv.weight",
    )
    usage = (
        'A stock diffusers pipeline: `pipe = ZImagePipeline.from_pretrained(folder).to("cuda", torch.bfloat16)`, then '
        "`pipe(prompt, num_inference_steps=N, guidance_scale=0.0)`, with N = backbone.steps of config.yaml (1 unless it says otherwise; "
        "diffusers before 0.39 leaves the last of several steps out: there N + 1). "
        "The single file holds the transformer alone, in diffusers' key names, bfloat16."
    )
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    patch = 2

    class Config(PipelineConfig):
        """`pipeline`: Z-Image. `generator`: Z-Image-Turbo, its transformer's folder, or one file of weights."""

        name: str = "zimage"
        steps: int = Field(1, ge=1, description="generation steps, as users will sample")
        gradient_steps: int = Field(
            1, ge=1, description="last generation steps that the gradient goes through (DRaFT-K)"
        )
        shift: float | None = Field(
            None,
            gt=0,
            description="of the generation steps; none = the scheduler beside the generator, else the pipeline's",
        )
        max_tokens: int = Field(512, ge=16, description="longest prompt, with the chat template; what is longer is cut")
        text_dtype: Dtype = Field("bfloat16", description="what the text encoder computes in")

        @model_validator(mode="after")
        def _consistent(self) -> ZImage.Config:
            if self.gradient_steps > self.steps:
                raise ValueError(
                    f"gradient_steps={self.gradient_steps}: there are only steps={self.steps} generation steps"
                )
            return self

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        tokens = self.latent_shape[1] * self.latent_shape[2] // self.patch**2
        self.schedule = RectifiedFlow(shift_of(self.scheduler_config, tokens, str(self.folder)))
        start = self._generator_scheduler()
        self.shift = config.shift or shift_of(start, tokens, config.generator or str(self.folder))
        longest = self.network_config["axes_lens"][0] - 2  # positions: one before the prompt, one for the picture
        if config.max_tokens > longest:
            raise DIDRError(
                f"backbone.max_tokens={config.max_tokens}: the transformer has positions for {longest} (its axes_lens)"
            )
        self._null: Tensor | None = None

    def _generator_scheduler(self) -> Mapping[str, Any]:
        """The scheduler of the pipeline that the generator is, or lies in; else the reference's."""
        if self.config.generator is not None:
            path = locate(self.config.generator)
            for folder in (path, path.parent):
                if (found := folder / "scheduler" / "scheduler_config.json").is_file():
                    return read_json(found)
        return self.scheduler_config

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts and, beside each, the empty prompt, so that no trainer needs the text encoder for guidance.

        ``prompt_embeds [B, max_tokens, D]`` zeros after ``length [B]`` int64 tokens; ``null_embeds [B, N, D]``; float32.
        """
        if self._text is None:
            raise DIDRError("backbone zimage: load_text() comes before encode()")
        if self._null is None:
            (self._null,) = self._embed([""])
        rows = self._embed(prompts)
        size = self.config.max_tokens
        return Condition(
            {
                "prompt_embeds": torch.stack([F.pad(row, (0, 0, 0, size - len(row))) for row in rows]),
                "length": torch.tensor([len(row) for row in rows]),
                "null_embeds": self._null.expand(len(rows), -1, -1),
            }
        )

    def blank(self, count: int) -> Condition:
        size, width = self.config.max_tokens, self.network_config["cap_feat_dim"]
        rows = torch.zeros(count, size, width)
        return Condition({"prompt_embeds": rows, "length": torch.full((count,), size), "null_embeds": rows[:, :16]})

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """``[L_i, D]`` each, float32: hidden states before the last layer, without padding."""
        embeds, _ = self._text.encode_prompt(  # it changes the list that it is given
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.config.max_tokens
        )
        return [row.float() for row in embeds]

    def null(self, like: Condition) -> Condition:
        """The encoded empty prompt (in its chat template), which every condition carries."""
        null, size = like.tensors["null_embeds"], like.tensors["prompt_embeds"].shape[1]
        return Condition(
            {
                "prompt_embeds": F.pad(null, (0, 0, 0, size - null.shape[1])),
                "length": torch.full_like(like.tensors["length"], null.shape[1]),
                "null_embeds": null,
            }
        )

    def tokenizers(self) -> dict[Path, int]:
        """See :class:`didr_core.types.Backbone`; eight tokens are the chat template's."""
        return dict.fromkeys(super().tokenizers(), self.config.max_tokens - 8)

    def _call(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """``o = x0 - eps [B, C, H, W]`` at ``sigma [B]``, float32 whatever the network computes in."""
        dtype = dtype_of(network)
        lengths = condition.tensors["length"].tolist()
        captions = [e[: int(n)] for e, n in zip(condition.tensors["prompt_embeds"].to(dtype), lengths, strict=True)]
        pictures = list(x.to(dtype).unsqueeze(2).unbind(0))
        out = network(pictures, 1 - sigma, captions, return_dict=False)[0]
        return torch.stack(list(out)).squeeze(2).float()

    def x0(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``x + s o``."""
        _, sigma = self.schedule.coeffs(t)
        return x.float() + expand(sigma, x) * self._call(network, x, sigma, condition)

    def sigmas(self) -> list[float]:
        """``steps + 1`` noise levels from 1 to 0: the stock pipeline's for ``num_inference_steps=steps``."""
        even = torch.linspace(1, 1 / self.config.steps, self.config.steps, dtype=torch.float64)
        return [*(self.shift * even / (1 + (self.shift - 1) * even)).tolist(), 0.0]

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        """``steps`` Euler steps from ``z`` at s = 1 to a clean latent; the gradient goes through the last ``gradient_steps``."""
        x, sigmas = z.float(), self.sigmas()
        for k, (now, then) in enumerate(pairwise(sigmas)):
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and k >= self.config.steps - self.config.gradient_steps
            ):
                level = torch.full((len(x),), now, device=x.device)
                x = x + (now - then) * self._call(network, x, level, condition)
        return x

    def export(self, generator: nn.Module, folder: str) -> None:
        """A ZImagePipeline folder with the generator and its scheduler, plus the bare single-file transformer, all bf16."""
        make = class_of("FlowMatchEulerDiscreteScheduler")
        scheduler = make.from_config(self.scheduler_config, shift=self.shift, use_dynamic_shifting=False)
        self._export(generator, folder, scheduler, f"didr_{self.config.steps}step_transformer_bf16.safetensors")


def shift_of(scheduler: Mapping[str, Any], tokens: int, where: str) -> float:
    """``shift`` of ``s = shift u / (1 + (shift - 1) u)`` that a FlowMatchEulerDiscreteScheduler's config means.

    Args:
        tokens: of a picture; dynamic shifting depends on it. where: for the error.

    Raises:
        DIDRError: a spacing of sigmas that is none of these.
    """
    odd = [k for k in ODD_SIGMAS if scheduler.get(k)]
    other = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    odd += [f"{k}={scheduler[k]}" for k, usual in other.items() if scheduler.get(k, usual) != usual]
    if odd:
        what = ", ".join(odd)
        raise DIDRError(
            f"backbone: the scheduler of {where!r} says {what}; expected a FlowMatchEulerDiscreteScheduler with a plain shift"
        )
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu
