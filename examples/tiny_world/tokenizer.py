"""Part "tokenizer": a CLIPTokenizer from a byte-level BPE trained on the world's own words.

Words of the world become one token each; any other word falls apart into letters, so every string can be encoded.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from didr_core.world.captions import BACKGROUND_WORDS, JOINS, NUMBERS, PREFIXES, RELATION_WORDS
from didr_core.world.scenes import BACKGROUNDS, COLOURS, SHAPES
from examples.tiny_world.networks import MAX_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"


def world_words() -> list[str]:
    """Every word a caption can hold, sorted."""
    phrases = [*COLOURS, *BACKGROUNDS, *SHAPES, *(shape + "s" for shape in SHAPES if shape != "cross"), "crosses", "a"]
    phrases += [*PREFIXES, *JOINS, *(w for words in NUMBERS.values() for w in words)]
    phrases += [w for words in RELATION_WORDS.values() for w in words]
    phrases += [words.replace("{}", " ").replace(",", " ") for words in BACKGROUND_WORDS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def train_bpe(words: list[str]) -> list[tuple[str, str]]:
    """Merges, in rank order, after which every word is one token; ties break alphabetically."""
    split = {word: " ".join([*word[:-1], word[-1] + "</w>"]) for word in words}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split.values() for pair in itertools.pairwise(parts.split())):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        beside = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        split = {word: beside.sub("".join(best), parts) for word, parts in split.items()}
    return merges


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer; ids: 0-1 unused letters, so that the end id is never 2 (CLIP reads 2 as "legacy pooling")."""
    letters = [chr(code) for code in range(33, 127)]
    merges = train_bpe(world_words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=END, model_max_length=MAX_TOKENS)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention mask [B, MAX_TOKENS], padded and truncated."""
    out = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The ids alone."""
    return tokens(tokenizer, captions)[0]


def build(folder: Path, world: Path) -> None:
    """Save the tokenizer into ``folder``/tokenizer."""
    make_tokenizer().save_pretrained(folder / "tokenizer")
