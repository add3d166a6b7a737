"""What a reward must give back, at every call and wherever it runs: on a trainer, in an actor, in an evaluation.

A score of another shape would be broadcast and trained on. Whether scores are finite is looked at where the prompts are known
(`train/learner.py`, `evaluate/evaluator.py`): it needs their values, which a GPU may not have yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from didr_core.types import DIDRError, Tensors


def kept(reward: Any, name: str) -> Any:
    """``reward``, whose `score`, `details` and `prepare` raise DIDRError with what came and what was expected."""
    reward.score = _scored(reward.score, name, "score", reward.differentiable)
    reward.prepare = _prepared(reward.prepare, name)
    if reward.details is not None:
        reward.details = _scored(reward.details, name, "details", reward.differentiable, first=True)
    return reward


def _scored(
    method: Callable[..., Any], name: str, called: str, differentiable: bool, first: bool = False
) -> Callable[[Tensor, Tensors], Any]:
    def checked(images: Tensor, inputs: Tensors) -> Any:
        answer = method(images, inputs)
        score, count = answer[0] if first else answer, len(images)
        if not isinstance(score, Tensor) or score.shape != (count,) or not score.is_floating_point():
            raise DIDRError(
                f"reward {name!r}: {called}() returned {_told(score)} for {count} picture(s); expected a float tensor of shape [{count}],"
                " one score a picture."
            )
        if differentiable and images.requires_grad and torch.is_grad_enabled() and not score.requires_grad:
            raise DIDRError(
                f"reward {name!r}: {called}() returned a score without a gradient, and says differentiable = True. Compute it in torch"
                " without no_grad, detach or item; or say differentiable = False, which needs drp.estimator=importance."
            )
        return answer

    return checked


def _prepared(method: Callable[..., Any], name: str) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    def checked(prompts: Sequence[str]) -> dict[str, Tensor]:
        inputs: Any = method(prompts)
        for key, value in inputs.items() if isinstance(inputs, dict) else [("", inputs)]:
            if isinstance(value, Tensor) and key and value.shape[:1] == (len(prompts),):
                continue
            raise DIDRError(
                f"reward {name!r}: prepare() returned {_told(value)}{f' as {key!r}' if key else ''} for {len(prompts)} prompt(s); expected"
                f" a dict of tensors {{name: [{len(prompts)}, ...]}}, empty where the score needs no text."
            )
        return inputs  # type: ignore[no-any-return]

    return checked


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {str(value.dtype).removeprefix('torch.')},"
    return f"{type(value).__name__} {str(value)[:40]}"
