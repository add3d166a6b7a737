"""Teacher pairs for `train.anchor`: what the guided teacher makes of noise, for prompts of the training corpus (`didr pairs`).

:mod:`didr_core.data.teacher_pairs` reads them, and names what is in the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from didr_core.config import Config, build
from didr_core.config.files import replaced
from didr_core.data.prompts import open_prompts
from didr_core.data.storage import disk
from didr_core.diffusion import sampling
from didr_core.evaluate.contestants import teacher_contestant
from didr_core.types import Condition, DIDRError


def make_pairs(
    config: Config, count: int, path: Path, batch: int = 16, tell: Callable[[int], object] = lambda _: None
) -> None:
    """Write ``count`` pairs to ``path``, as float16 what fits into it. Latents lie beside it until all are made: a killed call goes on.

    Steps and guidance are `evaluation.teacher_steps` (0: 50) and `guidance.reference`; prompts and noise follow from `seed`.

    Args:
        tell: is told how many are made.

    Raises:
        DIDRError: prompts or networks cannot be read, or ``path`` cannot be written.
    """
    from safetensors.torch import save

    if path.is_dir():
        raise DIDRError(f"--out {path}: a folder. Expected a file, such as {path / 'pairs.safetensors'}.")
    kept = path.with_name(f".{path.stem}.latents")
    with disk("--out", path):  # now, not after an hour
        kept.mkdir(parents=True, exist_ok=True)
    device = config.torch_device
    index, backbone = open_prompts(config), build("backbones", config.backbone)
    backbone.load_text()
    backbone.to(device)
    network = backbone.load_network("reference").to(device).eval()
    steps = config.evaluation.teacher_steps or 50
    teacher = teacher_contestant(backbone, network, steps, config.guidance.reference)
    parts = []
    for first in range(0, count, batch):
        rows = range(first, min(first + batch, count))
        prompts = [prompt.prompt for prompt in index.read(rows, config.seed)]
        condition, z = backbone.encode(prompts), sampling.noise(config.seed, rows, backbone.latent_shape)
        names = [f"{config.seed}/{row}/{prompt}" for row, prompt in zip(rows, prompts, strict=True)]
        x0, _ = teacher.latents(condition.to(device), z.to(device), names, kept)
        parts.append({"z": z, "x0": x0.cpu(), **_named(condition)})
        tell(rows.stop)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with disk("--out", path), replaced(path) as partial:
        partial.write_bytes(save({name: _small(value) for name, value in whole.items()}))
    shutil.rmtree(kept)


def _small(values: torch.Tensor) -> torch.Tensor:
    """Hidden states of large text encoders may lie beyond float16."""
    half = values.half() if values.is_floating_point() else values
    return half if half.isfinite().all() else values


def _named(condition: Condition) -> dict[str, torch.Tensor]:
    return {f"condition.{name}": value.cpu() for name, value in condition.tensors.items()}
