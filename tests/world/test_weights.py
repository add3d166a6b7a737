"""The committed weights: stock diffusers loads them, and they are as good as the card says (floors below the card's numbers)."""

import json

import numpy as np
import pytest
import torch

from didr_core.config import WORLD
from didr_core.world.assess import assess
from examples.tiny_world.pairs_data import draw_groups
from examples.tiny_world.prompts import read_shards
from examples.tiny_world.quality import summary
from examples.tiny_world.sampling import Parts, sample, start_noise
from examples.tiny_world.train_rewards import load_reward, pair_accuracy, score_groups

CAPTIONS = read_shards(WORLD / "prompts" / "heldout")


@pytest.fixture(scope="module")
def teacher():
    return Parts.load(WORLD / "pipeline")


@pytest.fixture(scope="module")
def generator():
    return Parts.load(WORLD / "pipeline", WORLD / "generator")


def test_stock_diffusers_loads_the_folder_and_agrees_with_our_one_step(generator):
    from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    pipeline = StableDiffusionXLPipeline.from_pretrained(WORLD / "pipeline", torch_dtype=torch.float32)
    assert pipeline.config.force_zeros_for_empty_prompt
    pipeline.unet = UNet2DConditionModel.from_pretrained(WORLD / "generator", torch_dtype=torch.float32)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    captions = CAPTIONS[:4]
    stock = pipeline(
        captions,
        num_inference_steps=1,
        timesteps=[399],
        guidance_scale=0.0,
        latents=start_noise(4, 3),
        height=32,
        width=32,
        output_type="np",
    ).images
    ours = sample(generator, captions, seed=3).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(stock, ours, atol=2e-4)


def test_stock_ddim_with_guidance_equals_ours(teacher):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(WORLD / "pipeline", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        CAPTIONS[:2],
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=start_noise(2, 5),
        height=32,
        width=32,
        output_type="np",
    ).images
    ours = sample(teacher, CAPTIONS[:2], seed=5, steps=4, guidance=4.0).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(stock, ours, atol=2e-3)


def test_one_step_quality(generator):
    captions = CAPTIONS[:120]
    result = summary(assess(sample(generator, captions, seed=11).numpy(), captions))
    assert result["strict"] >= 0.87, result
    assert result["background_bits"] >= 1.7, result


def test_teacher_quality(teacher):
    captions = CAPTIONS[:48]
    result = summary(assess(sample(teacher, captions, seed=12, steps=12, guidance=2.0).numpy(), captions))
    assert result["strict"] >= 0.75, result


@pytest.mark.parametrize("name", ["taste", "judge"])
def test_reward_ranks_fresh_pairs(name, teacher):
    model, tokenizer = load_reward(name)
    groups = draw_groups(120, 3, teacher.vae, seed=999, held_out=True)
    scores = score_groups(model, tokenizer, groups)
    assert pair_accuracy(scores, groups.utility) >= 0.84
    assert pair_accuracy(scores, groups.utility, 0.2) >= 0.87


def test_world_is_small_and_holds_only_plain_formats():
    files = [path for path in WORLD.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".parquet", ".json", ".txt", ".md"}
    quality = json.loads((WORLD / "quality.json").read_text())
    assert {"checker", "vae", "reference", "generator", "rewards", "seconds"} <= set(quality)
