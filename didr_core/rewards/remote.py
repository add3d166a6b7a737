"""A reward that is scored somewhere else: pictures go out, and ``(score, gradient)`` of every picture come back. No Ray here.

One stateless call gives both, so nothing is kept where they are computed, anybody of a pool may answer, and who dies is replaced by asking
another. The trainer's graph ends at the pictures; :class:`_Known` puts the gradient that came back into it. Where only scores are wanted
(baselines, evaluations, the log) only scores are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from didr_core.types import DIDRError, Scored, Tensors

Graded = tuple[Tensor, Tensor | None]
"""``score [B]``, and ``weight * d score / d picture`` ``[B, 3, H, W]`` where a weight was sent."""
Submit = Callable[[Tensor, Tensors, Tensor | None], Callable[[], Graded]]
"""Sends ``(pictures [B, 3, H, W] float32, inputs, weight [B] or None)``, all on the CPU; what it gives waits for the answer."""


class RemoteReward:
    """The reward as a trainer sees it, its model being behind ``submit`` and ``prepare``."""

    details: Callable[[Tensor, Tensors], Scored] | None = None
    features: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self, submit: Submit, prepare: Callable[[Sequence[str]], dict[str, Tensor]], differentiable: bool = True
    ) -> None:
        self.submit, self.prepare, self.differentiable = submit, prepare, differentiable

    def check(self) -> None:
        """Preflight has looked at the files; the model is elsewhere."""

    def tokenizers(self) -> None:
        """As :meth:`check`."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """As :meth:`check`."""

    def begin(self, images: Tensor, inputs: Tensors, weight: Tensor | None = None) -> Callable[[], Scored]:
        """Send ``images [B, 3, H, W]``; the returned function waits for ``score [B]``, differentiable in the images where they are.

        Args:
            weight: ``[B]``, the gradient of the loss in each score. Any other one that comes later is honoured too, by its ratio to this
                one; equal ones give, bit for bit, the gradient of a reward in the same graph, whose rounding depends on it.

        Raises:
            DIDRError: (waiting) what came back has another shape.
        """
        graded = self.differentiable and images.requires_grad and torch.is_grad_enabled()
        count, device = len(images), images.device
        known = torch.ones(count, device=device) if weight is None else weight.detach().expand(count)
        sent = images.detach().float().cpu(), {name: value.cpu() for name, value in inputs.items()}
        wait = self.submit(*sent, known.cpu() if graded else None)

        def answer() -> Scored:
            score, gradient = wait()
            if score.shape != (count,) or (graded and (gradient is None or gradient.shape != images.shape)):
                raise DIDRError(
                    f"reward: {count} pictures of shape {list(images.shape[1:])} were sent, and scores of shape {list(score.shape)} and "
                    f"gradients of shape {None if gradient is None else list(gradient.shape)} came back; expected one of each a picture."
                )
            score = score.to(device)
            return (_Known.apply(images, score, gradient.to(images), known) if gradient is not None else score), {}  # type: ignore[no-untyped-call]

        return answer

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to raw scores ``[B]``: sent, and waited for."""
        return self.begin(images, inputs)()[0]


class _Known(torch.autograd.Function):
    """Scores whose gradient in the pictures, times ``weight``, is known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, score: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        return score

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        return gradient * (upstream / weight).view(-1, 1, 1, 1), None, None, None
