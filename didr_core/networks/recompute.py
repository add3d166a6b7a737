"""Activation checkpointing of blocks without randomness.

torch's own (`torch.utils.checkpoint`) hooks every tensor that is saved inside a block, in Python, and stashes and compares more than an
evaluated network needs: on SDXL it costs the host as much as the network itself (`python -m benchmarks.host_cost`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def recomputed(run: Callable[..., Any], inputs: Sequence[Any], weights: Sequence[nn.Parameter]) -> Any:
    """``run(*inputs)``, computed again when gradients come by; nothing inside is kept until then.

    Args:
        inputs: tensors, or plain values: no containers, in which a tensor would lose its gradient.
        weights: what ``run`` takes gradients to, whoever asks for them (``backward``, ``autograd.grad``).
    """
    return _Recomputed.apply(run, len(inputs), *inputs, *weights)  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, count: int, *inputs: Any) -> Any:
        ctx.run, ctx.count = run, count
        ctx.plain = [None if isinstance(v, Tensor) else v for v in inputs[:count]]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        return run(*inputs[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                v if v is None else v.detach().requires_grad_(n)
                for v, n in zip(saved[: ctx.count], needed, strict=False)
            ]
            out = ctx.run(*(v if v is not None else p for v, p in zip(leaves, ctx.plain, strict=True)))
        asked = [v for v, n in zip((*leaves, *saved[ctx.count :]), needed, strict=True) if n]
        found = iter(torch.autograd.grad(out, asked, gradients, allow_unused=True))
        return None, None, *(next(found) if n else None for n in needed)
