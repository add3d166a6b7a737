"""Averaging over workers: one process, or a torch.distributed process group that somebody else has set up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from didr_core.networks.optim import in_parts

BUCKET = 2**25
"""Elements a collective call: 128 MiB of float32."""


class Single:
    """One process: nothing to average."""

    rank = 0
    world_size = 1

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """No-op."""


class ProcessGroup:
    """Data parallelism over the default process group (gloo on CPU, NCCL on GPU).

    Gradients are averaged by hand, flattened into one call, rather than by wrapping networks in DDP: generator and assistant take turns,
    and networks with roles (LoRA adapters on one base) leave parameters unused that DDP would wait for.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average in place over ranks. Tensors of one dtype travel together, :data:`BUCKET` elements at a time; bfloat16 as float32."""
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            for bucket in in_parts((t for t in tensors if t.dtype == dtype), BUCKET):
                flat = torch.cat([t.reshape(-1).to(wide) for t in bucket])
                dist.all_reduce(flat)
                flat /= self.world_size
                offset = 0
                for t in bucket:
                    t.copy_(flat[offset : offset + t.numel()].view_as(t))
                    offset += t.numel()


def current() -> Single | ProcessGroup:
    """What this process is part of."""
    return ProcessGroup() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else Single()
