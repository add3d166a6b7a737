"""The switch: LoRA adapters of several roles on one frozen base, which of them is on for a call, and what they merge into.

A role is an ``nn.Module`` like any other: called, it is its base with its own adapter on; its parameters, its ``state_dict`` and so its
checkpoints are the adapter alone. peft makes the layers, names and merges them. Its switch is not used: ``set_adapter`` and
``disable_adapter`` flip ``requires_grad``, and a backward pass after a switch then loses gradients without a word. Here all adapters stay
trainable and a call turns them on and off around itself (:class:`Mode`); activation checkpointing re-enters the mode that the forward
pass had. Nor is its forward pass, whose look-ups, casts and six operators a layer cost the host more than the network itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from didr_core.config import Roles
from didr_core.networks.recompute import recomputed
from didr_core.types import Backbone, DIDRError

ADAPTER, KOHYA = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"
"""Files of an adapter in an export: in diffusers' names, and in those of kohya's scripts."""
LORA_SETTINGS = (
    *("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "peft_type"),
    *("rank_pattern", "alpha_pattern", "use_dora", "lora_bias"),
)
"""What an adapter's file says of itself."""


class Mode:
    """What a network is being called as: which adapter is on, and which weights are frozen for the call."""

    _all: ClassVar[weakref.WeakKeyDictionary[nn.Module, Mode]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.switch: list[str | None] = [None]  # the role, in the hands of every LoRA layer
        self.frozen: tuple[nn.Parameter, ...] = ()
        self.keeps: tuple[str | None, ...] = ()  # roles whose own updates keep their activations: nothing is recomputed
        self._weights: weakref.WeakKeyDictionary[nn.Module, list[nn.Parameter]] = weakref.WeakKeyDictionary()
        self.sharded: weakref.ref[nn.Module] | None = None  # the network, where it is split over workers

    @property
    def role(self) -> str | None:
        """Whose adapter is on; None: nobody's."""
        return self.switch[0]

    @classmethod
    def of(cls, network: nn.Module) -> Mode:
        """The mode of ``network``, made when first asked for."""
        return cls._all.setdefault(network, cls())

    @contextlib.contextmanager
    def __call__(self, role: str | None, frozen: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        """Be ``role`` (None: the bare base) inside; no gradient reaches the weights in ``frozen`` from calls made inside."""
        before = self.role, self.frozen
        network = self.sharded() if self.sharded and frozen else None
        # recomputation finds blocks of a split network gathered already: as parameters of their own
        off = [p for p in (*frozen, *(network.parameters() if network else ())) if p.requires_grad]
        self._enter(role, tuple(frozen))
        for p in off:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in off:
                p.requires_grad_(True)
            self._enter(*before)

    def _enter(self, role: str | None, frozen: tuple[nn.Parameter, ...]) -> None:
        self.switch[0], self.frozen = role, frozen

    def checkpoint(self, function: Any, *args: Any) -> Any:
        """For ``enable_gradient_checkpointing``: recomputed in the mode of now, whatever is on when backward comes by."""
        role, frozen = self.role, self.frozen
        if role in self.keeps and not frozen:
            return function(*args)

        def run(*inputs: Any) -> Any:
            with self(role, frozen):
                return function(*inputs)

        plain = isinstance(function, nn.Module) and all(isinstance(v, Tensor | str | float | int | None) for v in args)
        if self.sharded or not plain:  # weights of a split network are others at each call
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        if not torch.is_grad_enabled():
            return function(*args)
        weights = self._weights.get(function) or self._weights.setdefault(function, list(function.parameters()))
        return recomputed(run, args, any(p.requires_grad for p in weights))


class LoRA(nn.Module):
    """One role on a shared frozen base: its parameters are its adapter's, named by layer (dots written as slashes)."""

    def __init__(self, base: nn.Module, role: str | None) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple: not a submodule, so not in parameters() or state_dict()
        self.role = role
        self.frozen = False
        if role is not None:
            for name, parameter in base.named_parameters():
                if f".{role}." in name:
                    self.register_parameter(name.replace(f".{role}.", ".").replace(".", "/"), parameter)

    @property
    def base(self) -> nn.Module:
        """The network that all its roles share."""
        return self._base[0]

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def dtype(self) -> torch.dtype:
        """The base's."""
        return next(self.base.parameters()).dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, as this role."""
        with Mode.of(self.base)(self.role, tuple(self.parameters()) if self.frozen else ()):
            return self.base(*args, **kwargs)


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights of ``network`` from calls made inside, nor from their recomputation."""
    if isinstance(network, LoRA):
        network.frozen = True
        try:
            yield
        finally:
            network.frozen = False
    else:
        with Mode.of(network)(None, [p for p in network.parameters() if p.requires_grad]):
            yield


def add_adapter(base: nn.Module, role: str, roles: Roles, backbone: Backbone, seed: int) -> LoRA:
    """A new adapter of ``base``, in its type and on its device; all of the base's own weights are frozen.

    Raises:
        DIDRError: no layer of the base matches ``roles.targets``.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = roles.targets or backbone.lora_targets or _matrices(base)
    settings = LoraConfig(
        r=roles.rank,
        lora_alpha=roles.alpha or roles.rank,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    trained = [p for p in base.parameters() if p.requires_grad]
    # adapters are drawn on the CPU, wherever the base is; in a plan, nowhere
    hollow = any(p.is_meta for p in base.parameters())
    with torch.random.fork_rng(), torch.device("meta" if hollow else "cpu"):
        torch.manual_seed(seed)
        try:
            if not targets:
                raise ValueError("it has no linear or convolution layer")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
                inject_adapter_in_model(settings, base, role)
        except ValueError as error:
            raise DIDRError(
                f"roles.targets={roles.targets!r}: no layer of {type(base).__name__} takes an adapter ({str(error)[:200]}). Name endings "
                "of its layers' names, or use roles.generator=full and roles.assistant=full."
            ) from error
    base.requires_grad_(False)  # peft has just frozen the adapters that were there
    for p in trained:
        p.requires_grad_(True)
    mode = Mode.of(base)
    mode._weights.clear()
    for layer in base.modules():
        if isinstance(layer, LoraLayer):
            _quicken(layer, role, mode.switch)
    adapter = LoRA(base, role)
    return adapter.to(adapter.dtype).requires_grad_(True)  # peft leaves those of a hollow base in float32


def _quicken(layer: Any, role: str, switch: list[str | None]) -> None:
    """Give a layer of peft's our forward pass, and tell it of its adapter ``role``."""
    layer.__class__ = _quick(type(layer))  # type: ignore[arg-type]
    scale = layer.scaling[role]
    layer.__dict__.setdefault("adapters", {})[role] = (layer.lora_A[role].weight, layer.lora_B[role].weight, scale)
    layer.__dict__["switch"] = switch


def _adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x W' + b + scale (x down') up'``, and what its gradients need: ``x`` by rows, ``x down'``."""
    rows = x.reshape(-1, x.shape[-1])
    low = rows.to(down.dtype) @ down.t()  # averages are float32 on a bfloat16 base
    out = torch.addmm(F.linear(rows, weight, bias).to(up.dtype), low, up.t(), alpha=scale)
    return out.to(x.dtype).view(*x.shape[:-1], -1), rows, low


class _Adapted(torch.autograd.Function):
    """:func:`_adapted` of one precision and a frozen ``weight``, for half of the host's time that autograd's own way there takes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Any:
        out, rows, low = _adapted(x, weight, bias, down, up, scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, low, weight, down, up = ctx.saved_tensors
        to_x, _, _, to_down, to_up, _ = ctx.needs_input_grad
        out = gradients[0].reshape(-1, up.shape[0])
        scaled = out if ctx.scale == 1 else out * ctx.scale
        lower = scaled @ up
        back = torch.addmm(out @ weight, lower, down).view(*gradients[0].shape[:-1], -1) if to_x else None
        return back, None, None, lower.t() @ rows if to_down else None, scaled.t() @ low if to_up else None, None


@functools.cache
def _quick(kind: Any) -> type[Any]:
    """A class of peft's layers with the forward pass ``base(x) + scale up(down(x))`` in as few operators as there can be."""

    def linear(self: Any, x: Tensor) -> Tensor:
        layer, adapter = self.base_layer, self.adapters.get(self.switch[0])
        if adapter is None:
            return layer(x)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and x.dtype == adapter[0].dtype and not torch.compiler.is_compiling():
            return _Adapted.apply(x, layer.weight, layer.bias, *adapter)  # type: ignore[no-any-return, no-untyped-call]
        return _adapted(x, layer.weight, layer.bias, *adapter)[0]

    def convolution(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        adapter = self.adapters.get(self.switch[0])
        if adapter is None:
            return out
        down, up, scale = adapter
        layer = self.base_layer
        low = torch.conv2d(x.to(down.dtype), down, None, layer.stride, layer.padding, layer.dilation)
        return out.to(up.dtype).add(torch.conv2d(low, up), alpha=scale).to(out.dtype)

    if hasattr(kind, "quick"):
        return kind
    from peft.tuners.lora import Linear

    return type(kind.__name__, (kind,), {"quick": True, "forward": linear if issubclass(kind, Linear) else convolution})


def _matrices(base: nn.Module) -> list[str]:
    """Every linear and convolution layer of the base, as it was before adapters."""
    names = (name for name, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in name)
    return [name.removesuffix(".base_layer") for name in names]


def plain(network: nn.Module) -> nn.Module:
    """The same function without adapters: a role merged into a float32 copy of its base on the CPU, under the base's own names."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(network, LoRA):
        return network
    held = (*network.base.parameters(), *network.base.buffers())
    merged = copy.deepcopy(network.base, {id(t): _on_cpu(t) for t in held})  # no second copy on the GPU
    merged = merged.float()  # before the sum: small changes vanish in a bfloat16 one
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoraLayer):
            if network.role is not None:
                layer.merge(adapter_names=[network.role])
            parent, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(parent), leaf, layer.get_base_layer())
    return merged.requires_grad_(False)


def _on_cpu(value: Tensor) -> Tensor:
    copied = value.detach().to("cpu", copy=True)
    return nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied


def save_adapter(network: nn.Module, folder: Path) -> None:
    """Add a role's adapter to an exported pipeline folder, float32, with its scale: ``pipe.load_lora_weights(folder)`` on its base; of a
    UNet's also a file in the names of kohya's scripts, as A1111 and ComfyUI read them.

    Does nothing for full networks and for families that diffusers has no pipeline of.
    """
    import diffusers
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    part = next((p for p in ("unet", "transformer") if (folder / p).is_dir()), None)
    if not isinstance(network, LoRA) or network.role is None or part is None:
        return
    state = get_peft_model_state_dict(network.base, adapter_name=network.role)
    layers = {k: v.detach().float().cpu().contiguous() for k, v in state.items()}
    pipeline = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    # without the metadata diffusers would take alpha = rank; older releases of peft know no more than these
    settings = network.base.peft_config[network.role].to_dict()  # type: ignore[index, union-attr, operator]
    metadata = {key: sorted(v) if isinstance(v := settings[key], set | list) else v for key in LORA_SETTINGS}
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata})
    if part == "unet":
        save_file(_in_kohyas_names(layers, settings["lora_alpha"]), folder / KOHYA, metadata={"format": "pt"})


def _in_kohyas_names(layers: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    out = {}
    for name, value in layers.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        layer = "lora_unet_" + layer.replace(".", "_")
        out[f"{layer}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value
        out[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return out
