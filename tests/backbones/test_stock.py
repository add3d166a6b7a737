"""Folders made by diffusers itself, with settings of many kinds: our x0, pictures and text embeddings are stock diffusers', or the folder
is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from stock import PROMPTS, Change, all_of, close, load, rubbish, said, saved, scheduler, vae

from didr_core.backbones.sdxl import SDXL
from didr_core.types import DIDRError
from didr_core.world import random_models

SAVED_BY_OTHERS = os.environ.get("DIDR_TEST_SDXL")  # by another release of diffusers: tests/export/test_readers.py
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers saves it."""
    return Path(SAVED_BY_OTHERS) if SAVED_BY_OTHERS else random_models.sdxl(tmp_path_factory.mktemp("base") / "sdxl")


def old_attention(folder: Path) -> None:
    """Names that VAEs of 2022 have."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, old in names.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in state.items()}
    save_file(state, file, metadata={"format": "pt"})


KL = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": 2 * ("DownEncoderBlock2D",),
}
KL |= {"up_block_types": 2 * ("UpDecoderBlock2D",), "layers_per_block": 1}
TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
TINY |= {"num_decoder_blocks": (1, 1)}
ALL = ("unet", "vae", "text_encoder", "text_encoder_2")
SHARDS = {"max_shard_size": "60KB"}

TAKEN: dict[str, Change] = {
    "as saved": lambda _: None,
    "ddim": scheduler("DDIMScheduler", **BETAS, clip_sample=False),
    "ddpm": scheduler("DDPMScheduler", **BETAS, clip_sample=False),
    "euler ancestral": scheduler("EulerAncestralDiscreteScheduler", **BETAS),
    "pndm": scheduler("PNDMScheduler", **BETAS),
    "dpm": scheduler("DPMSolverMultistepScheduler", **BETAS, use_karras_sigmas=True),
    "unipc": scheduler("UniPCMultistepScheduler", **BETAS),
    "heun": scheduler("HeunDiscreteScheduler", **BETAS),
    "lms": scheduler("LMSDiscreteScheduler", **BETAS),
    "lcm": scheduler("LCMScheduler", **BETAS),
    "tcd": scheduler("TCDScheduler", **BETAS),
    "linear": scheduler("EulerDiscreteScheduler", beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    "cosine": scheduler("DDIMScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=False),
    "another range": scheduler("EulerDiscreteScheduler", beta_start=0.001, beta_end=0.01, beta_schedule="scaled_linear"),
    "500 steps": scheduler("EulerDiscreteScheduler", **BETAS, num_train_timesteps=500),
    "trained betas": scheduler("DDIMScheduler", trained_betas=torch.linspace(0.001, 0.02, 1000).tolist(), clip_sample=False),
    "no beta_schedule": all_of(scheduler("EulerDiscreteScheduler", **BETAS), said("scheduler/scheduler_config.json", beta_schedule=None)),
    "only a class": lambda f: (f / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}'),
    "zero snr, Euler's way": scheduler("EulerDiscreteScheduler", **BETAS, rescale_betas_zero_snr=True),
    "empty prompts encoded": said("model_index.json", force_zeros_for_empty_prompt=False),
    "vae of mean and spread": vae("AutoencoderKL", **KL, latents_mean=[0.5, -1, 0, 2], latents_std=[1, 2, 0.5, 3]),
    "vae of half a mean": vae("AutoencoderKL", **KL, latents_mean=[0.5, -1, 0, 2]),
    "vae with a shift": vae("AutoencoderKL", **KL, shift_factor=0.3, scaling_factor=0.7),
    "vae without post-convolution": vae("AutoencoderKL", **KL, use_post_quant_conv=False, use_quant_conv=False),
    "vae without its factor": all_of(vae("AutoencoderKL", **KL), said("vae/config.json", scaling_factor=None)),
    "vae of old names": all_of(vae("AutoencoderKL", **KL), old_attention),
    "tiny vae": vae("AutoencoderTiny", **TINY),
    "fp16 everywhere": saved(*ALL, dtype=torch.float16, variant="fp16"),
    "fp16 of one text encoder": saved("text_encoder", dtype=torch.float16, variant="fp16"),
    "fp16 of the unet": saved("unet", dtype=torch.float16, variant="fp16"),
    "fp16 of the vae": saved("vae", dtype=torch.float16, variant="fp16"),
    "bf16 everywhere": saved(*ALL, dtype=torch.bfloat16, variant="bf16"),
    "non_ema alone": saved("unet", variant="non_ema"),
    "fp16 beside": saved(*ALL, dtype=torch.float16, variant="fp16", beside=True),
    "half without a name": saved(*ALL, dtype=torch.float16),
    "torch files": saved("unet", "vae", safe_serialization=False),
    "shards": saved(*ALL, **SHARDS),
    "shards of fp16": saved(*ALL, dtype=torch.float16, variant="fp16", **SHARDS),
    "pointers beside": rubbish(
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/openvino_model.bin",
        "vae/diffusion_flax_model.msgpack", "vae/model.onnx", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack",
        "unet/ema.safetensors", "sd_xl_base_1.0.safetensors",
    ),
}  # fmt: skip


def edited(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})

    return apply


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def vocabulary(tokenizer: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / tokenizer / "tokenizer.json"
        tree = json.loads(file.read_text())
        change(tree)
        file.write_text(json.dumps(tree))

    return apply


def drop(end: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(next(name for name in state if name.endswith(end)))


BIAS, WIDE, LAST = "conv_out.bias", "time_embedding.linear_1.weight", "decoder.conv_out.bias"
NAN, INFINITY = (lambda state: state[BIAS].fill_(float("nan"))), (lambda state: state[LAST].fill_(float("inf")))
REFUSED: dict[str, tuple[Change, str]] = {
    "edm": (scheduler("EDMEulerScheduler"), r"EDMEulerScheduler\) has no table of noise levels"),
    "flow": (scheduler("FlowMatchEulerDiscreteScheduler"), "has no table of noise levels"),
    "no such class": (said("scheduler/scheduler_config.json", _class_name="No", beta_schedule=None), "No.* has no table"),
    "v": (scheduler("DDIMScheduler", **BETAS, clip_sample=False, prediction_type="v_prediction"), "='v_prediction'"),
    "clips": (scheduler("DDIMScheduler", **BETAS), "clip_sample=True"),
    "thresholds": (scheduler("DDIMScheduler", **BETAS, clip_sample=False, thresholding=True), "thresholding=True"),
    "flow sigmas": (scheduler("UniPCMultistepScheduler", **BETAS, use_flow_sigmas=True), "use_flow_sigmas=True"),
    "zero snr": (scheduler("DDIMScheduler", **BETAS, clip_sample=False, rescale_betas_zero_snr=True), "ends in pure noise"),
    "nan": (edited("unet", NAN), rf"unet.*safetensors': {BIAS} holds NaN"),
    "infinity in a vae": (edited("vae", INFINITY), rf"{LAST} holds infinity"),
    "missing": (edited("unet", drop(BIAS)), rf"unet.*1 missing \({BIAS}\)"),
    "misshapen": (edited("unet", lambda s: s.update({WIDE: s[WIDE].T.contiguous()})), rf"of another shape \({WIDE} \["),
    "missing in text": (edited("text_encoder", drop("final_layer_norm.bias")), r"text_encoder'.*lack .*final_layer_norm\.bias"),
    "missing in vae": (edited("vae", drop(LAST)), rf"vae'.*missing \({LAST}"),
    "a shard is away": (all_of(saved("unet", **SHARDS), lambda f: next((f / "unet").glob("*-00002-of-*")).unlink()), "not there"),
    "shards of torch files": (saved("unet", safe_serialization=False, **SHARDS), "no weights beside config.json"),
    "pointer": (rubbish("unet/diffusion_pytorch_model.safetensors"), "is a Git LFS pointer"),
    "no merges": (without("tokenizer/tokenizer.json", "tokenizer/merges.txt"), "vocab.json.*Expected .* with merges.txt"),
    "no tokenizer": (lambda f: [file.unlink() for file in (f / "tokenizer_2").iterdir()], "no tokenizer there"),
    "few tokens": (vocabulary("tokenizer", lambda t: (t["model"].update(vocab={}), t.update(added_tokens=[]))), "has 0 tokens"),
    "too many": (vocabulary("tokenizer", lambda t: t["model"]["vocab"].update(x=999)), r"up to 999, its text model knows 190"),
    "no end token": (said("tokenizer/tokenizer_config.json", eos_token="<end>"), "end token '<end>' is not among"),
    "endless": (said("tokenizer/tokenizer_config.json", model_max_length=None), "=2147483648, its text encoder takes 77"),
    "a config that is none": (said("unet/config.json", block_out_channels=[16]), "config.json describes no UNet2DConditionModel"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    from didr_core.networks.loading import quiet

    quiet()


@pytest.mark.parametrize("kind", TAKEN)
def test_sdxl_is_stock_diffusers(base: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "f"
    shutil.copytree(base, folder)
    TAKEN[kind](folder)
    variants = [None, "bf16", "fp16", "non_ema"]

    def part(name: str, **options: Any) -> Any:
        """As a user loads it: by trying variants."""
        for variant in variants:
            try:
                return load(folder, name, variant=variant, **options)
            except OSError:
                continue
        raise AssertionError(name)

    backbone = SDXL(SDXL.Config(pipeline=str(folder)))
    backbone.check()
    networks = {name: part(name, torch_dtype=torch.float32) for name in ALL}
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, **networks)
    pipe.set_progress_bar_config(disable=True)
    backbone.load_text()
    backbone.load_decoder()
    network = backbone.load_network("reference")
    with torch.no_grad():
        mine = backbone.encode(PROMPTS)
        embeds, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS)
        close(mine.tensors["prompt_embeds"], embeds)
        close(mine.tensors["pooled"], pooled)
        close(backbone.null(mine).tensors["prompt_embeds"], null)
        close(backbone.null(mine).tensors["pooled"], null_pooled)
        latent = torch.randn(3, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        stock_x0 = scheduled_x0(pipe.scheduler)
        for step in (20, 399, 480):
            time = torch.tensor([step / len(backbone.schedule.alphas_cumprod)] * 3)
            eps = pipe.unet(latent, step, embeds, added_cond_kwargs=added(backbone, pooled)).sample
            close(backbone.x0(network, latent, time, mine), stock_x0(eps, step, latent))
        close(backbone.decode(latent), pipe_pictures(pipe, latent))


@pytest.mark.parametrize(
    "kind", ["ddim", "cosine", "500 steps", "trained betas", "only a class", "zero snr, Euler's way"]
)
def test_an_export_has_the_noise_levels_of_its_source(base: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "f"
    shutil.copytree(base, folder)
    TAKEN[kind](folder)
    backbone = SDXL(SDXL.Config(pipeline=str(folder)))
    (tmp_path / "export").mkdir()
    backbone.export(backbone.load_network("generator"), str(tmp_path / "export"))
    made = diffusers.LCMScheduler.from_pretrained(tmp_path / "export", subfolder="scheduler")
    again = SDXL(backbone.config.exported(tmp_path / "export"))
    for table in (made.alphas_cumprod.double(), again.schedule.alphas_cumprod):
        assert ((table - backbone.schedule.alphas_cumprod).abs() <= 1e-6).all()


def added(backbone: SDXL, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    size = float(backbone.pixels)
    return {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * len(pooled))}


def scheduled_x0(made: Any) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
    """x0 as the scheduler's own table of noise levels has it."""

    def x0(eps: torch.Tensor, step: int, x: torch.Tensor) -> torch.Tensor:
        level = made.alphas_cumprod[step].double()
        return ((x - (1 - level).sqrt() * eps) / level.sqrt()).float()

    return x0


def pipe_pictures(pipe: Any, latent: torch.Tensor) -> torch.Tensor:
    """The pipeline's own decoding of a latent: a denoising loop of no steps leaves it as it is."""
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe.scheduler.set_timesteps = lambda *_, **__: setattr(
        pipe.scheduler, "timesteps", torch.zeros(0, dtype=torch.long)
    )
    pictures: torch.Tensor = pipe(
        PROMPTS, latents=latent, num_inference_steps=1, guidance_scale=0, output_type="pt"
    ).images
    return pictures


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_is_not_stocks_is_refused_in_words(base: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "f"
    shutil.copytree(base, folder)
    change, expected = REFUSED[kind]
    change(folder)
    with pytest.raises(DIDRError, match=expected) as told:
        SDXL(SDXL.Config(pipeline=str(folder))).check()
    assert str(told.value).startswith("backbone.pipeline=") and "\n" not in str(told.value)
