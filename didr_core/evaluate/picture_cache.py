"""Latents kept on disk by content key, for models that are dear to sample (the many-step teacher) and do not change between runs."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAMPLED = 4096  # values looked at per tensor: enough to see any training, cheap at billions of parameters


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's weights: names, shapes, dtypes and up to 4,096 evenly spread values of each tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
        flat = value.detach().reshape(-1)
        part = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", torch.float32).contiguous()
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:32]


class LatentCache:
    """``{key: latent [*shape]}`` of one sampler, in one safetensors file; a corrupt or foreign file counts as empty."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, tuple(shape)
        self._rows: dict[str, Tensor] = {}
        self._changed, self._saved = False, time.monotonic()
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    rows, keys = file.get_tensor("latents"), json.loads(file.metadata()["keys"])
                if tuple(rows.shape[1:]) == self.shape and len(rows) == len(keys):
                    self._rows = dict(zip(keys, rows, strict=True))
            except (SafetensorError, KeyError, TypeError, ValueError):
                self._rows = {}

    @classmethod
    def open(cls, folder: Path | None, key: str | None, shape: tuple[int, ...]) -> LatentCache | None:
        """The cache of the sampler with that content key; None without a folder or a key."""
        if folder is None or key is None:
            return None
        return cls(Path(folder) / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors", shape)

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self._rows

    def __getitem__(self, key: str) -> Tensor:
        return self._rows[self._name(key)]

    def __setitem__(self, key: str, latent: Tensor) -> None:
        self._rows[self._name(key)] = latent
        self._changed = True

    def __len__(self) -> int:
        return len(self._rows)

    def save(self, every: float = 0.0) -> None:
        """Write what is new, atomically (two runs may share a cache: the later one wins, nothing breaks).

        With ``every`` seconds, only when the last write lies that far back: for calls inside a long loop.
        """
        if not self._changed or time.monotonic() - self._saved < every:
            return
        self._saved = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file({"latents": torch.stack(list(self._rows.values()))}, part, {"keys": json.dumps(list(self._rows))})
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self._changed = False

    @staticmethod
    def _name(key: str) -> str:
        return hashlib.sha256(key.encode()).hexdigest()[:24]
