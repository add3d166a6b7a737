"""What the published reward models compute, written once more from their architectures: plain functions over published state dicts.

Nothing here is shared with `didr_core.rewards`. Layouts are lists of names and shapes made from the architectures' naming rules; weights
are made from a formula, so that golden numbers do not hang on a random generator.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

VIT_H_14 = {"vision": (1280, 32, 5120, 14, 16), "text": (1024, 24, 4096, 77, 49408), "out": 1024}
TINY_H = {"vision": (160, 2, 96, 8, 4), "text": (128, 2, 64, 16, 190), "out": 24}
"""Widths, layers, hidden, then patch and patches a side, or context and vocabulary. Heads are 80 and 64 wide, as in ViT-H-14."""

BLIP_L_16 = {"vision": (1024, 24, 4096, 16, 14), "text": (768, 12, 3072, 512, 30524), "head": (1024, 128, 64, 16, 1)}
TINY_BLIP = {"vision": (128, 2, 96, 8, 4), "text": (64, 2, 48, 40, 12), "head": (16, 8, 1)}
HEAD_NUMBERS = (0, 2, 4, 6, 7)
"""Places of the linear layers among the dropouts."""


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def open_clip_shapes(sizes: dict) -> Shapes:
    """open_clip's `CLIP` with a `VisionTransformer`, `custom_text` off: the layout of HPS_v2.1_compressed.pt."""
    (v, v_layers, v_hidden, patch, grid), (t, t_layers, t_hidden, context, vocabulary) = sizes["vision"], sizes["text"]
    out = sizes["out"]
    shapes: Shapes = {"positional_embedding": (context, t), "text_projection": (t, out), "logit_scale": ()}
    shapes |= {"visual.class_embedding": (v,), "visual.positional_embedding": (grid**2 + 1, v), "visual.proj": (v, out)}
    shapes |= {"visual.conv1.weight": (v, 3, patch, patch), **norm("visual.ln_pre", v), **norm("visual.ln_post", v)}
    shapes |= {"token_embedding.weight": (vocabulary, t), **norm("ln_final", t)}
    for tower, width, layers, hidden in (("visual.", v, v_layers, v_hidden), ("", t, t_layers, t_hidden)):
        for n in range(layers):
            block = f"{tower}transformer.resblocks.{n}"
            shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{block}.attn.out_proj", width, width)
            shapes |= linear(f"{block}.mlp.c_fc", hidden, width) | linear(f"{block}.mlp.c_proj", width, hidden)
    return shapes


def clip_model_shapes(sizes: dict) -> Shapes:
    """transformers' `CLIPModel`: the layout of PickScore_v1."""
    (v, v_layers, v_hidden, patch, grid), (t, t_layers, t_hidden, context, vocabulary) = sizes["vision"], sizes["text"]
    shapes: Shapes = {"logit_scale": (), "visual_projection.weight": (sizes["out"], v)}
    shapes |= {"text_projection.weight": (sizes["out"], t), "vision_model.embeddings.class_embedding": (v,)}
    shapes |= {"vision_model.embeddings.patch_embedding.weight": (v, 3, patch, patch)}
    shapes |= {"vision_model.embeddings.position_embedding.weight": (grid**2 + 1, v)}
    shapes |= {"text_model.embeddings.token_embedding.weight": (vocabulary, t)}
    shapes |= {
        "text_model.embeddings.position_embedding.weight": (context, t),
        **norm("text_model.final_layer_norm", t),
    }
    shapes |= norm("vision_model.pre_layrnorm", v) | norm("vision_model.post_layernorm", v)
    for tower, width, layers, hidden in (("vision", v, v_layers, v_hidden), ("text", t, t_layers, t_hidden)):
        for n in range(layers):
            block = f"{tower}_model.encoder.layers.{n}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{block}.self_attn.{part}", width, width)
            shapes |= linear(f"{block}.mlp.fc1", hidden, width) | linear(f"{block}.mlp.fc2", width, hidden)
            shapes |= norm(f"{block}.layer_norm1", width) | norm(f"{block}.layer_norm2", width)
    return shapes


