"""The unit of rewards: the spread that the starting generator has within a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.types import Batch, DIDRError, NonFiniteError, Parallel


class RewardScale:
    """Within-prompt standard deviation of the starting generator's reward: pooled over every prompt seen so far, on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # sum of batch means of the variance, number of batches

    def update(self, spread: Tensor | None, parallel: Parallel) -> None:
        """Add a batch's variances ``[B]``, all finite (:func:`refuse_non_finite`).

        Raises:
            DIDRError: the reward is the same for all pictures of every prompt so far.
        """
        if spread is None:
            return
        mean = spread.double().mean()
        parallel.mean_([mean])
        self.total += torch.stack([mean, torch.ones_like(mean)])
        if not self.total[0] > 0:
            raise DIDRError(
                "reward: the starting generator's pictures of a prompt all have the same one, in every prompt so far: it has no unit. A "
                "reward that does not depend on the picture cannot be followed; if it rarely does, raise train.batch or baseline.samples."
            )

    @property
    def value(self) -> Tensor:
        """Scalar standard deviation; 1 before any was seen."""
        return torch.where(self.total[1] > 0, (self.total[0] / self.total[1].clamp_min(1)).sqrt(), 1.0).float()

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"total": self.total.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.total.copy_(state["total"])


def refuse_non_finite(batch: Batch, step: int) -> None:
    """Of a batch on the CPU: one would spoil the scale for good, while the TA has its head start unseen.

    Raises:
        NonFiniteError: a baseline or spread is NaN or infinite.
    """
    for known in (batch.baseline, batch.spread):
        if known is not None and not known.isfinite().all():
            bad = [i for i, ok in zip(batch.ids, known.isfinite().tolist(), strict=True) if not ok]
            raise NonFiniteError(
                f"step {step}: non-finite reward of the starting generator's pictures at prompt ids {bad}. The last good checkpoint is "
                "kept. Look at these prompts and the reward."
            )
