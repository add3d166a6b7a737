"""The SDXL backbone against the stock pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import sdxl_folder

from didr_core import config
from didr_core.backbones.sdxl import SDXL
from didr_core.contracts import DIDRError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("sdxl") / "pipeline")


def backbone(folder: Path, **changes: object) -> SDXL:
    return SDXL(SDXL.Config(pipeline=str(folder), **changes))  # type: ignore[arg-type]


def test_one_step_equals_the_stock_pipeline_with_lcm(folder: Path) -> None:
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    ours = backbone(folder)
    ours.load_text()
    ours.load_decoder()
    z = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "blue"]
    with torch.no_grad():
        mine = ours.decode(ours.generate(ours.load_network("generator"), z, ours.encode(prompts)))
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    size = ours.pixels
    theirs = pipe(
        prompts,
        latents=z,
        num_inference_steps=1,
        guidance_scale=0,
        timesteps=[399],
        output_type="pt",
        height=size,
        width=size,
    ).images
    assert theirs.shape == mine.shape == (2, 3, size, size)
    assert (mine - theirs).abs().max() < 1e-5


def test_guided_ddim_equals_the_stock_pipeline(folder: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    from didr_core.sampling import sample_reference

    ours = backbone(folder)
    ours.load_text()
    network = ours.load_network("reference")
    z = torch.randn(1, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    mine = sample_reference(ours, network, ours.encode(["a red circle"]), z, steps=50, guidance=4.0)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    size = ours.pixels
    theirs = pipe(
        ["a red circle"],
        latents=z,
        num_inference_steps=50,
        guidance_scale=4.0,
        output_type="latent",
        height=size,
        width=size,
    ).images
    assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()  # time grids differ by a row


def test_the_exported_folder_and_file_hold_the_same_network(folder: Path, tmp_path: Path) -> None:
    ours = backbone(folder)
    network = ours.load_network("generator")
    with torch.no_grad():
        network.conv_out.weight.add_(0.25)  # type: ignore[operator, union-attr]
    ours.export(network, str(tmp_path / "out"))
    (single,) = (tmp_path / "out").glob("*.safetensors")
    expected = network.state_dict()
    for source in (str(single), str(tmp_path / "out" / "unet")):
        loaded = backbone(folder, generator=source).load_network("generator").state_dict()
        assert loaded.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(loaded[key].half(), value.half()), key


def test_guidance_null_is_zeros_or_the_empty_prompt(folder: Path) -> None:
    zeros, empty = backbone(folder), backbone(folder, unconditional="empty")
    zeros.load_text()
    condition = zeros.encode(["red", "green"])
    assert all(v.abs().max() == 0 for v in zeros.null(condition).tensors.values())
    encoded = empty.null(condition)
    assert len(encoded) == 2 and empty._text is None  # the text towers do not stay on a trainer
    keeps = backbone(folder, unconditional="empty")
    keeps.load_text()
    keeps.null(condition)
    assert len(keeps.encode(["red"])) == 1
    assert encoded.tensors["pooled"].abs().max() > 0


def test_wrong_weights_are_refused_with_words(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match="no such folder"):
        backbone(tmp_path / "nothing")
    with pytest.raises(DIDRError, match="model_index.json is missing"):
        backbone(folder / "unet")
    with pytest.raises(DIDRError, match="AutoencoderTiny"):
        backbone(folder, generator=str(folder / "vae"))
    other = sdxl_folder(tmp_path / "other", sample_size=8)
    unet = other / "unet" / "config.json"
    unet.write_text(unet.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(DIDRError, match="cross_attention_dim=48"):
        backbone(folder, generator=str(other / "unet"))


def test_a_single_file_of_another_layout_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "ldm.safetensors")
    with pytest.raises(DIDRError, match="keys missing"):
        backbone(folder, generator=str(tmp_path / "ldm.safetensors")).load_network("generator")


def test_config_finds_the_component_by_its_file_name(folder: Path) -> None:
    tree = {"name": "sdxl", "pipeline": str(folder)}
    built = config.build("backbones", SDXL.Config(**tree))
    assert isinstance(built, SDXL)
