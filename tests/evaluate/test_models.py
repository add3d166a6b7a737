"""What `didr evaluate` is named: kinds of models, their settings, and pictures from the same noise as this project's own samplers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import sdxl_folder
from safetensors.torch import save_file
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Config, build
from didr_core.diffusion import sampling
from didr_core.evaluate.models import Pipeline, parse
from didr_core.types import Backbone, DIDRError, NonFiniteError

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue rings", "a green square"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return configs.load(str(toy_recipe(tmp_path_factory.mktemp("toy"))), ["guidance.reference=3"])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another pipeline of the family, and its network as a bare file."""
    folder = sdxl_folder(tmp_path_factory.mktemp("other") / "pipeline", seed=5)
    from diffusers import UNet2DConditionModel

    save_file(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict(), folder.parent / "unet.safetensors")
    return folder


def own(config: Config, sampler: str, folder: Path | None = None) -> torch.Tensor:
    """The same pictures by this project's samplers."""
    backbone: Backbone = build("backbones", config.backbone.model_copy(update={"generator": folder and str(folder)}))
    backbone.load_text()
    backbone.load_decoder()
    z = sampling.noise(7, [4, 0, 9], backbone.latent_shape)
    network = backbone.load_network("generator")
    draw = {"one": sampling.one_step(backbone, network), "two": sampling.reference(backbone, network, 2, 3.0)}[sampler]
    with torch.no_grad():
        return backbone.decode(draw(backbone.encode(PROMPTS), z)).clamp(0, 1)


@pytest.mark.parametrize("kind", ["start", "file", "folder"])
def test_generators_are_drawn_in_one_step_from_the_noise_of_our_own(kind: str, config: Config, other: Path) -> None:
    file = other.parent / "unet.safetensors"
    text, folder = {"start": ("start", None), "file": (f"x={file}", file), "folder": (f"x={other / 'unet'}", other)}[
        kind
    ]
    model = parse(text, config)
    assert model.kind == ("pipeline" if kind == "start" else "network")
    row = model.row()
    assert (row["steps"], row["timesteps"], row["guidance"], row["scheduler"]) == (1, [399], 0.0, "LCMScheduler")
    loaded = model.load(CPU, PROMPTS, [7])
    images, latents = loaded.draw(PROMPTS, [4, 0, 9], 7)
    assert torch.allclose(images, own(config, "one", folder), atol=1e-5) and loaded.calls == 1
    assert latents is not None and latents.shape == (3, 4, 8, 8)
    alone, _ = loaded.draw(PROMPTS[1:2], [0], 7)
    assert torch.allclose(alone[0], images[1], atol=1e-5), "a generator a sample: the batch changes nothing"
    assert not torch.allclose(loaded.draw(PROMPTS[1:2], [0], 8)[0][0], images[1], atol=1e-3)


def test_the_teacher_takes_the_recipes_guidance_and_steps_are_counted(config: Config) -> None:
    model = parse("teacher,steps=2", config)
    assert model.row()["guidance"] == 3.0 and "timesteps" not in model.row() and model.cost == 2
    loaded = model.load(CPU, PROMPTS, [7])
    images, _ = loaded.draw(PROMPTS, [4, 0, 9], 7)
    assert loaded.calls == 2 and images.shape == (3, 3, 32, 32)
    few = parse("teacher,timesteps=999/499,scheduler=LCMScheduler,guidance=0", config)
    assert few.cost == 2 and few.sampling.timesteps == (999, 499)
    a, b = (few.load(CPU, PROMPTS, [7]).draw(PROMPTS, [4, 0, 9], 7)[0] for _ in range(2))
    assert torch.equal(a, b) and not torch.allclose(a, images, atol=1e-2), "a stochastic scheduler is repeatable"


