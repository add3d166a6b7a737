"""Random numbers tied to samples, not to workers: the same global batch gives the same update however many ranks share it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Draws on the host, keyed by (seed, sample index, tag). Stateless: nothing to save in a checkpoint.

    ``index`` lies on the host, too. ``device`` is where normal numbers are sent to.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, device

    def generator(self, index: int, tag: str) -> torch.Generator:
        """That of one sample's numbers, fresh."""
        digest = hashlib.blake2b(f"{self.seed}/{index}/{tag}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, index: Tensor | Sequence[int], shape: Sequence[int], tag: str) -> Tensor:
        """``[B, *shape]`` standard normal, float32."""
        rows = [torch.randn(tuple(shape), generator=self.generator(int(i), tag)) for i in index]
        return ahead(torch.stack(rows), self.device)

    def uniform(self, index: Tensor | Sequence[int], tag: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``[B]`` uniform in [low, high), float32, on the host: what hangs on times is decided there."""
        rows = [torch.rand((), generator=self.generator(int(i), tag)) for i in index]
        return low + (high - low) * torch.stack(rows)


def ahead(values: Tensor, device: torch.device | str) -> Tensor:
    """``values`` of the host on ``device``; a GPU goes on with what it has, and the host does not wait for it."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values`` on ``device``, copied there once, since the host waits for a copy. Not to be written to."""
    with torch.inference_mode(False):  # whoever asks first: others differentiate
        return torch.tensor(values, device=device, dtype=dtype)
