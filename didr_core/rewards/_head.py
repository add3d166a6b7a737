"""The head of ImageReward and of the LAION aesthetic predictors: a stack of linear layers, published with dropout between them (silent
when scoring) and, in some predictors, ReLU. A state dict says which by its layers' numbers alone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from didr_core.networks.loading import State
from didr_core.types import DIDRError

LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
"""Places of the layers among dropouts alone, and among dropouts and ReLUs (``ava+logos-l14-reluMSE.pth``). One after the other, there is
nothing between them."""


def linear_layers(key: str, path: Path, state: State, prefix: str = "layers.") -> list[tuple[str, tuple[int, ...]]]:
    """``(<prefix>N, shape of its weight)`` of every layer, first to last.

    Raises:
        DIDRError: none, places between which something unknown may lie, a missing bias, widths that do not follow, or two outputs.
    """
    numbers = (name.removeprefix(prefix).removesuffix(".weight") for name in state if name.startswith(prefix))
    places = tuple(sorted(int(number) for number in numbers if number.isdecimal()))
    layers = [f"{prefix}{place}" for place in places]
    shapes = [tuple(state[f"{name}.weight"].shape) for name in layers]
    what = f"linear layers {prefix}N.weight and {prefix}N.bias that end in one score"
    if not layers:
        raise DIDRError(f"{key}={str(path)!r}: no tensor {prefix}N.weight. Expected {what}.")
    if places not in (tuple(range(len(places))), LINEAR[: len(places)], RELU[: len(places)]):
        raise DIDRError(
            f"{key}={str(path)!r}: linear layers at {prefix}{places} leave open what lies between them. Expected 0, 1, 2 "
            f"(nothing), the first of {LINEAR} (dropout) or of {RELU} (ReLU and dropout)."
        )
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
    """The layers under ``prefix``, with their ReLUs, as a frozen float32 module, ``[B, D] -> [B, 1]``.

    Raises:
        DIDRError: see :func:`linear_layers`.
    """
    modules: list[nn.Module] = []
    layers = linear_layers(key, path, state, prefix)
    relu = layers[1:] and layers[1][0] == f"{prefix}{RELU[1]}"
    for name, (out_features, in_features) in layers:
        layer = nn.Linear(in_features, out_features)
        layer.load_state_dict({kind: state[f"{name}.{kind}"].float() for kind in ("weight", "bias")})
        modules += [nn.ReLU(), layer] if relu and modules else [layer]
    return nn.Sequential(*modules).eval().requires_grad_(False)
