"""Fully trained networks split over workers (FSDP2): each holds 1/N of them, and gathers one block at a time for a call.

Frozen networks stay whole: they need not be called equally often on every worker, which collective calls do not forgive. So do adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from didr_core.types import DIDRError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def units(network: nn.Module) -> list[nn.Module]:
    """What is gathered together: blocks that the class names (diffusers' ``_no_split_modules``), inner ones first, then the rest."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    blocks = [m for m in network.modules() if type(m).__name__ in names and m is not network]
    return [*reversed(blocks), network]  # modules() gives parents before children


def unit_sizes(network: nn.Module) -> Iterator[int]:
    """Parameters of each of :func:`units`, without those of a unit inside it."""
    seen: set[nn.Parameter] = set()
    for unit in units(network):
        own = [p for p in unit.parameters() if p not in seen]
        seen.update(own)
        yield sum(p.numel() for p in own)


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` itself, its parameters now :class:`DTensor` over the default process group, on ``device``; it may come from the CPU.

    Backward passes average gradients over workers, in float32.

    Raises:
        DIDRError: two layers share a weight, which would be split twice.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for p in network.parameters():
        p.data = p.data.contiguous()  # parts are rows; channels_last is lost
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    if len(names) != len(list(network.parameters())):
        raise DIDRError(f"roles.fsdp=true: layers of {type(network).__name__} share weights. Use roles.fsdp=false.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for unit in units(network):
        # the rest, too, is given back after each call: who reads parameters between calls then always finds the split ones
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    return network


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether ``value`` is this worker's part of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """All of a tensor, on every worker. Every worker must call it."""
    return value.full_tensor() if is_sharded(value) else value


def whole_state(network: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """The state of a split network on the CPU of rank 0, or of all; empty elsewhere. Every worker must call it."""
    if everywhere:
        return {name: whole(value).detach().cpu() for name, value in network.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options)  # type: ignore[return-value]


def fill(live: Tensor, value: Tensor) -> None:
    """Copy ``value``, which is whole and on the CPU, into ``live``: all of it, or this worker's part. No communication.

    Raises:
        ValueError: they differ in shape.
    """
    if live.shape != value.shape:
        raise ValueError(f"expected a tensor of {tuple(live.shape)}, got {tuple(value.shape)}")
    if is_sharded(live):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(live.device), live.device_mesh, live.placements, src_data_rank=None)
    live.copy_(value)
