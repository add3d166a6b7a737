"""Tiny SDXL and tiny Z-Image from their recipes: train, stop, resume, export, and sample with stock diffusers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from random_models import prompt_shards

from didr_core import config as configs
from didr_core.data.feed import LocalFeed
from didr_core.evaluate.finish import train_and_finish
from didr_core.export.sample import OneStep
from didr_core.plan import fit, memory
from didr_core.plan.preflight import preflight
from didr_core.train import checkpoint
from didr_core.train.learner import Learner
from didr_core.train.loop import outcome
from didr_core.train.run_folder import RunFolder
from didr_core.world import random_models

PROMPTS, SEEDS = ["a red circle", "two blue rings on a black background"], [3, 4]
MORE = {
    "sdxl": {"guidance_scale": 0, "timesteps": [399]},
    "zimage": {"guidance_scale": 0.0, "max_sequence_length": 192},
}


def test_the_command_builds_what_the_recipes_name(tmp_path: Path) -> None:
    random_models.main(["--folder", str(tmp_path)])
    for family in ("sdxl", "zimage"):
        config = configs.load(f"tiny_{family}")
        named = Path(config.backbone.model_dump()["pipeline"])
        assert named == random_models.FOLDER / family
        preflight(configs.load(f"tiny_{family}", [f"backbone.pipeline={tmp_path / family}"]))


@pytest.mark.parametrize(("family", "options"), [("sdxl", []), ("zimage", []), ("zimage", ["backbone.steps=2"])])
def test_from_recipe_to_stock_diffusers(family: str, options: list[str], tmp_path: Path) -> None:
    pipeline = getattr(random_models, family)(tmp_path / family)
    small = [f"backbone.pipeline={pipeline}", "workers.train=1", "train.batch=2", "evaluation.prompts=0", *options]
    config = configs.load(f"tiny_{family}", [*small, "train.steps=3", "train.checkpoint_every=1"])
    index = preflight(config)
    whole, resumed = (RunFolder.create(config, str(tmp_path / name)) for name in ("whole", "resumed"))
    with outcome(whole):
        train_and_finish(config, whole, index)
    stopped = configs.load(f"tiny_{family}", [*small, "train.steps=2", "train.checkpoint_every=1"])
    for settings in (stopped, config):
        with outcome(resumed):
            train_and_finish(settings, resumed, index)
    expected, got = (
        {part: checkpoint.read(run.checkpoint(3), part) for part in ("generator", "ema")} for run in (whole, resumed)
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


def stable_diffusion(folder: Path) -> Path:
    """A StableDiffusionPipeline folder of random weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(random_models.byte_tokenizer(folder / "tokenizer"))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(random_models.clip_text_config(tokenizer, 16, 16)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(16,),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=8,
            cross_attention_dim=16,
        ),
        scheduler=EulerDiscreteScheduler(**betas, steps_offset=1, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_the_family_in_the_readme_trains_and_equals_its_stock_pipeline(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    (code,) = re.findall(
        r"```python\n(.*?)```", (root / "didr_core" / "backbones" / "README.md").read_text(), re.DOTALL
    )
    (tmp_path / "stable_diffusion.py").write_text(code)
    folder = stable_diffusion(tmp_path / "pipeline")
    tree = {
        "name": "readme",
        "backbone": {"name": f"{tmp_path / 'stable_diffusion.py'}:StableDiffusion", "pipeline": str(folder)},
        "algorithm": "diff_instruct",
        "generator": {"lr": 1e-3},
        "assistant": {"lr": 1e-3},
        "train": {"steps": 1, "batch": 2},
        "data": {"prompts": str(prompt_shards(tmp_path / "prompts"))},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    config = configs.load(str(tmp_path / "recipe.yaml"))
    assert memory.plan(config) is None and fit.decided(config, 1e9)[0].train.micro_batch != "auto"
    half = configs.load(str(tmp_path / "recipe.yaml"), ["roles.dtype=bfloat16", "roles.update=master"])
    assert Learner(half).step(next(iter(LocalFeed(half)))).metrics["grad/generator"] > 0
    learner = Learner(config)
    report = learner.step(next(iter(LocalFeed(config))))
    assert report.metrics["grad/generator"] > 0 and report.metrics["grad/assistant"] > 0
    backbone = learner.backbone
    backbone.load_text()
    backbone.load_decoder()
    network = learner.generator("generator")
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.half().float())
        z = torch.randn(2, 4, 8, 8)
        mine = backbone.decode(backbone.generate(network, z, backbone.encode(PROMPTS)))
    backbone.export(network, str(tmp_path / "export"))
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS, latents=z, num_inference_steps=1, guidance_scale=0, output_type="pt").images
    assert (mine - theirs).abs().max() < 2e-3  # text encoder and VAE of an export are float16
