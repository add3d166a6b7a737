"""What code costs, counted operator by operator as it runs, on the meta device or on a real one: FLOPs, and bytes alive at each moment.

A dispatch mode sees every operator and follows the storages it makes until they are freed: forward, saved tensors, recomputation under
activation checkpointing and backward are counted as they happen, not by a formula. Assumed on meta: attention is flash attention (no
score matrix), operators need no workspace of their own, the allocator wastes none; :mod:`didr_core.plan.memory` adds a margin for these.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass
class Phase:
    """What one part of an update cost so far."""

    flops: float = 0.0
    """2 x multiply-adds."""
    most: int = 0
    """Most bytes alive at once, of all that was made since counting began."""


class Counter(TorchDispatchMode):
    """FLOPs of what runs inside; bytes of all storages made inside that are still alive, and the most there ever were.

    :meth:`phase` names what is going on: each operator counts for the innermost phase, what runs in none for the phase "".

    The formulas are torch's, but its FlopCounterMode hooks every module and so keeps tensors alive that are free without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phases: dict[str, Phase] = {}
        self._name = ""
        self._seen: set[int] = set()

    @property
    def flops(self) -> float:
        """Of all phases."""
        return sum(p.flops for p in self.phases.values())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Operators inside count for ``name``."""
        outer, self._name = self._name, name
        try:
            yield
        finally:
            self._name = outer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it costs a tenth of a plan

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _makes_new(function):
            out, flops = _new(function, args, kwargs)
        else:  # what it returns may be an input of its own, and that may have been there before
            for a in (*args, *kwargs.values()):
                for t in a if isinstance(a, list) else (a,):
                    if isinstance(t, Tensor):
                        self._know(t.untyped_storage())
            out, flops = _in_place(function, args, kwargs), 0.0
        phase = self.phases.setdefault(self._name, Phase())
        phase.flops += flops
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self._follow(t.untyped_storage())
        phase.most = max(phase.most, self.now)
        return out

    def _know(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is new, and not counted: it is known until it is freed, when another may get its address."""
        key = storage._cdata
        if key in self._seen:
            return False
        self._seen.add(key)
        weakref.finalize(storage, self._seen.discard, key)
        return True

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if self._know(storage):
            size = storage.nbytes()
            self.now += size
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@functools.cache
def _makes_new(function: Any) -> bool:
    """Whether nothing that ``function`` returns is one of its inputs, or a view of one."""
    return not (function._schema.is_mutable or any(r.alias_info for r in function._schema.returns))


def _in_place(function: Any, args: Any, kwargs: Any) -> Any:
    """``function(*args, **kwargs)``; on meta, writing changes nothing."""
    if args and isinstance(args[0], Tensor) and args[0].is_meta and _writes(function):
        return args[0]
    return function(*args, **kwargs)


@functools.cache
def _writes(function: Any) -> bool:
    name = function._schema.name.removeprefix("aten::")
    return name.endswith("_") and name[:-1] in WRITING


ARITHMETIC = {"add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp", "sqrt"}
WRITING = ARITHMETIC | {"copy", "zero", "fill", "uniform", "normal"}
"""Operators that change the values of their first argument and nothing else; their in-place names end in ``_``."""

for _way in ("", "_backward"):  # torch's formulas leave out attention on a CPU: the same as on a GPU
    _on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{_way}")
    flop_registry.setdefault(
        _on_cpu, flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{_way}")]
    )

_KNOWN: dict[Any, tuple[list[Any], float]] = {}


def _new(function: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
    """``function(*args, **kwargs)`` and its FLOPs. On meta both depend on shapes alone, and operators are slow there: asked once."""
    key = function, _shapes(args), _shapes(tuple(kwargs.items()))
    if key in _KNOWN:
        known, flops = _KNOWN[key]
        made = [k and torch.empty_strided(k[0], k[1], dtype=k[2], device="meta") for k in known]
        return tuple(made) if len(function._schema.returns) > 1 else made[0], flops
    out = function(*args, **kwargs)
    formula = flop_registry.get(function._overloadpacket)
    flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
    outs = out if isinstance(out, tuple | list) else (out,)
    if all(t is None or (isinstance(t, Tensor) and t.is_meta) for t in outs):
        _KNOWN[key] = [t if t is None else (t.shape, t.stride(), t.dtype) for t in outs], flops
    return out, flops


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_shapes, value)) if isinstance(value, tuple | list) else value


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
