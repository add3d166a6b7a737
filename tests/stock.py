"""Changes to a folder of diffusers, each by diffusers itself where it can, and how near is equal: for the tests against stock diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

Change = Callable[[Path], object]
PROMPTS = ["a cat", "two dogs on a red sofa", ""]


def scheduler(name: str, **settings: Any) -> Change:
    return lambda folder: getattr(diffusers, name)(**settings).save_pretrained(folder / "scheduler")


def said(file: str, **settings: Any) -> Change:
    """Write ``settings`` into a JSON file; None takes a key out."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text()) | settings
        (folder / file).write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))

    return change


def load(folder: Path, part: str, **options: Any) -> Any:
    library, name = json.loads((folder / "model_index.json").read_text())[part]
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], name).from_pretrained(
        folder / part, **options
    )


def saved(*parts: str, dtype: torch.dtype = torch.float32, beside: bool = False, **options: Any) -> Change:
    """Save parts again by ``save_pretrained``: variants, shards, torch files, other types of numbers."""

    def change(folder: Path) -> None:
        for part in parts:
            model = load(folder, part, torch_dtype=dtype)
            for file in () if beside else [*(folder / part).glob("*.safetensors*"), *(folder / part).glob("*.bin*")]:
                file.unlink()
            model.save_pretrained(folder / part, **options)

    return change


def vae(name: str, **settings: Any) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        torch.manual_seed(1)
        getattr(diffusers, name)(**settings).save_pretrained(folder / "vae")
        said("model_index.json", vae=["diffusers", name])(folder)

    return change


def rubbish(*names: str) -> Change:
    """Files that nobody loads: pointers, halves, formats of other libraries."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    return change


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