def image_reward_shapes(sizes: dict) -> Shapes:
    """ImageReward.pt: BLIP's ViT (timm's names), BERT with cross-attention and no token types, the head."""
    (v, v_layers, v_hidden, patch, grid), (t, t_layers, t_hidden, places, words) = sizes["vision"], sizes["text"]
    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes: Shapes = {f"{see}.cls_token": (1, 1, v), f"{see}.pos_embed": (1, grid**2 + 1, v), **norm(f"{see}.norm", v)}
    shapes |= {f"{see}.patch_embed.proj.weight": (v, 3, patch, patch), f"{see}.patch_embed.proj.bias": (v,)}
    for n in range(v_layers):
        block = f"{see}.blocks.{n}"
        shapes |= norm(f"{block}.norm1", v) | norm(f"{block}.norm2", v) | linear(f"{block}.attn.qkv", 3 * v, v)
        shapes |= linear(f"{block}.attn.proj", v, v) | linear(f"{block}.mlp.fc1", v_hidden, v)
        shapes |= linear(f"{block}.mlp.fc2", v, v_hidden)
    shapes |= {f"{read}.embeddings.position_ids": (1, places), f"{read}.embeddings.word_embeddings.weight": (words, t)}
    shapes |= {f"{read}.embeddings.position_embeddings.weight": (places, t), **norm(f"{read}.embeddings.LayerNorm", t)}
    for n in range(t_layers):
        layer = f"{read}.encoder.layer.{n}"
        for kind, source in (("attention", t), ("crossattention", v)):
            shapes |= linear(f"{layer}.{kind}.self.query", t, t) | linear(f"{layer}.{kind}.self.key", t, source)
            shapes |= linear(f"{layer}.{kind}.self.value", t, source) | linear(f"{layer}.{kind}.output.dense", t, t)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", t)
        shapes |= linear(f"{layer}.intermediate.dense", t_hidden, t) | linear(f"{layer}.output.dense", t, t_hidden)
        shapes |= norm(f"{layer}.output.LayerNorm", t)
    return shapes | head_shapes(t, sizes["head"], "mlp.layers")


def head_shapes(into: int, widths: tuple[int, ...], prefix: str = "layers") -> Shapes:
    shapes: Shapes = {}
    for number, out in zip(HEAD_NUMBERS, widths, strict=False):
        shapes |= linear(f"{prefix}.{number}", out, into)
        into = out
    return shapes


def fill(shapes: Shapes) -> State:
    """Weights by formula: quadratic residues, as good as uniform noise here, of variance 1 / fan-in; norms around 1."""
    state: State = {}
    for place, (name, shape) in enumerate(shapes.items()):
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[-1]).expand(shape).clone()
            continue
        i = torch.arange(math.prod(shape)) + 1 + 1009 * place
        noise = (
            ((i * i * 40503 + i * 2654435 + 97 * place) % 65521)
            .double()
            .div(65521)
            .sub(0.5)
            .mul(12**0.5)
            .reshape(shape)
        )
        value = noise / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * noise
        if len(shape) == 1 and name.endswith("weight"):
            value = 1 + value
        state[name] = torch.tensor(3.0) if name == "logit_scale" else value.float()
    return state


def head_state(into: int, widths: tuple[int, ...]) -> State:
    """A head whose score moves with its input: its weights are larger than :func:`fill`'s."""
    return {k: 3 * v for k, v in fill(head_shapes(into, widths)).items()}


def pixels(images: Tensor) -> Tensor:
    """[B, 3, S, S] in [0, 1] to the towers' units."""
    return (images - MEAN) / STD


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Multi-head attention of [B, L, C] on [B, S, C]; ``allowed`` is boolean, broadcast to [B, H, L, S]."""
    b, width = q.shape[0], q.shape[-1]
    q, k, v = (x.reshape(b, -1, heads, width // heads).permute(0, 2, 1, 3) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(width // heads)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    return (logits.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(b, -1, width)


class Weights:
    """A state dict by prefix, with the two layers everything is made of."""

    def __init__(self, state: State, prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __call__(self, prefix: str) -> Weights:
        return Weights(self.state, self.prefix + prefix)

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self[f"{name}.weight"]
            + self[f"{name}.bias"]
        )


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def patches(images: Tensor, weight: Tensor) -> Tensor:
    """A convolution whose stride is its size, as a matrix product: [B, N, C]."""
    size = weight.shape[-1]
    return F.unfold(images, size, stride=size).mT @ weight.flatten(1).T


def open_clip_tower(w: Weights, x: Tensor, layers: int, head: int, allowed: Tensor | None = None) -> Tensor:
    for n in range(layers):
        block = w(f"transformer.resblocks.{n}.")
        seen = block.norm("ln_1", x, 1e-5)
        q, k, v = (seen @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]).chunk(3, -1)
        x = x + block.linear("attn.out_proj", attend(q, k, v, x.shape[-1] // head, allowed))
        x = x + block.linear("mlp.c_proj", gelu(block.linear("mlp.c_fc", block.norm("ln_2", x, 1e-5))))
    return x


def open_clip_cosine(state: State, images: Tensor, ids: Tensor, sizes: dict) -> Tensor:
    """cos of open_clip's CLIP; ``images`` normalised, ``ids`` padded with anything below the end token."""
    w, see = Weights(state), Weights(state, "visual.")
    x = patches(images, see["conv1.weight"])
    x = torch.cat([see["class_embedding"].expand(len(x), 1, -1), x], 1) + see["positional_embedding"]
    x = open_clip_tower(see, see.norm("ln_pre", x, 1e-5), sizes["vision"][1], 80)
    picture = see.norm("ln_post", x[:, 0], 1e-5) @ see["proj"]
    y = w["token_embedding.weight"][ids] + w["positional_embedding"]
    length = ids.shape[1]
    y = open_clip_tower(w, y, sizes["text"][1], 64, torch.ones(length, length, dtype=torch.bool).tril())
    y = w.norm("ln_final", y, 1e-5)[torch.arange(len(ids)), ids.argmax(-1)] @ w["text_projection"]
    return (picture * y).sum(-1) / picture.norm(dim=-1) / y.norm(dim=-1)


