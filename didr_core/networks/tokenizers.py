"""Tokenizers: whole before anything is loaded, read by transformers, and how many prompts are longer than what is read of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from didr_core.networks.loading import found_in, quiet, read_json, reason
from didr_core.types import DIDRError

TOKENIZER_FILES = ("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt")
FEWEST = 8
"""Tokens; of an empty folder transformers makes a tokenizer of a handful, which turns prompts into noise."""


def check_tokenizer(key: str, folder: Path, model: Mapping[str, Any] | None = None) -> None:
    """Looks at the vocabulary, without transformers.

    Args:
        model: configuration of the text model that takes its tokens.

    Raises:
        DIDRError: no such folder, files missing or damaged, hardly any tokens, no end token, or more tokens than the model knows.
    """
    wanted = " or ".join(" with ".join(files) for files in TOKENIZER_FILES)
    if not folder.is_dir():
        raise DIDRError(f"{key}={str(folder)!r}: no such folder. Expected one with {wanted}; set `tokenizer`.")
    if not any(all((folder / name).is_file() for name in files) for files in TOKENIZER_FILES):
        raise DIDRError(
            f"{key}={str(folder)!r}: no tokenizer there (found: {found_in(folder)}). Expected {wanted}; "
            "set `tokenizer` to the folder of the model that these weights were trained from."
        )
    tokens = _vocabulary(key, folder)
    wrong = ""
    if len(tokens) < FEWEST:
        wrong = f"has {len(tokens)} tokens"
    elif (end := _end_token(key, folder)) and end not in tokens:
        wrong = f"its end token {end!r} is not among its {len(tokens)} tokens"
    elif (size := (model or {}).get("vocab_size")) and max(tokens.values()) >= size:
        wrong = f"numbers tokens up to {max(tokens.values())}, its text model knows {size} (vocab_size of config.json)"
    if wrong:
        raise DIDRError(
            f"{key}={str(folder)!r}: {wrong}. Expected the whole tokenizer that this model was trained with."
        )


def _vocabulary(key: str, folder: Path) -> dict[str, int]:
    """Token to number, added tokens among them."""
    if (file := folder / "tokenizer.json").is_file():
        content = read_json(key, file)
        words = (content.get("model") or {}).get("vocab") or {}
        if isinstance(words, list):  # of Unigram: [token, score] each
            words = {word: i for i, (word, _) in enumerate(words)}
        return words | {str(token["content"]): token["id"] for token in content.get("added_tokens") or ()}
    if (file := folder / "vocab.txt").is_file():
        return {word: i for i, word in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines())}
    added = _settings(key, folder).get("added_tokens_decoder") or {}
    return read_json(key, folder / "vocab.json") | {str(token["content"]): int(i) for i, token in added.items()}


def _settings(key: str, folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(key, file) if file.is_file() else {}


def _end_token(key: str, folder: Path) -> str | None:
    end = _settings(key, folder).get("eos_token")
    return end.get("content") if isinstance(end, Mapping) else end


def tokens_read(key: str, folder: Path) -> int:
    """Tokens of a prompt that the tokenizer in ``folder`` keeps, by its own configuration; endlessly many where it does not say."""
    return int(_settings(key, folder).get("model_max_length") or 2**31)


def longer_than(folder: Path, tokens: int, prompts: Sequence[str]) -> int:
    """How many of ``prompts`` are more than ``tokens`` tokens, start and end among them."""
    long = [prompt for prompt in prompts if len(prompt.encode()) + 2 > tokens]  # no token is less than a byte
    if not long:
        return 0
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer  # transformers takes seconds to import

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_truncation()
        fast.no_padding()
        return sum(len(found.ids) > tokens for found in fast.encode_batch(long))
    return sum(len(ids) > tokens for ids in read_tokenizer("tokenizer", folder)(long, truncation=False)["input_ids"])


def for_old_readers(folder: Path) -> None:
    """Write beside a ``tokenizer.json`` what transformers 4 asks for and transformers 5 no longer saves: ``vocab.json``, ``merges.txt``,
    and the added tokens in ``tokenizer_config.json``. Does nothing to a folder that has them, or whose tokenizer is of another kind."""
    file = folder / "tokenizer.json"
    content = read_json("export", file) if file.is_file() else {}
    model = content.get("model") or {}
    if model.get("type") != "BPE" or (folder / "vocab.json").is_file():
        return
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings, added = _settings("export", folder), content.get("added_tokens") or ()
    settings.setdefault(
        "added_tokens_decoder", {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    )
    if isinstance(more := settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = more
        del settings["extra_special_tokens"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def read_tokenizer(key: str, folder: Path) -> Any:
    """The transformers tokenizer in ``folder``.

    Raises:
        DIDRError: see :func:`check_tokenizer`; or transformers cannot read what is there.
    """
    from transformers import AutoTokenizer

    check_tokenizer(key, folder)
    quiet()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of several libraries, one of which raises the bare class
        raise DIDRError(
            f"{key}={str(folder)!r}: transformers cannot read this tokenizer ({reason(error)}). Expected all that save_pretrained writes."
        ) from error
