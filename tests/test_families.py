"""Tiny SDXL and tiny Z-Image from their recipes: train, stop, resume, export, and sample with stock diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from didr_core import config as configs
from didr_core.preflight import preflight
from didr_core.runs import RunFolder
from didr_core.sample import OneStep
from didr_core.train import outcome, train
from didr_core.zoo import random_models

PROMPTS, SEEDS = ["a red circle", "two blue rings on a black background"], [3, 4]
MORE = {
    "sdxl": {"guidance_scale": 0, "timesteps": [399]},
    "zimage": {"guidance_scale": 0.0, "max_sequence_length": 192},
}


@pytest.mark.parametrize(("family", "options"), [("sdxl", []), ("zimage", []), ("zimage", ["backbone.steps=2"])])
def test_from_recipe_to_stock_diffusers(family: str, options: list[str], tmp_path: Path) -> None:
    pipeline = getattr(random_models, family)(tmp_path / family)
    small = [f"backbone.pipeline={pipeline}", "workers.train=1", "train.batch=2", "evaluation.prompts=0", *options]
    config = configs.load(f"tiny_{family}", [*small, "train.steps=3", "train.checkpoint_every=1"])
    index = preflight(config)
    whole, resumed = (RunFolder.create(config, str(tmp_path / name)) for name in ("whole", "resumed"))
    with outcome(whole):
        train(config, whole, index)
    stopped = configs.load(f"tiny_{family}", [*small, "train.steps=2", "train.checkpoint_every=1"])
    for settings in (stopped, config):
        with outcome(resumed):
            train(settings, resumed, index)
    expected, got = (
        torch.load(run.checkpoint(3) / "state.pt", weights_only=True)["learner"] for run in (whole, resumed)
    )
    moved = OneStep(whole.path / "export").backbone.load_network("generator").state_dict()
    start = configs.build("backbones", config.backbone).load_network("generator").state_dict()
    for key, value in expected["generator"].items():
        assert torch.equal(value, got["generator"][key]), key
        assert torch.equal(
            moved[key], expected["ema"][key].to(torch.float16 if family == "sdxl" else torch.bfloat16).float()
        )
    assert any((moved[key] - start[key]).abs().max() > 1e-3 for key in start)

    from diffusers import DiffusionPipeline

    ours = OneStep(resumed.path / "export")
    mine = ours.pictures(PROMPTS, SEEDS)
    pipe = DiffusionPipeline.from_pretrained(resumed.path / "export", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    shape = ours.backbone.latent_shape
    z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    steps = config.backbone.model_dump().get("steps", 1)
    theirs = pipe(
        PROMPTS, latents=z, num_inference_steps=steps, height=64, width=64, output_type="pt", **MORE[family]
    ).images
    assert (mine - theirs).abs().max() <= 1e-5
    card = (resumed.path / "export" / "README.md").read_text()
    assert ("timesteps=[399]" if family == "sdxl" else "num_inference_steps=N") in card