def image_reward_score(state: State, images: Tensor, ids: Tensor, mask: Tensor, sizes: dict) -> Tensor:
    """Upstream's standardised score; ``images`` normalised."""
    see, read = Weights(state, "blip.visual_encoder."), Weights(state, "blip.text_encoder.")
    x = patches(images, see["patch_embed.proj.weight"]) + see["patch_embed.proj.bias"]
    x = torch.cat([see["cls_token"].expand(len(x), -1, -1), x], 1) + see["pos_embed"]
    for n in range(sizes["vision"][1]):
        block = see(f"blocks.{n}.")
        q, k, v = block.linear("attn.qkv", block.norm("norm1", x, 1e-6)).chunk(3, -1)
        x = x + block.linear("attn.proj", attend(q, k, v, x.shape[-1] // 64))
        x = x + block.linear("mlp.fc2", gelu(block.linear("mlp.fc1", block.norm("norm2", x, 1e-6))))
    x = see.norm("norm", x, 1e-6)
    y = read["embeddings.word_embeddings.weight"][ids] + read["embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = read.norm("embeddings.LayerNorm", y, 1e-12)
    for n in range(sizes["text"][1]):
        layer = read(f"encoder.layer.{n}.")
        for kind, source, allowed in (("attention", None, mask.bool()[:, None, None]), ("crossattention", x, None)):
            part, keys = layer(f"{kind}."), y if source is None else source
            q, k, v = part.linear("self.query", y), part.linear("self.key", keys), part.linear("self.value", keys)
            mixed = part.linear("output.dense", attend(q, k, v, y.shape[-1] // 64, allowed))
            y = part.norm("output.LayerNorm", mixed + y, 1e-12)
        grown = layer.linear("output.dense", gelu(layer.linear("intermediate.dense", y)))
        y = layer.norm("output.LayerNorm", grown + y, 1e-12)
    return (head(state, y[:, 0], len(sizes["head"]), "mlp.layers") - 0.16717362830052426) / 1.0333394966054072


def head(state: State, x: Tensor, layers: int, prefix: str = "layers") -> Tensor:
    """[B, D] -> [B] through plain linear layers."""
    for number in HEAD_NUMBERS[:layers]:
        x = Weights(state, f"{prefix}.").linear(str(number), x)
    return x.squeeze(-1)


def bert_tokenizer(folder: Path) -> Path:
    """BERT tokenizer files of twelve words."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "above", "two", "squares"]
    folder.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, sizes: dict) -> Path:
    """A CLIPModel folder with formula weights, and a byte tokenizer."""
    from random_models import byte_tokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(byte_tokenizer(folder))
    (v, v_layers, v_hidden, patch, grid), (t, t_layers, t_hidden, context, vocabulary) = sizes["vision"], sizes["text"]
    vision = {"hidden_size": v, "num_hidden_layers": v_layers, "intermediate_size": v_hidden, "num_attention_heads": 2}
    vision |= {"patch_size": patch, "image_size": patch * grid, "projection_dim": sizes["out"]}
    text = {"hidden_size": t, "num_hidden_layers": t_layers, "intermediate_size": t_hidden, "num_attention_heads": 2}
    text |= {"max_position_embeddings": context, "vocab_size": vocabulary, "projection_dim": sizes["out"]}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes["out"]))
    model.load_state_dict(fill(clip_model_shapes(sizes)))
    model.save_pretrained(folder)
    return folder


def golden() -> dict[str, list[float]]:
    """Stored scores of the three pictures of test_rewards.py."""
    path = Path(__file__).parent / "golden_rewards.json"
    return json.loads(path.read_text())["scores"] if path.is_file() else {}
