"""Networks of a config on the meta device, and calls of them: from the folders that it names, or the published sizes where there are none.

What :mod:`didr_core.plan.memory` plans with, so that a plan needs neither weights nor a GPU.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from didr_core.config.registry import Component, locate
from didr_core.networks.loading import quiet
from didr_core.plan.footprint import NOTHING, Cost, measure
from didr_core.plan.full_size import NETWORKS

CLIP_H = ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024)
CLIP_L = ((1024, 24, 16, 4096), (768, 12, 12, 3072), 768)
REWARDS = {"hpsv2": CLIP_H, "pickscore": CLIP_H, "clip_score": CLIP_L, "aesthetic": CLIP_L, "image_reward": CLIP_L}
"""Vision and text tower (width, layers, heads, inner width) and projection. ImageReward's BLIP is a ViT-L/16 and a 12-layer text tower
with cross-attention: CLIP ViT-L/14 stands in for it (427M parameters for 447M)."""


@dataclass(frozen=True)
class Family:
    """Where the networks of a backbone's config are described."""

    name: str
    part: str  # "unet", "transformer"
    folder: str  # of the pipeline; "" = the published sizes
    decoder: str  # VAE folder; "" = the published one; "tiny" = the published AutoencoderTiny
    decode_dtype: str
    decode_gradient_checkpointing: bool
    side: int  # latent pixels
    tokens: int  # of the longest prompt


def family(config: Component) -> Family | None:
    """None for families that are not in :data:`NETWORKS`: there is nothing to count on the meta device."""
    if config.name not in NETWORKS:
        return None
    quiet()
    part = next(p for p in ("unet", "transformer") if p in NETWORKS[config.name])
    folder = locate(config.pipeline)  # type: ignore[attr-defined]
    local = str(folder) if (folder / part / "config.json").is_file() else ""
    named = getattr(config, "decoder", None) or getattr(config, "vae", None) or (f"{local}/vae" if local else "")
    present = bool(named) and (locate(named) / "config.json").is_file()
    decoder = str(locate(named)) if present else ("tiny" if getattr(config, "decoder", None) else "")
    vae = _vae(config.name, decoder)
    factor = 2 ** (len(vae.config.get("block_out_channels") or vae.config["decoder_block_out_channels"]) - 1)
    size = _network(config.name, part, local).config.get("sample_size")
    pixels = getattr(config, "resolution", None) or (size * factor if size else 1024)
    return Family(
        name=config.name,
        part=part,
        folder=local,
        decoder=decoder,
        decode_dtype=getattr(config, "decode_dtype", "float32"),
        decode_gradient_checkpointing=getattr(config, "decode_gradient_checkpointing", False),
        side=pixels // factor,
        tokens=getattr(config, "max_tokens", 77),
    )


def network(of: Family) -> nn.Module:
    """Generator, TA or reference, on the meta device."""
    return _network(of.name, of.part, of.folder)


@functools.lru_cache(maxsize=8)
def _network(name: str, part: str, folder: str) -> Any:
    return _from_config(Path(folder) / part) if folder else NETWORKS[name][part]()


@functools.lru_cache(maxsize=8)
def _vae(name: str, decoder: str) -> Any:
    if decoder in ("", "tiny"):
        return NETWORKS[name]["decoder" if decoder else "vae"]()
    return _from_config(Path(decoder))


def _from_config(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config).eval()


def text_parameters(of: Family) -> int:
    """Of all text encoders."""
    encoders = (make for part, make in NETWORKS[of.name].items() if part.startswith("text_encoder"))
    return 0 if of.folder else sum(p.numel() for make in encoders for p in make().parameters())


@functools.lru_cache(maxsize=64)
def network_cost(of: Family, dtype: str, weights: bool | None, checkpointing: bool) -> Cost:
    """One sample through the network; arguments as :func:`didr_core.plan.footprint.measure`."""
    net = network(of).to(getattr(torch, dtype))
    args, kwargs = _CALLS[type(net).__name__](net.config, of, {"device": "meta", "dtype": getattr(torch, dtype)})
    return measure(net, args, kwargs, weights=weights, checkpointing=checkpointing)


