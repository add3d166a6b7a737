"""A pipeline folder for users: the new network, and of all other parts the reference's own files, which old and new releases of diffusers
and transformers read alike. What those write again (tokenizers, configurations) only their own line reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from didr_core.networks.loading import find_weights, read_weights
from didr_core.networks.tokenizers import for_old_readers

Json = Mapping[str, Any]


def write_network(folder: Path, config: Json, state: dict[str, Tensor], single: Path) -> None:
    """A diffusers network of ``config`` holding ``state``; its weights are also the file ``single``: one file of two names."""
    from safetensors.torch import save_file

    save_file(state, single, metadata={"format": "pt"})
    folder.mkdir()
    write_json(folder / "config.json", config)
    _another_name(single, folder / "diffusion_pytorch_model.safetensors")


def copy_part(source: Path, target: Path, made: str, dtype: torch.dtype) -> None:
    """The part ``source`` of a pipeline, of class ``made``: weights in ``dtype``, in one file of the plain name, the rest as it stands."""
    from safetensors.torch import save_file

    path, _ = find_weights(source)
    target.mkdir()
    for file in source.glob("[!.]*.*"):  # names without a dot stop diffusers where a variant is asked for
        if file.is_file() and (path is None or (file.suffix == ".json" and ".index." not in file.name)):
            shutil.copyfile(file, target / file.name)
    if path is None:
        if "Tokenizer" in made:
            for_old_readers(target)
        return
    state = read_weights("backbone.pipeline", path)
    old = "text_model."  # what transformers 5 leaves out of this class's names, and reads
    if made == "CLIPTextModel" and not any(name.startswith(old) for name in state):
        state = {old + name: value for name, value in state.items()}
    state = {k: v.to(dtype if v.is_floating_point() else v.dtype, copy=True).contiguous() for k, v in state.items()}
    stem = "diffusion_pytorch_model" if path.name.startswith("diffusion") else "model"
    save_file(state, target / f"{stem}.safetensors", metadata={"format": "pt"})
    if stem == "model":
        config = json.loads((target / "config.json").read_text())
        theta = (config.get("rope_parameters") or {}).get("rope_theta")  # transformers 4 looks for it above
        # else transformers 5 takes the file's, diffusers float32 for all the rest, where a user says nothing
        types = dict.fromkeys(("dtype", "torch_dtype"), "float32")
        write_json(target / "config.json", config | types | ({"rope_theta": theta} if theta else {}))


def name_variant(folder: Path, variant: str) -> None:
    """Weights of all parts under ``variant``'s names, too: ``from_pretrained(folder, variant="fp16")`` as well as without."""
    for path in folder.glob("*/*model.safetensors"):
        _another_name(path, path.with_suffix(f".{variant}.safetensors"))


def write_json(path: Path, tree: Json) -> None:
    """As diffusers writes it."""
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _another_name(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError:  # a file system without links
        shutil.copyfile(path, name)
