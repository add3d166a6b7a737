"""FLOPs that are planned on the meta device against a real update, counted by torch: every estimator, both families."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import clip_folder
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from didr_core import config
from didr_core.config import registry
from didr_core.plan import hollow, memory, published
from didr_core.train.learner import Learner
from didr_core.types import Batch
from didr_core.world.random_models import PARTS

ROLES = {
    "sdxl": {"assistant": "lora", "rank": 4, "gradient_checkpointing": True},  # recipe sdxl_1gpu's
    "zimage": {"generator": "lora", "assistant": "lora", "rank": 4, "gradient_checkpointing": True},  # zimage_1gpu's
}
SMALL = {
    "hybrid": {"steps": 2, "particles": 2},
    "stochastic": {"steps": 2, "particles": 2},
    "importance": {"particles": 2},
}
ESTIMATORS = registry.names("drs")


def settings(family: str, folder: Path, estimator: str) -> config.Config:
    parts = PARTS[family]
    # toy sizes of what costs; text encoders are not run
    toy = {part: parts[part] for part in ("unet", "transformer", "vae") if part in parts}
    pipeline = published.write(family, folder / "pipeline", **toy)
    backbone = {"name": family, "pipeline": str(pipeline), "generator": "none", "resolution": 64}
    if family == "zimage":
        backbone["max_tokens"] = 20
    tree: dict[str, Any] = {
        "name": "test",
        "backbone": backbone,
        "algorithm": "didr",
        "reward": {"name": "pickscore", "path": str(clip_folder(folder / "clip"))},
        "drp": {"estimator": estimator, "snr_gate": True, "clip": 1.0, **SMALL.get(estimator, {})},
        "times": {"generator": [0.9, 0.98]},  # where no estimator has less to do
        "generator": {"lr": 1e-4},
        "assistant": {"lr": 1e-4},
        "train": {"steps": 10, "batch": 2, "micro_batch": 1, "assistant_updates": 2},
        "roles": ROLES[family],
        "data": {"prompts": "none"},
    }
    return config.validate(tree)


def anchored(given: config.Config, backbone: Any, path: Path) -> config.Config:
    condition = {f"condition.{name}": value.clone() for name, value in backbone.blank(4).tensors.items()}
    save_file(
        {"z": torch.randn(4, *backbone.latent_shape), "x0": torch.zeros(4, *backbone.latent_shape), **condition}, path
    )
    train = given.train.model_copy(update={"anchor": config.Anchor(pairs=str(path), weight=1.0, batch=3)})
    return given.model_copy(update={"train": train})


class OneModule(contextlib.nullcontext[None]):
    """In place of torch's hooks on every module, which cannot see a block that is recomputed inside a backward pass."""

    parents = ("Global",)


@pytest.mark.parametrize("family", ROLES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_planned_flops_are_those_of_an_update(family: str, estimator: str, tmp_path: Path) -> None:
    given = settings(family, tmp_path, estimator)
    backbone = hollow.backbone(given.backbone, tmp_path, "cpu")
    if estimator == "tweedie":  # with the regression to stored pairs, too
        given = anchored(given, backbone, tmp_path / "pairs.safetensors")
    subject = Learner(given, backbone=backbone, reward=hollow.Reward(given.reward, "cpu"))  # type: ignore[arg-type]
    names = [str(i) for i in range(2)]
    data = Batch(torch.arange(2), names, names, backbone.blank(2), {}, torch.zeros(2), torch.ones(2))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = OneModule()
    with counter:
        subject.step(data)
    plan = memory.plan(given)
    assert plan is not None
    assert counter.get_total_flops() == pytest.approx(plan.total_flops * plan.samples, rel=0.02)