def _unet(config: Any, of: Family, kind: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.empty(1, pooled, **kind), "time_ids": torch.empty(1, 6, device="meta")}
    condition = torch.empty(1, of.tokens, config["cross_attention_dim"], **kind)
    time = torch.empty(1, device="meta", dtype=torch.long)
    latent = torch.empty(1, config["in_channels"], of.side, of.side, **kind)
    return (latent, time), {"encoder_hidden_states": condition, "added_cond_kwargs": added, "return_dict": False}


def _zimage(config: Any, of: Family, kind: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    latent = torch.empty(config["in_channels"], 1, of.side, of.side, **kind)
    caption = torch.empty(of.tokens, config["cap_feat_dim"], **kind)
    return ([latent], torch.empty(1, device="meta"), [caption]), {"return_dict": False}


_CALLS = {"UNet2DConditionModel": _unet, "ZImageTransformer2DModel": _zimage}


class _Decode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        if type(vae).__name__ == "AutoencoderKL":  # AutoencoderTiny's checkpointing is not used
            self.enable_gradient_checkpointing = vae.enable_gradient_checkpointing
            self.disable_gradient_checkpointing = vae.disable_gradient_checkpointing

    def forward(self, latent: torch.Tensor) -> Any:
        return self.vae.decode(latent, return_dict=False)


@functools.lru_cache(maxsize=16)
def decoder_cost(of: Family, gradient: bool) -> Cost:
    """One picture, with or without the gradient to its latent."""
    dtype = getattr(torch, of.decode_dtype)
    vae = _vae(of.name, of.decoder).to(dtype)
    latent = torch.empty(1, vae.config["latent_channels"], of.side, of.side, device="meta", dtype=dtype)
    mode = False if gradient else None
    return measure(_Decode(vae), (latent,), {}, weights=mode, checkpointing=of.decode_gradient_checkpointing)


def decoder_parameters(of: Family) -> int:
    """Encoder and decoder: both are loaded."""
    return sum(p.numel() for p in _vae(of.name, of.decoder).parameters())


def rewards(config: Component | None) -> tuple[int, Cost, Cost, list[str]]:
    """Parameters, cost of one picture with gradient and without, and the names of rewards that are not known here (not counted)."""
    if config is None:
        return 0, NOTHING, NOTHING, []
    parts = [part.reward for part in getattr(config, "parts", ())] or [config]
    total, gradient, plain, unknown = 0, NOTHING, NOTHING, []
    for part in parts:
        folder = getattr(part, "clip", None) or getattr(part, "path", None)
        own = locate(folder) / "config.json" if folder else None
        if own and own.is_file() and json.loads(own.read_text()).get("model_type") == "clip":
            count, with_gradient, without = _clip(str(own.parent))
        elif part.name in REWARDS:
            count, with_gradient, without = _clip(part.name)
        else:
            unknown.append(part.name)
            continue
        total, gradient, plain = total + count, gradient.plus(with_gradient), plain.plus(without)
    return total, gradient, plain, unknown


@functools.lru_cache(maxsize=8)
def _clip(which: str) -> tuple[int, Cost, Cost]:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    def tower(make: Any, sizes: tuple[int, int, int, int], **more: Any) -> Any:
        width, layers, heads, inner = sizes
        options = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        return make(**options, intermediate_size=inner, **more).to_dict()

    if which in REWARDS:
        vision, text, projection = REWARDS[which]
        settings = CLIPConfig(
            text_config=tower(CLIPTextConfig, text),
            vision_config=tower(CLIPVisionConfig, vision, patch_size=14, image_size=224),
            projection_dim=projection,
        )
    else:
        settings = CLIPConfig.from_pretrained(which)
    with torch.device("meta"):
        model = CLIPModel(settings).eval()
    side = settings.vision_config.image_size
    picture = torch.empty(1, 3, side, side, device="meta")
    costs = [measure(model.vision_model, (picture,), {}, weights=w) for w in (False, None)]
    return sum(p.numel() for p in model.parameters()), costs[0], costs[1]
