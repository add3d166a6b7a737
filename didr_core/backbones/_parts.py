"""One part of a diffusers pipeline folder: looked at before anything is loaded, and loaded as stock diffusers loads it, in the variant
that this part has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from didr_core.config import WORLD
from didr_core.networks.loading import (
    Shapes,
    check_layout,
    check_weights,
    class_of,
    load_pretrained,
    quiet,
    read_json,
    reason,
    refuse_nan,
    variant,
)
from didr_core.types import DIDRError

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of attention layers in VAEs of 2022, which diffusers renames."""
OLD_NAME = re.compile(r"(?<=attentions\.\d\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")


def _is_text(make: Any) -> bool:
    return str(make.__module__).startswith("transformers")


def check_part(key: str, folder: Path, name: str) -> None:
    """The weights in ``folder`` are those of its ``config.json``, for a network of class ``name``. Reads headers and small tensors; what
    came with this package is taken as it is.

    Raises:
        DIDRError: none, damaged, pointers; tensors missing, of other shapes, or with NaN.
    """
    found = check_weights(key, folder, WEIGHTS)
    if WORLD in folder.parents:
        return
    make = class_of(name)
    if _is_text(make):
        load_pretrained(key, make, folder, device_map="meta")
        return
    expected = layout_of(key, folder, make)
    renamed = {OLD_NAME.sub(lambda m: OLD_NAMES[m[1]], name): shape for name, shape in found.items()}
    check_layout(key, folder, renamed, expected, f"all of a {name} with the config.json beside it", extra=True)


def layout_of(key: str, folder: Path, make: Any) -> Shapes:
    """Names and shapes of the network that ``config.json`` in ``folder`` describes.

    Raises:
        DIDRError: the class cannot be made of these settings.
    """
    quiet()
    try:
        with torch.device("meta"):
            network = make.from_config(read_json(key, folder / "config.json"))
    except Exception as error:  # whatever a setting leads it to
        raise DIDRError(
            f"{key}={str(folder)!r}: config.json describes no {make.__name__} ({reason(error)}). Expected what save_pretrained wrote."
        ) from error
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def load_part(key: str, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The network of class ``name`` in ``folder``, eval.

    Raises:
        DIDRError: it cannot be made of the folder, or holds NaN.
    """
    quiet()
    make = class_of(name)
    if _is_text(make):
        network = load_pretrained(key, make, folder, dtype=dtype)
    else:
        try:
            network = make.from_pretrained(folder, dtype=dtype, variant=variant(folder)).eval()
        except Exception as error:  # whatever a configuration or a torch file leads it to
            raise DIDRError(
                f"{key}={str(folder)!r}: diffusers cannot load it ({reason(error)}). Expected a whole {name}."
            ) from error
    refuse_nan(key, folder, network.state_dict())
    return network


def refuse_lora(key: str, path: Path, names: Mapping[str, Any], pipeline: str, folder: str) -> None:
    """Raises DIDRError for a LoRA where a whole network is expected, with what to do."""
    if any("lora_" in name.lower() for name in names):
        raise DIDRError(
            f"{key}={str(path)!r}: is a LoRA, expected a whole network. Give it as backbone.lora, on the model that it was made for; "
            f"or merge it yourself and set {key}=merged:\n"
            f"pipe = diffusers.{pipeline}.from_pretrained({folder!r})\n"
            f"pipe.load_lora_weights({str(path)!r}); pipe.fuse_lora(); pipe.unload_lora_weights()\n"
            "pipe.save_pretrained('merged')"
        )
