"""Fewer launches: the blocks that a network repeats, compiled with `torch.compile` while gradients are made (README.md).

A network's class names its blocks (diffusers' ``_repeated_blocks``). One compiled function serves all blocks of a shape called in one way
(role, frozen weights, gradients on or off), which keeps guards short and the number of graphs small and fixed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, TypeVar

import torch
from torch import nn

from didr_core.networks.lora import LoRA, Mode
from didr_core.types import DIDRError

Compile = Literal["auto", "none", "blocks"]
Result = TypeVar("Result")
BACKEND = "inductor"
MANY = 16
"""Repeated blocks from which on `auto` compiles: SDXL has 70, Z-Image 34. Smaller networks are done before they are compiled."""


class Blocks:
    """The repeated blocks of ``networks``, compiled inside :meth:`run`; as they were where ``how`` or the device says so, or it fails."""

    def __init__(self, networks: Iterable[nn.Module], how: Compile, device: torch.device) -> None:
        self.on = False  # now
        self.why_not: str | None = None  # compiled, ever
        roots = {id(n): n for n in (v.base if isinstance(v, LoRA) else v for v in networks)}.values()
        self.split = any(Mode.of(root).sharded for root in roots)
        blocks = [(block, root) for root in roots for block in repeated(root)]
        pays = device.type == "cuda" and len(blocks) >= MANY * len(roots)
        if how == "none" or device.type == "meta" or (how == "auto" and not pays):
            self.why_not = "not asked for"
        elif not blocks:
            self.why_not = f"{type(next(iter(roots))).__name__} names no _repeated_blocks"
            self._warn()
        else:
            kinds: dict[Any, _Kind] = {}
            for block, root in blocks:
                shape = type(block), tuple((p.shape, p.dtype) for p in block.parameters())
                kind = kinds.setdefault((id(root), shape), _Kind(self, Mode.of(root), type(block).forward))
                block.__class__ = _switched(type(block))  # type: ignore[arg-type]
                block.__dict__["kind"] = kind

    def run(self, work: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """``work()`` with compiled blocks. Where that fails, ``undo()`` and ``work()`` without them, now and from now on, and say why.

        Raises:
            DIDRError: it fails where networks are split over workers, of which one cannot begin again alone.
        """
        if self.why_not:
            return work()
        self.on = True
        try:
            return work()
        except DIDRError:
            raise
        except Exception as error:  # compilers of backward passes raise whatever they like
            why = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
            if self.split:
                raise DIDRError(
                    f"train.compile: a step with compiled blocks failed ({why}), and workers that share a network cannot begin it again "
                    "one by one. If the message does not say what to mend, use train.compile=none."
                ) from error
            self.why_not = why
        finally:
            self.on = False
        undo()
        done = work()
        self._warn()  # had it failed again, compiling would not be why
        return done

    def _warn(self) -> None:
        warnings.warn(
            f"train.compile: blocks are not compiled ({self.why_not}); training goes on without.", stacklevel=3
        )


def repeated(network: nn.Module) -> list[nn.Module]:
    """Its blocks of the classes that ``_repeated_blocks`` names, also where they are split over workers."""
    names = set(getattr(network, "_repeated_blocks", None) or ())
    return [m for m in network.modules() if names & {c.__name__ for c in type(m).__mro__}]


class _Kind:
    """Blocks of one network and shape, and the functions compiled for them by how they are called."""

    def __init__(self, blocks: Blocks, mode: Mode, forward: Callable[..., Any]) -> None:
        self.blocks, self.mode, self.forward = blocks, mode, forward
        self.variants: dict[Any, Callable[..., Any]] = {}

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.blocks.on:
            return self.forward(block, *args, **kwargs)
        key = self.mode.role, bool(self.mode.frozen), torch.is_grad_enabled()
        function = self.variants.get(key)
        if function is None:
            function = self.variants[key] = _compile(self.forward)
        return function(block, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # of no block in particular


def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(block, *args, **kwargs)

    call.__code__ = call.__code__.replace()  # graphs are kept, counted and searched by code object: one of its own
    return torch.compile(call, backend=BACKEND)


@functools.cache
def _switched(kind: Any) -> Any:
    """A class of blocks that asks its :class:`_Kind` how to compute."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.kind(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})
