"""HPSv2 and HPSv2.1 (arXiv 2306.09341): ``100 cos(image, text)`` of open_clip's ViT-H-14, fine-tuned on choices between pictures.

Published weights: ``HPS_v2_compressed.pt`` and ``HPS_v2.1_compressed.pt`` of ``xswu/HPSv2``, in open_clip's layout, which is read into
transformers' ``CLIPModel`` here. Upstream's ``score`` returns the cosine; its benchmark and the tables of papers print it times 100, which
is what this reward returns. Upstream resizes the longest edge, pads with black, and mends prompts before it reads them.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ftfy
import torch
from torch import Tensor

from didr_core.config import Component, locate
from didr_core.networks.loading import (
    State,
    assemble,
    check_layout,
    count_layers,
    find_file,
    marker_shapes,
    read_state,
)
from didr_core.networks.tokenizers import check_tokenizer
from didr_core.rewards._clip import ClipReward, Towers, load_tokenizer
from didr_core.rewards.images import padded_pixels
from didr_core.types import DIDRError

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
WHAT = "a ViT-H-14 in open_clip's layout (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt)"
HEADS = {"vision": 80, "text": 64}
"""Widths of an attention head in ViT-H-14: a state dict does not say them."""


class HPSv2(ClipReward):
    """A differentiable reward; text features are made once per prompt by reward-model actors."""

    class Config(Component):
        """`path`: the published file, or a folder with it. `version`: which file of a folder. `tokenizer`: folder of any CLIP's tokenizer,
        by default the folder of the file."""

        name: str = "hpsv2"
        path: str
        version: Literal["2.0", "2.1"] = "2.1"
        tokenizer: str | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = locate(config.path)

    def check(self) -> None:
        """Raises DIDRError unless the file is a whole ViT-H-14 of the version asked for and there is a tokenizer. Reads no weights."""
        self._checked()

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load and convert, frozen, float32 (the published files are float16)."""
        state, tokenizer = self._checked()
        model: Any = convert(state).to(device)
        self._towers = Towers(model, load_tokenizer(tokenizer, model), padded_pixels)

    def tokenizers(self) -> dict[Path, int]:
        """See :class:`didr_core.types.Reward`."""
        state, tokenizer = self._checked()
        return {tokenizer: len(state["positional_embedding"])}

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``{"text": [B, D]}``, unit length, of prompts as :func:`clean` leaves them."""
        return super().prepare([clean(prompt) for prompt in prompts])

    def factor(self) -> float:
        """100."""
        return 100.0

    def _checked(self) -> tuple[State, Path]:
        file = find_file("reward.path", self.path, [FILES[self.config.version]])
        other = [v for v, name in FILES.items() if name == file.name and v != self.config.version]
        if other:
            raise DIDRError(
                f"reward.path={str(file)!r}: is version {other[0]}, but reward.version={self.config.version!r}. "
                f"Set reward.version={other[0]!r}, or give {FILES[self.config.version]}."
            )
        state = read_state("reward.path", file)
        check_layout("reward.path", file, _without_mask(state), layout(state, file), WHAT)
        tokenizer = locate(self.config.tokenizer) if self.config.tokenizer else file.parent
        check_tokenizer("reward.tokenizer", tokenizer)
        return state, tokenizer


def clean(prompt: str) -> str:
    """``prompt`` as upstream's tokenizer reads it: Unicode mended (straight quotes, no ligatures, no full-width letters, no mojibake), HTML
    entities resolved twice, white space folded, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def layout(state: State, file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP with the sizes that ``state`` shows.

    Raises:
        DIDRError: another kind of file, or widths that are no multiple of ViT-H-14's heads.
    """
    names = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight")
    first = ("visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.mlp.c_fc.weight")
    conv, places, proj, tokens, vision_fc, text_fc, context = marker_shapes(
        "reward.path", file, state, (*names, *first, "positional_embedding"), WHAT
    )
    vision, text, out = conv[0], tokens[1], proj[1]
    for tower, width in (("vision", vision), ("text", text)):
        if width % HEADS[tower]:
            raise DIDRError(
                f"reward.path={str(file)!r}: {tower} width {width} is no multiple of ViT-H-14's head width {HEADS[tower]}. Expected {WHAT}."
            )
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (context[0], text),
        "text_projection": (text, out),
        "token_embedding.weight": tokens,
        "ln_final.weight": (text,),
        "ln_final.bias": (text,),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (round((places[0] - 1) ** 0.5) ** 2 + 1, vision),
        "visual.proj": (vision, out),
        "visual.conv1.weight": (vision, 3, conv[-1], conv[-1]),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (vision,), f"visual.{norm}.bias": (vision,)}
    for prefix, width, hidden in (
        ("visual.transformer.resblocks.", vision, vision_fc[0]),
        ("transformer.resblocks.", text, text_fc[0]),
    ):
        for n in range(count_layers(state, prefix)):
            shapes |= {f"{prefix}{n}.{k}": v for k, v in _block(width, hidden).items()}
    return shapes


def _block(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }


BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # sic
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def to_transformers(state: State) -> State:
    """open_clip's names and layouts to those of transformers' ``CLIPModel``; views, no copies."""
    out: State = {}
    for name, value in _without_mask(state).items():
        tower, marker, rest = name.partition("transformer.resblocks.")
        if name in NAMES:
            out[NAMES[name]] = value
        elif name in ("visual.proj", "text_projection"):
            out[f"{'visual' if name == 'visual.proj' else 'text'}_projection.weight"] = value.T
        elif marker:
            number, _, rest = rest.partition(".")
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            module, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    out[f"{prefix}.self_attn.{letter}_proj.{kind}"] = part
            else:
                out[f"{prefix}.{BLOCK_NAMES[module]}.{kind}"] = value
    return out


def clip_config(state: State) -> Any:
    """The ``CLIPConfig`` of an open_clip state dict: exact GELU, heads of :data:`HEADS`, pooling at the last token of the vocabulary."""
    from transformers import CLIPConfig

    vision, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text = state["token_embedding.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    first = {"vision": "visual.transformer.resblocks.", "text": "transformer.resblocks."}
    common = {
        tower: {
            "hidden_size": width,
            "intermediate_size": len(state[f"{first[tower]}0.mlp.c_fc.bias"]),
            "num_hidden_layers": count_layers(state, first[tower]),
            "num_attention_heads": width // HEADS[tower],
            "hidden_act": "gelu",
            "projection_dim": state["visual.proj"].shape[1],
        }
        for tower, width in (("vision", vision), ("text", text))
    }
    return CLIPConfig(
        vision_config={**common["vision"], "patch_size": patch, "image_size": side * patch},
        text_config={
            **common["text"],
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state["positional_embedding"]),
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
        },
        projection_dim=state["visual.proj"].shape[1],
    )


def convert(state: State) -> torch.nn.Module:
    """A ``CLIPModel`` that computes what open_clip computes with ``state``; float32, frozen, eval mode."""
    from transformers import CLIPModel

    config = clip_config(state)
    return assemble(lambda: CLIPModel(config), to_transformers(state))


def _without_mask(state: State) -> State:
    """open_clip's causal mask was a saved buffer in some versions."""
    return {k: v for k, v in state.items() if k not in ("attn_mask", "text.attn_mask")}
