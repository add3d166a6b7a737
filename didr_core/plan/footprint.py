"""What a call of a network costs, counted on the meta device: FLOPs, and bytes alive at each moment. No weights, no GPU.

Every operator that would run is seen by a dispatch mode, which follows the storages it makes until they are freed: forward, saved
tensors, recomputation under activation checkpointing and backward are counted as they happen, not by a formula. Assumed: attention is
flash attention (no score matrix), operators need no workspace of their own, the allocator wastes none; :mod:`didr_core.plan.memory` adds a
margin for these.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """One sample through a network. Bytes on top of weights and inputs; FLOPs are 2 x multiply-adds."""

    forward: float
    """FLOPs of the forward pass."""
    backward: float
    """FLOPs of the backward pass, recomputation included; 0 without gradient."""
    kept: int
    """Bytes alive between forward and backward."""
    peak: int
    """Most bytes alive at once, in forward or backward."""

    def times(self, samples: float) -> Cost:
        """Of a batch: everything is proportional to it."""
        return Cost(
            self.forward * samples, self.backward * samples, round(self.kept * samples), round(self.peak * samples)
        )

    def plus(self, other: Cost) -> Cost:
        """One after the other, both kept for one backward pass."""
        kept = self.kept + other.kept
        peak = max(self.peak, self.kept + other.peak)
        return Cost(self.forward + other.forward, self.backward + other.backward, kept, peak)


NOTHING = Cost(0.0, 0.0, 0, 0)


class Counter(TorchDispatchMode):
    """FLOPs of what runs inside; bytes of all storages made inside that are still alive, and the most there ever were.

    The formulas are torch's, but its FlopCounterMode hooks every module and so keeps tensors alive that are free without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.now = self.most = 0
        self._seen: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Weights and inputs, which were there before."""
        self._seen |= {t.untyped_storage()._cdata for t in tree_leaves(tensors) if isinstance(t, Tensor)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs := kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._follow(t.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


def measure(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    weights: bool | None,
    checkpointing: bool = False,
) -> Cost:
    """Run ``network`` on the meta device.

    Args:
        args, kwargs: a call with one sample; the first tensor in ``args`` is the latent.
        weights: gradients of the weights (True), of the latent through frozen weights (False), or none at all (None).
        checkpointing: with activation checkpointing, where the network has it.
    """
    network.requires_grad_(bool(weights))
    _checkpointing(network, checkpointing)
    latent = next(t for t in tree_leaves(args) if isinstance(t, Tensor))
    count = Counter()
    count.ignore([list(network.parameters()), list(network.buffers()), args, dict(kwargs)])
    handles = [p.register_post_accumulate_grad_hook(_drop) for p in network.parameters() if weights]
    latent.requires_grad_(weights is False)
    try:
        with flash_attention(), count, torch.set_grad_enabled(weights is not None):
            out = network(*args, **kwargs)
            kept, forward = count.now, count.flops
            if weights is not None:
                result = next(t for t in tree_leaves(_tensors(out)) if isinstance(t, Tensor))
                result.sum().backward()
        return Cost(forward, count.flops - forward, kept, count.most)
    finally:
        for handle in handles:
            handle.remove()
        latent.requires_grad_(False)
        latent.grad = None
        _checkpointing(network, False)


def _tensors(out: Any) -> Any:
    return out.to_tuple() if hasattr(out, "to_tuple") else out


def _drop(p: Tensor) -> None:
    """Gradients are counted with the weights."""
    p.grad = None


def _checkpointing(network: nn.Module, on: bool) -> None:
    if on and hasattr(network, "enable_gradient_checkpointing"):

        def again(function: Callable[..., Any], *inputs: Any) -> Any:
            return checkpoint(function, *inputs, use_reentrant=False)

        network.enable_gradient_checkpointing(gradient_checkpointing_func=again)  # type: ignore[operator]
    elif hasattr(network, "disable_gradient_checkpointing"):
        network.disable_gradient_checkpointing()  # type: ignore[operator]


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Attention on the meta device as the flash kernel does it; torch would take the kernel that keeps the score matrix."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]  # type: ignore[no-any-return]

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield
