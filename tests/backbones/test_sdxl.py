"""The SDXL backbone against the stock pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import sdxl_folder
from safetensors.torch import save_file

from didr_core import config
from didr_core.backbones.sdxl import SDXL
from didr_core.diffusion.schedule import diffuse
from didr_core.types import DIDRError
from didr_core.world import random_models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of SDXL's classes, AutoencoderKL included."""
    return random_models.sdxl(tmp_path_factory.mktemp("true") / "pipeline")


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cheap decoder of the same latents, in a folder of its own."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    channels, blocks = (8,) * 4, (1,) * 4
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    folder = tmp_path_factory.mktemp("taesd")
    vae.save_pretrained(folder)
    return folder


def backbone(folder: Path, **changes: object) -> SDXL:
    return SDXL(SDXL.Config(pipeline=str(folder), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["folder", "true"])
def test_one_step_equals_the_stock_pipeline_with_lcm(which: str, request: pytest.FixtureRequest) -> None:
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    folder = request.getfixturevalue(which)
    ours = backbone(folder)
    ours.load_text()
    ours.load_decoder()
    z = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "blue"]
    with torch.no_grad():
        mine = ours.decode(ours.generate(ours.load_network("generator"), z, ours.encode(prompts)))
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    for part in (pipe.unet, pipe.vae):  # the same kernels, so that what is left is the convention
        part.to(memory_format=torch.channels_last)
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
    assert (mine - theirs).abs().max() <= 1e-6


def test_one_step_in_numbers(folder: Path) -> None:
    """alpha_399 = 0.652753, sigma_399 = 0.757571, whatever diffusers' schedulers become."""
    ours = backbone(folder)
    ours.load_text()
    told = []

    def network(x: torch.Tensor, t: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor]:
        told.append((x.unique().tolist(), t.tolist(), kwargs["added_cond_kwargs"]["time_ids"].tolist()))  # type: ignore[index]
        return (torch.full_like(x, 0.5),)

    made = ours.generate(network, torch.ones(1, *ours.latent_shape), ours.encode(["a"]))  # type: ignore[arg-type]
    assert told == [([1.0], [399], [[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])]
    assert made.unique().item() == pytest.approx((1 - 0.5 * 0.757571) / 0.652753, abs=2e-6)


def test_guided_ddim_equals_the_stock_pipeline(folder: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    from didr_core.diffusion.sampling import sample_reference

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
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "ldm.safetensors")
    some = {"input_blocks.0.0.weight": torch.zeros(1), "label_emb.0.0.weight": torch.zeros(1)}
    save_file({f"model.diffusion_model.{k}": v for k, v in some.items()}, tmp_path / "a1111.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "kohya.safetensors")
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.bin")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.bin")
    for name, match in (
        ("ldm.safetensors", r"tensors \d+ missing .*1 unexpected"),
        ("other.bin", r"tensors \d+ missing .*1 unexpected"),
        ("module.bin", "holds Python objects"),
        ("a1111.safetensors", "diffusers cannot convert it"),
        ("kohya.safetensors", "is a LoRA(.|\n)*load_lora_weights(.|\n)*fuse_lora(.|\n)*save_pretrained"),
        ("lora.safetensors", "is a LoRA"),
    ):
        with pytest.raises(DIDRError, match=match):
            backbone(folder, generator=str(tmp_path / name))  # before anything is loaded
    with pytest.raises(DIDRError, match=r"hf download a/b --revision v1` puts it"):
        backbone(folder, generator="a/b@v1")
    with pytest.raises(DIDRError, match=r"hf download stabilityai/stable-diffusion-xl-base-1.0` puts it"):
        backbone(Path("stabilityai/stable-diffusion-xl-base-1.0"))
    with pytest.raises(DIDRError, match=r"docs/sdxl\.md and docs/zimage\.md have the lines"):
        backbone(Path("models/stable-diffusion-xl-base-1.0"))  # where the recipes look, no name on the hub


def test_nan_of_a_single_file_is_named_when_large_once_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    state = {k: v.detach().contiguous() for k, v in backbone(folder).load_network("reference").state_dict().items()}
    state["conv_out.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(DIDRError, match=r"^backbone.generator='.*nan.safetensors': conv_out.weight holds NaN"):
        backbone(folder, generator=str(tmp_path / "nan.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("didr_core.networks.loading.SMALL", 1)
        ours = backbone(folder, generator=str(tmp_path / "nan.safetensors"))
    with pytest.raises(DIDRError, match="conv_out.weight holds NaN"):
        ours.load_network("generator")


def test_config_finds_the_component_by_its_file_name(folder: Path) -> None:
    tree = {"name": "sdxl", "pipeline": str(folder)}
    built = config.build("backbones", SDXL.Config(**tree))
    assert isinstance(built, SDXL)


def test_x0_inverts_the_forward_process_in_float32_whatever_the_network_is(folder: Path) -> None:
    ours = backbone(folder)

    class Oracle(torch.nn.Module):
        dtype = torch.bfloat16

        def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor]:
            assert x.dtype == torch.bfloat16 and t.tolist() == [20, 800]
            return (eps.bfloat16(),)

    ours.load_text()
    x0 = torch.randn(2, *ours.latent_shape)
    eps = torch.randn(2, *ours.latent_shape).bfloat16().float()
    t = torch.tensor([0.02, 0.8])
    x_t = diffuse(ours.schedule, x0, eps, t)
    assert torch.allclose(ours.x0(Oracle(), x_t, t, ours.encode(["a", "b"])), x0, atol=2e-5)


def test_a_small_decoder_serves_the_run_and_the_true_vae_the_export(true: Path, taesd: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    ours = backbone(true, decoder=str(taesd))
    ours.load_decoder()
    latent = torch.randn(1, *ours.latent_shape)
    expected = AutoencoderTiny.from_pretrained(taesd).decode(latent).sample / 2 + 0.5  # no scaling: its config says 1.0
    assert torch.allclose(ours.decode(latent), expected.clamp(0, 1), atol=1e-6)
    ours.export(ours.load_network("generator"), str(tmp_path / "out"))
    exported = SDXL(ours.config.exported(tmp_path / "out"))
    SDXL(backbone(true, decoder=str(taesd), decode_dtype="float16").config.exported(tmp_path / "out"))  # is not refused
    assert exported.vae_config["_class_name"] == "AutoencoderKL" and exported.vae_config["force_upcast"] is True
    wrong = tmp_path / "wrong"
    AutoencoderTiny(latent_channels=16).save_pretrained(wrong)
    with pytest.raises(DIDRError, match=r"backbone\.decoder=.*latent_channels=16, but the network has in_channels=4"):
        backbone(true, decoder=str(wrong))


def test_another_vae_replaces_the_pipelines_everywhere(true: Path, tmp_path: Path) -> None:
    """As the fp16-fix VAE does: the same classes, other weights, no force_upcast."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    fixed = AutoencoderKL.from_pretrained(true / "vae")
    fixed.register_to_config(force_upcast=False)
    with torch.no_grad():
        fixed.decoder.conv_out.bias.fill_(0.5)
    fixed.save_pretrained(tmp_path / "fix")
    with pytest.raises(DIDRError, match="overflows in float16"):
        backbone(true, decode_dtype="float16")
    ours = backbone(true, vae=str(tmp_path / "fix"), decode_dtype="float16")
    ours.load_decoder()
    picture = ours.decode(torch.zeros(1, *ours.latent_shape))
    with torch.no_grad():
        expected = fixed.decode(torch.zeros(1, *ours.latent_shape)).sample / 2 + 0.5
    assert picture.dtype == torch.float32 and torch.allclose(picture, expected.clamp(0, 1), atol=2e-2)
    ours.export(ours.load_network("generator"), str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert saved["decoder.conv_out.bias"].tolist() == [0.5] * 3


def test_checkpointed_decoding_keeps_less_and_gives_the_same_gradient(true: Path) -> None:
    latent = torch.randn(1, *backbone(true).latent_shape)

    def measure(checkpointing: bool) -> tuple[torch.Tensor, int]:
        ours = backbone(true, decode_gradient_checkpointing=checkpointing)
        ours.load_decoder()
        kept = 0

        def keep(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        x = latent.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            picture = ours.decode(x)
        picture.square().sum().backward()
        assert x.grad is not None
        return x.grad, kept

    (with_it, few), (without, many) = measure(True), measure(False)
    assert torch.allclose(with_it, without, rtol=1e-5, atol=1e-7) and with_it.abs().max() > 0
    assert few < many / 2


def test_generators_of_dmd2_and_didr_load_whatever_wraps_their_names(folder: Path, tmp_path: Path) -> None:
    expected = {k: v.half().contiguous() for k, v in backbone(folder).load_network("generator").state_dict().items()}
    torch.save({f"module.{k}": v for k, v in expected.items()}, tmp_path / "dmd2.bin")
    save_file({f"unet.{k}": v for k, v in expected.items()}, tmp_path / "wrapped.safetensors")
    for source in (tmp_path / "dmd2.bin", tmp_path / "wrapped.safetensors", folder):
        loaded = backbone(folder, generator=str(source)).load_network("generator").state_dict()
        assert {v.dtype for v in loaded.values()} == {torch.float32}
        assert all(torch.equal(loaded[k].half(), v) for k, v in expected.items())


def test_a_download_of_the_fp16_variant_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "fp16", variant="fp16")
    assert not list((tmp_path / "fp16").rglob("diffusion_pytorch_model.safetensors"))
    ours = backbone(tmp_path / "fp16")
    ours.load_text()
    ours.load_decoder()
    network = ours.load_network("reference")
    with torch.no_grad():
        assert (
            ours.decode(ours.generate(network, torch.zeros(1, *ours.latent_shape), ours.encode(["a"]))).isfinite().all()
        )
    ours.export(network, str(tmp_path / "out"))
    assert backbone(tmp_path / "out").load_network("generator") is not None


def test_a_missing_shard_is_seen_before_loading(folder: Path, tmp_path: Path) -> None:
    backbone(folder).load_network("reference").save_pretrained(tmp_path / "unet", max_shard_size="300KB")  # type: ignore[operator]
    shards = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and backbone(folder, generator=str(tmp_path / "unet"))
    shards[-1].unlink()
    with pytest.raises(DIDRError, match=f"names {shards[-1].name}, not there"):
        backbone(folder, generator=str(tmp_path / "unet"))


def test_schedulers_that_mean_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"prediction_type": "epsilon"', '"prediction_type": "v_prediction"'))
    with pytest.raises(DIDRError, match="prediction_type='v_prediction'"):
        backbone(tmp_path / "v")


def test_loading_says_nothing(folder: Path) -> None:
    """No library's advice or deprecation of what we call it with reaches the user."""
    load = f"""
import warnings
warnings.simplefilter("error", FutureWarning)
from didr_core.config import build, registry
backbone = registry.find("backbones", "sdxl")
backbone = backbone(backbone.Config(pipeline={str(folder)!r}))
backbone.load_text(), backbone.load_decoder(), backbone.load_network("reference")
"""
    done = subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
