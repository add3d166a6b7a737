"""Whole runs with adapters, of both families: align, resume, export, sample, in one process; bfloat16, recomputation, micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_recipe

from didr_core.runs import RunFolder
from didr_core.zoo import random_models
from pipelines import cli

pytestmark = pytest.mark.slow
ROLES = {"generator": "lora", "assistant": "lora", "rank": 4, "dtype": "bfloat16", "checkpointing": True}


def didr(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 0


@pytest.mark.parametrize("family", ["sdxl", "zimage"])
def test_adapters_go_from_recipe_to_stock_diffusers(family: str, tmp_path: Path) -> None:
    import diffusers

    pipeline = getattr(random_models, family)(tmp_path / "reference")
    start = getattr(random_models, family)(tmp_path / "start", seed=1)  # a generator with a base of its own
    backbone: dict[str, Any] = {"name": family, "pipeline": str(pipeline), "generator": str(start)}
    backbone |= {"resolution": 64} | ({"max_tokens": 192} if family == "zimage" else {})
    recipe = toy_recipe(
        tmp_path,
        backbone=backbone,
        roles=ROLES,
        drp={"estimator": "ode", "steps": 2, "checkpointing": True, "beta": 0.5},
        train={"steps": 2, "batch": 4, "micro_batch": 1, "checkpoint_every": 2, "assistant_updates": 1},
        workers={"train": 1},
        evaluation={"grid": 2, "prompts": 2},
    )
    run = RunFolder(tmp_path / "run")
    didr("align", "--recipe", recipe, "--local", "--output", run.path)
    assert run.last_step() == 2
    didr("align", "--resume", run.path, "--local", "--set", "train.steps=3")
    assert run.last_step() == 3
    saved = torch.load(run.checkpoint(3) / "state.pt", weights_only=True)["learner"]["generator"]
    assert saved and all("/lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    pipe = diffusers.DiffusionPipeline.from_pretrained(run.path / "export", torch_dtype=torch.float32)
    network = getattr(pipe, "unet", None) or pipe.transformer
    before = getattr(diffusers.DiffusionPipeline.from_pretrained(start), "unet" if family == "sdxl" else "transformer")
    names = before.state_dict().keys()
    assert network.state_dict().keys() == names  # merged: the base's own names
    assert any((network.state_dict()[n] - before.state_dict()[n].float()).abs().max() > 1e-3 for n in names)
    assert (run.path / "export" / "pytorch_lora_weights.safetensors").is_file()
    pipe.load_lora_weights(run.path / "export")
    didr("sample", "--run", run.path, "--prompt", "a red circle", "--output", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == 1
