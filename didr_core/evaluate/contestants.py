"""Ways of making pictures that are compared: one-step generators and the many-step teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from didr_core.config import Config
from didr_core.data.cache import read_arrays, write_arrays
from didr_core.diffusion import sampling
from didr_core.types import Backbone, Condition

SAMPLED = 4096  # values looked at per tensor: enough to see any training, cheap at billions of parameters


@dataclass(frozen=True)
class Contestant:
    """A way of making pictures. With a ``fingerprint`` its latents may be kept on disk: it must change whenever they would."""

    name: str
    sampler: sampling.Sampler
    steps: int = 1
    guidance: float | None = None
    fingerprint: str | None = None

    def latents(
        self, condition: Condition, z: Tensor, names: Sequence[str], cache: Path | None = None
    ) -> tuple[Tensor, int]:
        """Clean latents of ``z [B, ...]``, and how many of them were made afresh; ``names`` say which picture a row is."""
        if cache is None or self.fingerprint is None:
            return self.sampler(condition, z), len(z)
        files = [cache / f"latents-{_hash(self.fingerprint)}" / f"{_hash(name)}.npz" for name in names]
        rows = [None if found is None else torch.from_numpy(found["latent"]) for found in map(read_arrays, files)]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            pick = torch.tensor(missing, device=z.device)
            made = self.sampler(condition.map(lambda v: v[pick]), z[pick]).float().cpu()
            for i, row in zip(missing, made, strict=True):
                rows[i] = row
                write_arrays(files[i], {"latent": row.numpy()})
        return torch.stack([row for row in rows if row is not None]).to(z.device), len(missing)


def one_step_contestant(name: str, backbone: Backbone, network: nn.Module) -> Contestant:
    """A one-step generator."""
    return Contestant(name, sampling.one_step(backbone, network))


def teacher_contestant(backbone: Backbone, network: nn.Module, steps: int = 50, guidance: float = 4.0) -> Contestant:
    """The reference with guided DDIM: about ``2 * steps`` times as dear as one step, so its latents may be kept."""
    key = f"{fingerprint(network)}/{type(backbone.schedule).__name__}/{backbone.latent_shape}/{steps}/{guidance:g}/"
    return Contestant("teacher", sampling.reference(backbone, network, steps, guidance), steps, guidance, key)


def contestants(
    config: Config, backbone: Backbone, generators: Mapping[str, nn.Module], reference: nn.Module
) -> list[Contestant]:
    """The rows of the table: start, control (where there is one), aligned, then the guided teacher of `evaluation.teacher_steps`."""
    known = [name for name in ("start", "control", "aligned") if name in generators]
    rows = [one_step_contestant(name, backbone, generators[name]) for name in known]
    if steps := config.evaluation.teacher_steps:
        rows.append(teacher_contestant(backbone, reference, steps, config.guidance.reference))
    return rows


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's weights: names, shapes, dtypes and up to 4,096 evenly spread values of each tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
        flat = value.detach().reshape(-1)
        part = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", torch.float32).contiguous()
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:32]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
