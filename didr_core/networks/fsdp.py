"""Fully trained networks split over workers (FSDP2), and checkpoints that every worker writes its part of while training goes on.

With ``roles.fsdp`` each of N workers holds 1/N of the weights, gradients, moments, masters and average of every network that trains in
full, and gathers one block at a time for a call. Frozen networks stay whole: they are called most, and need not be called equally often
on every worker, which collective calls do not forgive. Adapters stay whole, too: they are small.

A checkpoint is the tree of :meth:`Learner.state_dict` with a mark in place of each split tensor; these lie beside it in a folder of
torch.distributed.checkpoint. Read back, it fits any number of workers, one without a process group among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from didr_core.types import DIDRError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FOLDER = "shards"
MARK = "didr:shard:"


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


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of a split network on the CPU of rank 0; empty elsewhere. Every worker must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options)  # type: ignore[return-value]


def take_out(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """``tree`` with a mark in place of each split tensor, and these by name. One that is there twice is taken once."""
    taken: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def mark(path: Any, value: Any) -> Any:
        if not is_sharded(value):
            return value
        name = names.setdefault(id(value), keystr(path))
        taken[name] = value.detach()
        return MARK + name

    return tree_map_with_path(mark, tree), taken


def put_back(folder: Path, tree: Any, live: Any) -> Any:
    """``tree`` with its marks replaced by what ``folder`` holds, and every tensor split (or not) as its counterpart in ``live`` is.

    Split counterparts are read into: a GPU has no room for a second copy. All workers must call it where anything in ``live`` is split.

    Raises:
        OSError, RuntimeError: what ``folder`` should hold is not there, or not readable.
    """
    read: dict[str, Tensor] = {}

    def room(value: Any, counterpart: Any) -> None:
        if _is_mark(value):
            sharded = is_sharded(counterpart)
            read[value] = counterpart.detach() if sharded else torch.empty_like(counterpart, device="cpu")

    def value_of(value: Any, counterpart: Any) -> Any:
        if _is_mark(value):
            return read[value]
        return _sharded_like(value, counterpart) if is_sharded(counterpart) else value

    tree_map(room, tree, live)
    if read:
        import torch.distributed.checkpoint as dcp

        found = {name.removeprefix(MARK): value for name, value in read.items()}
        with _plain_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in a single process")  # it is what we want
            dcp.load(found, checkpoint_id=folder / FOLDER, no_dist=not any(map(is_sharded, found.values())))
    return tree_map(value_of, tree, live)


def _is_mark(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(MARK)


def _sharded_like(value: Tensor, counterpart: DTensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # no communication: every worker has read the same
    mesh, placements = counterpart.device_mesh, counterpart.placements
    return distribute_tensor(value.to(counterpart.device), mesh, placements, src_data_rank=None)


class Writer:
    """Writes split tensors in the background, one checkpoint at a time. Every worker has one and calls it equally often."""

    def __init__(self) -> None:
        # a group of its own, and on CPUs: its calls come from a thread, between those of training
        self._group = torch.distributed.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def start(self, folder: Path, tensors: dict[str, Tensor], then: Callable[[], None]) -> None:
        """Copy ``tensors`` aside and return; they are written to ``folder/shards``. ``then`` follows when those of all workers are there.

        Raises:
            OSError, RuntimeError: see :meth:`wait`; of the checkpoint before.
        """
        import torch.distributed.checkpoint as dcp

        self.wait()
        # nothing is copied ahead: the tensors are on the CPU by then, and its thread would open a context on the first GPU
        files = dcp.FileSystemWriter(folder / FOLDER, per_thread_copy_ahead=0)
        written = dcp.async_save(tensors, storage_writer=files, process_group=self._group)

        def follow() -> None:
            written.result()  # type: ignore[union-attr]
            then()

        self._pending = self._thread.submit(follow)

    def wait(self) -> None:
        """Until what was started is on disk.

        Raises:
            OSError, RuntimeError: a worker could not write.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with _plain_errors():
                pending.result()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The error of the worker that failed, in place of torch's summary of all workers (which is no Exception)."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reason = next((failure[0] for failure in error.failures.values()), None)
        raise (reason if isinstance(reason, OSError | RuntimeError) else RuntimeError(str(error))) from error
