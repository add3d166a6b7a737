"""The published reward models at toy size, in their own files: what the tests load and what upstream's packages load for the golden numbers
(tests/rewards/make_golden.py, which runs where this project is not installed: torch and safetensors are all that is used here).

Layouts are lists of names and shapes made from the architectures' naming rules; weights are made from a formula, so that golden numbers do
not hang on a random generator.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

SIDE = 32
PICTURES = {
    "at size": (32, 32),
    "tall": (35, 32),
    "wide": (32, 39),
    "large": (100, 76),
    "white": (100, 100),
    "edges": (90, 63),
}
"""Heights and widths of :func:`picture`. From `tall` and `wide` an odd number of lines is cropped, and roundings of its half differ."""
PROMPTS = [
    "a red circle",
    "Two  squares,\na RED circle ",
    "",
    "it's a “blue” circle &mdash; isn’t it…",
    "<3 red &amp;amp; blue &quot;squares&quot;",
    "a ﬂat circle, ﬁne ﬆars",
    "ｆｕｌｌ　ｗｉｄｔｈ ＲＥＤ",
    "a cafÃ© above a naïve ÉCLAIR",
    "two\u00a0blue\u2003squares\u200b and\ttabs",
    "Ǆ İstanbul STRAẞE 北京 🔴 №5 ½",
    "\x1b[31mred\x1b[0m a\u0000bove \ufeffcircle",
    "a red circle above two blue squares, " * 6,
]
"""Plain, then what a tokenizer may mend or fold; the last is longer than any text tower reads."""

MERGES = [
    "r e",
    "re d</w>",
    "c i",
    "r c",
    "ci rc",
    "l e</w>",
    "circ le</w>",
    "b l",
    "bl u",
    "blu e</w>",
    "a b",
    "q u",
    "e s</w>",
]
"""Of the toy CLIP vocabulary: all bytes, all bytes that end a word, these, and both ends."""
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "blue",
    "circle",
    "above",
    "two",
    "squares",
    "&",
    ",",
]
"""Of the toy BERT vocabulary; ImageReward adds two of its own."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

VIT_H_14 = {"vision": (1280, 32, 5120, 14, 16), "text": (1024, 24, 4096, 77, 49408), "out": 1024}
TINY_H = {"vision": (160, 2, 640, 8, 4), "text": (128, 2, 512, 77, 514 + len(MERGES)), "out": 24}
"""Widths, layers, hidden, then patch and patches a side, or context and vocabulary. Heads are 80 and 64 wide, as in ViT-H-14; two of each
make 160 and 128 wide towers of OpenAI's CLIP too."""

BLIP_L_16 = {"vision": (1024, 24, 4096, 16, 14), "text": (768, 12, 3072, 512, 30524), "head": (1024, 128, 64, 16, 1)}
TINY_BLIP = {"vision": (128, 2, 512, 8, 4), "text": (64, 2, 48, 40, len(WORDS) + 2), "head": BLIP_L_16["head"]}
LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
"""Places of a head's linear layers among dropouts, and among dropouts and ReLUs."""


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


def head_shapes(into: int, widths: tuple[int, ...], prefix: str = "layers", places: tuple[int, ...] = LINEAR) -> Shapes:
    shapes: Shapes = {}
    for number, out in zip(places, widths, strict=False):
        shapes |= linear(f"{prefix}.{number}", out, into)
        into = out
    return shapes


def noise(count: int, seed: int) -> Tensor:
    """[count] numbers of variance 1 by formula: quadratic residues, as good as uniform noise here."""
    i = torch.arange(count) + 1 + 1009 * seed
    return ((i * i * 40503 + i * 2654435 + 97 * seed) % 65521).double().div(65521).sub(0.5).mul(12**0.5)


def fill(shapes: Shapes) -> State:
    """Weights of variance 1 / fan-in, norms around 1; every number is one of float16 too, as the published files are."""
    state: State = {}
    for place, (name, shape) in enumerate(shapes.items()):
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[-1]).expand(shape).clone()
            continue
        value = noise(math.prod(shape), place).reshape(shape)
        value = value / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * value
        if len(shape) == 1 and name.endswith("weight"):
            value = 1 + value
        state[name] = torch.tensor(3.0) if name == "logit_scale" else value.half().float()
    return state


