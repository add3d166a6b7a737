"""Random numbers tied to samples, not to workers: the same global batch gives the same update however many ranks share it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Draws keyed by (seed, sample index, tag). Stateless: nothing to save in a checkpoint."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _generator(self, index: int, tag: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{index}/{tag}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, index: Tensor | Sequence[int], shape: Sequence[int], tag: str) -> Tensor:
        """``[B, *shape]`` standard normal, float32, on the index's device."""
        rows = [torch.randn(tuple(shape), generator=self._generator(int(i), tag)) for i in index]
        return torch.stack(rows).to(index.device if isinstance(index, Tensor) else "cpu")

    def uniform(self, index: Tensor | Sequence[int], tag: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``[B]`` uniform in [low, high), float32."""
        rows = [torch.rand((), generator=self._generator(int(i), tag)) for i in index]
        return (low + (high - low) * torch.stack(rows)).to(index.device if isinstance(index, Tensor) else "cpu")
