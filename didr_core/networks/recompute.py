"""Activation checkpointing of blocks without randomness.

torch's own (`torch.utils.checkpoint`) hooks every tensor that is saved inside a block, in Python, and stashes and compares more than an
evaluated network needs: on SDXL it costs the host as much as the network itself (`python -m benchmarks.host_cost`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recomputed(run: Callable[..., Any], inputs: Sequence[Any], learns: bool) -> Any:
    """``run(*inputs)``, computed again when gradients come by; nothing inside is kept until then.

    Weights inside take their gradients in a backward pass of their own, at once: not one that ``autograd.grad`` asks for.

    Args:
        inputs: tensors, or plain values: no containers, in which a tensor would lose its gradient.
        learns: whether weights inside take gradients.
    """
    return _Recomputed.apply(run, torch.empty(0, requires_grad=learns), *inputs)  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """The empty tensor makes the output require gradients where only weights do: as inputs they would cost the host half as much again."""

    @staticmethod
    def forward(ctx: Any, run: Any, learns: Tensor, *inputs: Any) -> Any:
        ctx.run = run
        ctx.plain = [None if isinstance(v, Tensor) else v for v in inputs]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                v if v is None else v.detach().requires_grad_(n) for v, n in zip(ctx.saved_tensors, needed, strict=True)
            ]
            out = ctx.run(*(v if v is not None else p for v, p in zip(leaves, ctx.plain, strict=True)))
        made = zip(out if isinstance(out, tuple) else (out,), gradients, strict=True)
        learns = [(o, g) for o, g in made if o.requires_grad]
        if learns:  # nothing may, of a block whose weights are other roles'
            torch.autograd.backward([o for o, _ in learns], [g for _, g in learns])
        return None, None, *(v.grad if v is not None else None for v in leaves)
