"""The linear head of ImageReward and of the LAION aesthetic predictor: a stack of linear layers without activations, published with
dropout between them (silent when scoring), so that the layers are numbered 0, 2, 4, 6, 7."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from didr_core.networks.loading import State
from didr_core.types import DIDRError


def linear_layers(key: str, path: Path, state: State, prefix: str = "layers.") -> list[tuple[str, tuple[int, ...]]]:
    """``(<prefix>N, shape of its weight)`` of every layer, first to last.

    Raises:
        DIDRError: none, a missing bias, widths that do not follow on each other, or an output that is not one number.
    """
    names = {
        name.removesuffix(".weight")
        for name in state
        if name.startswith(prefix) and name.endswith(".weight") and name.removeprefix(prefix).split(".")[0].isdigit()
    }
    layers = sorted(names, key=lambda name: int(name.removeprefix(prefix)))
    shapes = [tuple(state[f"{name}.weight"].shape) for name in layers]
    what = f"linear layers {prefix}N.weight and {prefix}N.bias that end in one score"
    if not layers:
        raise DIDRError(f"{key}={str(path)!r}: no tensor {prefix}N.weight. Expected {what}.")
    for name, shape, after in zip(layers, shapes, [*shapes[1:], None], strict=True):
        bias = state.get(f"{name}.bias")
        if len(shape) != 2 or bias is None or tuple(bias.shape) != shape[:1]:
            found = None if bias is None else list(bias.shape)
            raise DIDRError(f"{key}={str(path)!r}: {name} has weight {list(shape)} and bias {found}. Expected {what}.")
        if (after[-1] if after else 1) != shape[0]:
            wanted = f"the next layer takes {after[-1]}" if after else "a score is 1"
            raise DIDRError(f"{key}={str(path)!r}: {name} gives {shape[0]} numbers, {wanted}. Expected {what}.")
    return list(zip(layers, shapes, strict=True))


def linear_head(key: str, path: Path, state: State, prefix: str = "layers.") -> nn.Sequential:
    """The layers under ``prefix`` as a frozen float32 module, ``[B, D] -> [B, 1]``.

    Raises:
        DIDRError: see :func:`linear_layers`.
    """
    modules = []
    for name, (out_features, in_features) in linear_layers(key, path, state, prefix):
        layer = nn.Linear(in_features, out_features)
        layer.load_state_dict({kind: state[f"{name}.{kind}"].float() for kind in ("weight", "bias")})
        modules.append(layer)
    return nn.Sequential(*modules).eval().requires_grad_(False)
