"""A LoRA file that a generator starts with, in diffusers' names or kohya's: looked at before anything is loaded, then merged in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from didr_core.networks.loading import Shapes, class_of, quiet, read_state, reason, refuse_nan
from didr_core.types import DIDRError

KEY = "backbone.lora"


def read_lora(path: Path, pipeline: str, part: str, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any, Any]:
    """Its tensors in diffusers' names, ``<part>.<layer>.lora_A.weight``, and what says how much each counts: alphas, or metadata.

    Args:
        pipeline: the class in diffusers. part: the network's name there. config: the network's.

    Raises:
        DIDRError: no such file, damaged, NaN, no LoRA of this family, or one that changes text encoders, too.
    """
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    quiet()
    if not path.is_file():
        raise DIDRError(f"{KEY}={str(path)!r}: no such file. Expected a LoRA's .safetensors file.")
    refuse_nan(KEY, path, read_state(KEY, path))
    more = {"unet_config": FrozenDict(config)} if part == "unet" else {}
    try:
        found = class_of(pipeline).lora_state_dict(str(path), return_lora_metadata=True, local_files_only=True, **more)
    except Exception as error:  # whatever names lead it to
        raise DIDRError(
            f"{KEY}={str(path)!r}: diffusers knows no such LoRA ({reason(error)}). Expected one of a {pipeline}."
        ) from error
    state, metadata = found[0], found[-1]
    if not any("lora_A" in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    if other := next((name for name in state if not name.startswith(f"{part}.")), None):
        raise DIDRError(
            f"{KEY}={str(path)!r}: holds {other}, not of the {part}. Expected a LoRA of the {part} alone; or merge it into a pipeline "
            "with diffusers (load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained), and give that as backbone.pipeline."
        )
    return state, found[1] if len(found) == 3 else None, metadata


def check_lora(path: Path, pipeline: str, part: str, config: Mapping[str, Any], layout: Shapes) -> None:
    """Raises DIDRError unless every layer that it changes is one of ``layout``, of the same size; see :func:`read_lora`."""
    state, _, _ = read_lora(path, pipeline, part, config)
    sizes: dict[str, list[int]] = {}
    for name, value in state.items():
        layer, _, factor = name.removeprefix(f"{part}.").partition(".lora_")
        side = 0 if factor.startswith("B") else 1  # of the two factors, what meets the network
        sizes.setdefault(layer, [0, 0])[side] = value.shape[side]
    for layer, size in sizes.items():
        if (has := layout.get(f"{layer}.weight", ())[:2]) != tuple(size):
            told = f"{list(has)} there" if has else "not there"
            raise DIDRError(f"{KEY}={str(path)!r}: changes {layer} of {size}, {told}. Expected a LoRA of this network.")


def merge_lora(network: Any, path: Path, pipeline: str, part: str) -> nn.Module:
    """``network`` plus what the file adds, without a trace of adapters; raises DIDRError, see :func:`read_lora`."""
    state, alphas, metadata = read_lora(path, pipeline, part, network.config)
    network.load_lora_adapter(state, prefix=part, network_alphas=alphas, metadata=metadata)
    network.fuse_lora()
    network.unload_lora()
    return network  # type: ignore[no-any-return]
