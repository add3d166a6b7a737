"""Random models of the real classes at toy size, built from nothing in seconds: what `tiny_sdxl` and `tiny_zimage` train.

    python -m didr_core.world.random_models                # runs/random/sdxl and runs/random/zimage, where the recipes look
    didr align --recipe tiny_zimage

They draw noise and learn nothing worth seeing; they go through every line that full-size models go through.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from didr_core.networks.loading import quiet

FOLDER = Path("runs/random")
PARTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path, length: int = 16) -> Path:
    """Files of a CLIP tokenizer over single characters, no merges, for prompts of ``length`` tokens with both ends."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def clip_text_config(tokenizer: Any, hidden: int, projection: int) -> Any:
    """Of a two-layer text tower for ``tokenizer``, with its real end token: another would pool at another position."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def sdxl(folder: Path, seed: int = 0) -> Path:
    """A StableDiffusionXLPipeline folder with a KL autoencoder; pictures of 64 pixels."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(byte_tokenizer(folder / "tokenizer", 77))
    pipe = StableDiffusionXLPipeline(
        unet=_part("sdxl", "unet"),
        vae=_part("sdxl", "vae"),
        text_encoder=CLIPTextModel(clip_text_config(tokenizer, 16, 16)),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(tokenizer, 16, 16)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=_part("sdxl", "scheduler"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def zimage(folder: Path, seed: int = 0, shift: float = 6.0) -> Path:
    """A ZImagePipeline folder; pictures of any multiple of 16 pixels up to 512, prompts of up to 192 bytes."""
    from diffusers import ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    transformer = _part("zimage", "transformer")
    with torch.no_grad():  # zero as they are made: a test could not see whether they are used
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    pipe = ZImagePipeline(
        vae=_part("zimage", "vae"),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **PARTS["zimage"]["text_encoder"])),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=_part("zimage", "scheduler", shift=shift),
    )
    pipe.save_pretrained(folder)
    return folder


def _part(family: str, part: str, **changes: Any) -> Any:
    import diffusers

    settings = {**PARTS[family][part], **changes}
    return getattr(diffusers, settings.pop("class"))(**settings)


def chat_tokenizer() -> Any:
    """A Qwen tokenizer over single bytes, with the chat tokens and a template."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m didr_core.world.random_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args(arguments).folder
    quiet()
    for make in (sdxl, zimage):
        print(make(folder / make.__name__))


if __name__ == "__main__":
    main()
