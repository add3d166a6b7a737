"""Z-Image folders with settings of many kinds: our x0, pictures and text embeddings are stock diffusers', or the folder is refused; and the
noise levels of both families' steps, by release of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from stock import PROMPTS, Change, close, load, rubbish, said, saved

from didr_core.backbones.sdxl import SDXL
from didr_core.backbones.zimage import ZImage
from didr_core.networks.loading import quiet
from didr_core.types import DIDRError
from didr_core.world import random_models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, as diffusers saves it."""
    quiet()
    folder = tmp_path_factory.mktemp("base")
    return {"sdxl": random_models.sdxl(folder / "sdxl"), "zimage": random_models.zimage(folder / "zimage")}


@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"shift": 6.0}, 6.0),
        ({"shift": 3.0}, 3.0),
        ({"shift": None}, 1.0),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"num_train_timesteps": 500}, "num_train_timesteps=500"),
        ({"_class_name": "EulerDiscreteScheduler"}, "_class_name=EulerDiscreteScheduler"),
    ],
)
def test_zimages_shift_is_the_files(
    base: dict[str, Path], tmp_path: Path, settings: dict[str, Any], shift: Any
) -> None:
    folder = tmp_path / "f"
    shutil.copytree(base["zimage"], folder)
    said("scheduler/scheduler_config.json", **settings)(folder)
    if isinstance(shift, str):
        with pytest.raises(DIDRError, match=shift):
            ZImage(ZImage.Config(pipeline=str(folder)))
        return
    backbone = ZImage(ZImage.Config(pipeline=str(folder), steps=4, max_tokens=64))
    backbone.check()
    made = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    made.set_timesteps(sigmas=torch.linspace(1, 0.25, 4).tolist())
    assert backbone.schedule.shift == backbone.shift == shift
    assert torch.allclose(torch.tensor(backbone.sigmas()), made.sigmas, atol=1e-6)


ZPARTS = ("transformer", "vae", "text_encoder")
ZIMAGE: dict[str, Change] = {
    "as saved": lambda _: None,
    "shift 3": said("scheduler/scheduler_config.json", shift=3.0),
    "no shift": said("scheduler/scheduler_config.json", shift=None),
    "dynamic shift": said("scheduler/scheduler_config.json", use_dynamic_shifting=True),
    "vae of another scale": said("vae/config.json", scaling_factor=0.7, shift_factor=-0.2),
    "bf16 without a name": saved(*ZPARTS, dtype=torch.bfloat16),
    "bf16 of the transformer": saved("transformer", dtype=torch.bfloat16, variant="bf16"),
    "shards": saved(*ZPARTS, max_shard_size="200KB"),
    "another base of angles": said("text_encoder/config.json", rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "a config of transformers 4": said("text_encoder/config.json", rope_parameters=None, rope_theta=50.0),
    "pointers beside": rubbish("transformer/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "z_image.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ZIMAGE)
def test_zimage_is_stock_diffusers(base: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "f"
    shutil.copytree(base["zimage"], folder)
    ZIMAGE[kind](folder)
    backbone = ZImage(ZImage.Config(pipeline=str(folder), max_tokens=64, text_dtype="float32", resolution=64))
    backbone.load_text()
    backbone.load_decoder()
    variant = "bf16" if "of the transformer" in kind else None
    transformer = load(folder, "transformer", torch_dtype=torch.float32, variant=variant)
    pipe = diffusers.ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    network = backbone.load_network("reference")
    with torch.no_grad():
        mine = backbone.encode(PROMPTS)
        theirs, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=64)
        for row, length, other in zip(mine.tensors["prompt_embeds"], mine.tensors["length"], theirs, strict=True):
            close(row[:length], other)
        x = torch.randn(3, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        for time in (1.0, 0.6, 0.1):
            made, mu = pipe.scheduler, mu_of(pipe.scheduler, backbone)
            made.set_timesteps(sigmas=[time], mu=mu)
            pictures = list(x.unsqueeze(2).unbind(0))
            out = pipe.transformer(pictures, torch.full((3,), 1 - made.sigmas[0].item()), theirs, return_dict=False)[0]
            x0 = made.step(-torch.stack(out).squeeze(2), made.timesteps[0], x, return_dict=False)[0]
            close(backbone.x0(network, x, torch.full((3,), time), mine), x0)
        whole = pipe(
            list(PROMPTS), latents=x, num_inference_steps=1, guidance_scale=0.0, height=64, width=64,
            max_sequence_length=64, output_type="pt",
        ).images  # fmt: skip
        close(backbone.decode(backbone.generate(network, x, mine)), whole)


def mu_of(made: Any, backbone: ZImage) -> float | None:
    """What the pipeline tells a scheduler that shifts by the size of a picture."""
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

    tokens = backbone.latent_shape[1] * backbone.latent_shape[2] // 4
    return calculate_shift(tokens) if made.config.use_dynamic_shifting else None  # type: ignore[no-any-return]


def test_steps_are_those_of_the_installed_diffusers_written_down(base: dict[str, Path]) -> None:
    """Releases step differently under one name: a new one gets its own values, from `make test-exports`."""
    golden = json.loads(Path(__file__).with_name("golden_steps.json").read_text())
    assert diffusers.__version__ in golden["sdxl"] and diffusers.__version__ in golden["zimage"], diffusers.__version__
    for steps, sigmas in golden["zimage"][diffusers.__version__].items():
        ours = ZImage(ZImage.Config(pipeline=str(base["zimage"]), steps=int(steps), max_tokens=64)).sigmas()
        assert torch.allclose(torch.tensor(ours), torch.tensor(sigmas), atol=2e-6)
    (noise, eps) = golden["sdxl"][diffusers.__version__]["399"]
    backbone = SDXL(SDXL.Config(pipeline=str(base["sdxl"])))
    alpha, sigma = (value.item() for value in backbone.schedule.coeffs(torch.tensor([0.399])))
    assert abs(1 / alpha - noise) < 2e-6 and abs(-sigma / alpha - eps) < 2e-6