def head_state(into: int, places: tuple[int, ...] = LINEAR) -> State:
    """An aesthetic head whose score moves with its input: its weights are larger than :func:`fill`'s."""
    return {k: 3 * v for k, v in fill(head_shapes(into, BLIP_L_16["head"], places=places)).items()}


def picture(name: str) -> Tensor:
    """Whole numbers 0 to 255, [3, H, W] float32: smooth and inside the range, or white, or black and white stripes."""
    height, width = PICTURES[name]
    y, x = torch.meshgrid(torch.arange(height) / height * 3, torch.arange(width) / width * 3, indexing="ij")
    waves = torch.stack([torch.sin(2 * x + (5.3 - c) * y + c * c) for c in range(3)]).double()
    if name == "white":
        return torch.full((3, height, width), 255.0)
    if name == "edges":
        return 255.0 * (torch.stack([torch.sin(9 * x + (13 - 3 * c) * y) for c in range(3)]) > 0)
    return (127.5 + 85 * waves).round().float()


def along(gradient: Tensor) -> list[float]:
    """What a gradient [3, H, W] is remembered by: its products with 16 pictures of noise. Their error is the gradient's own, to a fifth."""
    return [float((gradient.double().flatten() * noise(gradient.numel(), 7 + k)).sum()) for k in range(16)]


def clip_tokenizer(folder: Path) -> Path:
    """The toy CLIP vocabulary as transformers reads it, in OpenAI's order."""
    folder.mkdir(parents=True, exist_ok=True)
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printed] + [chr(256 + n) for n in range(256 - len(printed))]
    tokens = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in MERGES)]
    vocabulary = {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def bpe_file(path: Path) -> Path:
    """The same as OpenAI's CLIP and its forks read it: `bpe_simple_vocab_16e6.txt.gz`."""
    path.write_bytes(gzip.compress("\n".join(["version", *MERGES]).encode()))
    return path


def bert_tokenizer(folder: Path) -> Path:
    """The toy BERT vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def clip_folder(folder: Path, state: State, act: str = "gelu") -> Path:
    """A CLIPModel folder of :data:`TINY_H` with tokenizer and picture settings, as save_pretrained leaves it."""
    (v, v_layers, v_hidden, patch, grid), (t, t_layers, t_hidden, context, words) = TINY_H["vision"], TINY_H["text"]
    common = {"num_attention_heads": 2, "hidden_act": act, "projection_dim": TINY_H["out"]}
    vision = {"hidden_size": v, "num_hidden_layers": v_layers, "intermediate_size": v_hidden, "patch_size": patch}
    text = {"hidden_size": t, "num_hidden_layers": t_layers, "intermediate_size": t_hidden, "vocab_size": words}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": TINY_H["out"],
        "vision_config": vision | common | {"image_size": patch * grid, "model_type": "clip_vision_model"},
        "text_config": text
        | common
        | {"max_position_embeddings": context, "bos_token_id": words - 2, "eos_token_id": words - 1}
        | {"model_type": "clip_text_model"},
    }
    (clip_tokenizer(folder) / "config.json").write_text(json.dumps(config))
    pictures = {"image_processor_type": "CLIPImageProcessor", "resample": 3, "size": {"shortest_edge": SIDE}}
    pictures |= {"crop_size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def write(root: Path) -> Path:
    """Every reward's published files under ``root``, for this project and for upstream's packages alike."""
    open_clip = fill(open_clip_shapes(TINY_H))
    torch.save({"state_dict": open_clip}, clip_tokenizer(root / "hps") / "HPS_v2.1_compressed.pt")
    torch.save(fill(image_reward_shapes(TINY_BLIP)), bert_tokenizer(root / "ir") / "ImageReward.pt")
    clip_folder(root / "clip", fill(clip_model_shapes(TINY_H)))
    for name, places in (("sac+logos+ava1-l14-linearMSE.pth", LINEAR), ("ava+logos-l14-reluMSE.pth", RELU)):
        torch.save(head_state(TINY_H["out"], places), root / name)
    torch.save(open_clip, root / "openai.pt")
    return root
