"""Where a GPU's host would wait inside an update: at copies that are not made ahead. (A value that is asked for fails on meta.)"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import clip_folder
from torch.utils._python_dispatch import TorchDispatchMode

from didr_core import config
from didr_core.plan import hollow, published
from didr_core.plan.memory import _Shapes
from didr_core.train.learner import Learner
from didr_core.types import Batch
from didr_core.world.random_models import PARTS


class Waits(TorchDispatchMode):
    """Copies from the host to the meta device, here the GPU: where they are made. Those of :func:`ahead` keep no host waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if given and not given[-1].is_meta and isinstance(out, torch.Tensor) and out.is_meta:
            stack = traceback.extract_stack()[:-1]
            if not any(frame.name == "ahead" for frame in stack):
                self.seen += [
                    str(function),
                    *(f"{frame.filename}:{frame.lineno}" for frame in stack if "didr_core" in frame.filename),
                ]
        return out


@pytest.mark.parametrize(("family", "estimator"), [("sdxl", "hybrid"), ("sdxl", "tweedie"), ("zimage", "tweedie")])
def test_the_host_waits_for_nothing_inside_a_micro_step(family: str, estimator: str, tmp_path: Path) -> None:
    parts = {part: PARTS[family][part] for part in ("unet", "transformer", "vae") if part in PARTS[family]}
    if family == "sdxl":
        parts["vae"] = {**parts["vae"], "latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}
    pipeline = published.write(family, tmp_path / "pipeline", **parts)
    own = {"max_tokens": 20} if family == "zimage" else {}
    tree: dict[str, Any] = {
        "name": "test",
        "backbone": {"name": family, "pipeline": str(pipeline), "generator": "none", **own},
        "algorithm": "didr",
        "reward": {"name": "pickscore", "path": str(clip_folder(tmp_path / "clip"))},
        "drp": {"estimator": estimator, "snr_gate": True, "clip": 1.0},
        "guidance": {"reference": 8.0},
        "generator": {"lr": 1e-4},
        "assistant": {"lr": 1e-4},
        "train": {"steps": 10, "batch": 2, "micro_batch": 1, "assistant_updates": 2},
        "data": {"prompts": "none"},
    }
    given = config.validate(tree)
    backbone, reward = hollow.backbone(given.backbone, tmp_path), hollow.Reward(given.reward)
    subject = Learner(given, device="meta", backbone=backbone, noise=_Shapes(0), reward=reward)  # type: ignore[arg-type]
    batch = Batch(torch.arange(2), ["0", "1"], ["a", "b"], backbone.blank(2)).to("meta")
    for first in (True, False):
        with Waits() as found:
            subject.backward(batch, "assistant", lambda part: subject.assistant_loss(part, "ta0"))
            subject.backward(batch, "generator", subject.generator_loss)
        assert first or not found.seen  # constants are copied once
    with Waits() as found:
        torch.zeros(2).to("meta")
    assert found.seen  # the watch sees what it is for
