"""The published ImageReward.pt into transformers' BLIP classes: names, shapes, conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from didr_core.networks.loading import Shapes, State, assemble, check_layout, count_layers, marker_shapes
from didr_core.rewards._head import linear_layers
from didr_core.types import DIDRError

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
WHAT = "ImageReward.pt as published (blip.visual_encoder, blip.text_encoder, mlp)"
HEAD_WIDTH = 64
"""Of both towers' attention: a state dict does not say it."""
TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def check(file: Path, state: State) -> None:
    """Raises DIDRError unless ``state`` is the published layout, whole."""
    part = {k: v for k, v in state.items() if k.startswith((VISION, TEXT)) and not k.endswith("position_ids")}
    check_layout("reward.path", file, part, layout(state, file), WHAT)
    width = linear_layers("reward.path", file, state, "mlp.layers.")[0][1][1]
    text = state[f"{TEXT}embeddings.word_embeddings.weight"].shape[1]
    if width != text:
        raise DIDRError(
            f"reward.path={str(file)!r}: the head takes {width} numbers, the text tower gives {text}. Expected {WHAT}."
        )


def layout(state: State, file: Path) -> Shapes:
    """Names and shapes of both towers with the sizes that ``state`` shows."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    conv, places, vision_fc = marker_shapes("reward.path", file, state, [VISION + n for n in names], WHAT)
    names = (
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.0.intermediate.dense.weight",
    )
    words, positions, text_fc = marker_shapes("reward.path", file, state, [TEXT + n for n in names], WHAT)
    v, t = conv[0], words[1]
    for width in (v, t):
        if width % HEAD_WIDTH:
            raise DIDRError(
                f"reward.path={str(file)!r}: width {width} is no multiple of {HEAD_WIDTH}, BLIP's head width. Expected {WHAT}."
            )
    vision: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, v),
        "pos_embed": (1, round((places[1] - 1) ** 0.5) ** 2 + 1, v),
        "patch_embed.proj.weight": (v, 3, conv[-1], conv[-1]),
        "patch_embed.proj.bias": (v,),
        **_norm("norm", v),
    }
    for n in range(count_layers(state, f"{VISION}blocks.")):
        at = f"blocks.{n}."
        vision |= _norm(f"{at}norm1", v) | _norm(f"{at}norm2", v)
        vision |= _linear(f"{at}attn.qkv", 3 * v, v) | _linear(f"{at}attn.proj", v, v)
        vision |= _linear(f"{at}mlp.fc1", vision_fc[0], v) | _linear(f"{at}mlp.fc2", v, vision_fc[0])
    text: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": (positions[0], t),
        **_norm("embeddings.LayerNorm", t),
    }
    for n in range(count_layers(state, f"{TEXT}encoder.layer.")):
        at = f"encoder.layer.{n}."
        for kind, source in (("attention", t), ("crossattention", v)):
            text |= _linear(f"{at}{kind}.self.query", t, t)
            text |= _linear(f"{at}{kind}.self.key", t, source) | _linear(f"{at}{kind}.self.value", t, source)
            text |= _linear(f"{at}{kind}.output.dense", t, t) | _norm(f"{at}{kind}.output.LayerNorm", t)
        text |= _linear(f"{at}intermediate.dense", text_fc[0], t) | _linear(f"{at}output.dense", t, text_fc[0])
        text |= _norm(f"{at}output.LayerNorm", t)
    return {VISION + k: s for k, s in vision.items()} | {TEXT + k: s for k, s in text.items()}


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def to_transformers(state: State) -> tuple[State, State]:
    """Published names to those of ``BlipVisionModel`` and ``BlipTextModel``; everything else is left out."""
    vision: State = {}
    for name, value in state.items():
        if not name.startswith(VISION):
            continue
        name = name.removeprefix(VISION)
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            module, _, kind = rest.rpartition(".")
            vision[f"encoder.layers.{number}.{BLOCK[module]}.{kind}"] = value
        else:
            vision[TOP[name]] = value
    text = {k.removeprefix(TEXT): v for k, v in state.items() if k.startswith(TEXT) and not k.endswith("position_ids")}
    return vision, text


def configs(state: State) -> tuple[Any, Any]:
    """``BlipVisionConfig`` and ``BlipTextConfig`` of a published state dict."""
    from transformers import BlipVisionConfig
    from transformers.models.blip.configuration_blip import BlipTextConfig

    conv, places = state[f"{VISION}patch_embed.proj.weight"], state[f"{VISION}pos_embed"]
    words = state[f"{TEXT}embeddings.word_embeddings.weight"]
    width, text = conv.shape[0], words.shape[1]
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{VISION}blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=count_layers(state, f"{VISION}blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=conv.shape[-1],
        image_size=round((places.shape[1] - 1) ** 0.5) * conv.shape[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's, not transformers' default
    )
    text_config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=text,
        encoder_hidden_size=width,
        intermediate_size=len(state[f"{TEXT}encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=count_layers(state, f"{TEXT}encoder.layer."),
        num_attention_heads=text // HEAD_WIDTH,
        max_position_embeddings=len(state[f"{TEXT}embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # makes the cross-attention; the forward pass stays bidirectional
    )
    return vision_config, text_config


def convert(state: State) -> tuple[Any, Any]:
    """``BlipVisionModel`` and ``BlipTextModel`` that compute what upstream computes with ``state``; float32, frozen, eval mode."""
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision_config, text_config = configs(state)
    vision, text = to_transformers(state)
    return (
        assemble(lambda: BlipVisionModel(vision_config), vision),
        assemble(lambda: BlipTextModel(text_config, add_pooling_layer=False), text),
    )