def test_pictures_that_are_not_finite_are_no_black_ones(config: Config) -> None:
    loaded = parse("start", config).load(CPU, PROMPTS, [7])
    with torch.no_grad():
        for weight in loaded.pipe.vae.decoder.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"--model start: NaN or infinite pictures of '.*dtype=float32"):
        loaded.draw(PROMPTS[:2], [4, 0], 7)


def test_a_lora_is_drawn_on_its_base(config: Config, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionXLPipeline.from_pretrained(config.backbone.pipeline)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    state = {k: v + 0.5 * ("lora_B" in k) for k, v in get_peft_model_state_dict(pipe.unet).items()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state)
    model = parse(f"mine={tmp_path / 'pytorch_lora_weights.safetensors'},steps=2", config)
    assert model.kind == "lora" and model.sampling.base == config.backbone.pipeline  # type: ignore[attr-defined]
    drawn = model.load(CPU, PROMPTS, [0]).draw(PROMPTS, range(3), 0)[0]
    plain = parse("teacher,steps=2", config).sampling.model_copy(update={"guidance": None})
    base = parse("teacher,steps=2", config)
    without = Pipeline(type(base)("b", base.path, "pipeline", plain, base.family), CPU).draw(PROMPTS, range(3), 0)[0]
    assert (drawn - without).abs().max() > 1e-3, "the adapter is on"


def save(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for value, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), value * 10, np.uint8)).save(folder / name)


def test_ready_pictures_by_name_and_by_manifest(config: Config, tmp_path: Path) -> None:
    save(tmp_path / "named", [f"{i:03d}.png" for i in range(6)])
    model = parse(f"p={tmp_path / 'named'}", config)
    drawn = model.load(CPU, PROMPTS, [0, 1])
    shown = [(drawn.draw(PROMPTS, range(3), seed)[0][:, 0, 0, 0] * 25.5).round().int().tolist() for seed in (0, 1)]
    assert shown == [[0, 2, 4], [1, 3, 5]] and drawn.calls == 0 and model.cost == 0
    with pytest.raises(DIDRError, match=r"has not the picture of 'a red circle', seed 0.*3 prompts x 1 seeds = 3"):
        model.load(CPU, PROMPTS, [0])
    save(tmp_path / "listed", ["a.png", "b.png", "c.png"])
    rows = [{"prompt": p, "file": f} for p, f in zip(reversed(PROMPTS), ("a.png", "b.png", "c.png"), strict=True)]
    (tmp_path / "listed" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = parse(f"p={tmp_path / 'listed'}", config).load(CPU, PROMPTS, [0])
    assert (listed.draw(PROMPTS, range(3), 0)[0][:, 0, 0, 0] * 25.5).round().int().tolist() == [2, 1, 0]
    with pytest.raises(DIDRError, match="picture of 'a red circle', seed 1"):
        parse(f"p={tmp_path / 'listed'}", config).load(CPU, PROMPTS, [0, 1])


def test_mistakes_are_told_before_anything_is_loaded(config: Config, tmp_path: Path) -> None:
    for text, said in (
        ("x=nowhere", "expected a run, a diffusers folder"),
        ("teacher,step=3", "has no key 'step' .*Did you mean 'steps'"),
        ("teacher,steps=none", "steps: .*valid integer"),
        (f"x={tmp_path}", "expected a run, a diffusers folder"),
    ):
        with pytest.raises(DIDRError, match=said):
            parse(text, config)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DIDRError, match=r"not exported. Say `didr export --run"):
        parse(f"x={tmp_path}", config)
    with pytest.raises(DIDRError, match="diffusers cannot make it"):
        parse("teacher,scheduler=NoSuchScheduler", config).load(CPU, PROMPTS, [0])


def test_the_fingerprint_is_of_weights_and_settings(config: Config, other: Path, tmp_path: Path) -> None:
    prints = {parse(text, config).fingerprint for text in ("teacher,steps=2", "teacher,steps=3", f"x={other},steps=2")}
    assert len(prints) == 3 and parse("teacher,steps=2", config).fingerprint in prints
