"""The architectures at full size, on the meta device: the published parameter counts and layouts, and preflight on files of full size."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import layouts
import pytest
from torch import nn

from didr_core.backbones.sdxl import SDXL
from didr_core.backbones.zimage import ZImage
from didr_core.networks.loading import quiet
from didr_core.plan import hollow, published
from didr_core.types import DIDRError

PUBLISHED = {
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "vae"): 83_653_863,
    ("sdxl", "decoder"): 2_445_063,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("zimage", "transformer"): 6_154_908_736,
    ("zimage", "vae"): 83_819_683,
    ("zimage", "decoder"): 2_458_899,
    ("zimage", "text_encoder"): 4_022_468_096,
}


@functools.cache
def network(family: str, part: str) -> nn.Module:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = published.write(family, Path(folder)) / part
        name = published.PARTS[family][part]["class"]
        return hollow.from_config(name, config if part.startswith("text") else hollow.read_json(config / "config.json"))


def settings_of(family: str, part: str) -> dict[str, Any]:
    return {key: value for key, value in published.PARTS[family][part].items() if key != "class"}


def shapes(module: nn.Module) -> layouts.Layout:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("family", "part"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(family: str, part: str) -> None:
    module = network(family, part)
    assert sum(p.numel() for p in module.parameters()) == PUBLISHED[family, part]
    assert {p.device.type for p in module.parameters()} == {"meta"}


def test_every_network_is_counted() -> None:
    made = {(family, part) for family, parts in published.PARTS.items() for part in parts if part != "scheduler"}
    assert made == set(PUBLISHED)


@pytest.mark.parametrize(
    ("family", "part", "layout", "tensors"),
    [("sdxl", "unet", layouts.sdxl_unet(), 1680), ("zimage", "transformer", layouts.zimage_transformer(), 521)],
)
def test_no_key_is_missing_or_unexpected(family: str, part: str, layout: layouts.Layout, tensors: int) -> None:
    assert shapes(network(family, part)) == layout and len(layout) == tensors


def pipeline(
    folder: Path,
    index: str,
    part: tuple[str, str, published.Settings, layouts.Layout],
    family: str,
    scheduler: Mapping[str, Any],
) -> Path:
    """A pipeline folder at full size: true configs, hollow weights."""
    name, network_class, settings, layout = part
    vae = settings_of(family, "vae")
    for at, content in (
        ("model_index.json", {"_class_name": index}),
        (f"{name}/config.json", {"_class_name": network_class, **settings}),
        ("vae/config.json", {"_class_name": "AutoencoderKL", **vae}),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        (folder / at).parent.mkdir(parents=True, exist_ok=True)
        (folder / at).write_text(json.dumps(content))
    layouts.hollow_file(folder / name / "diffusion_pytorch_model.fp16.safetensors", layout)
    layouts.hollow_file(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes(network(family, "vae")))
    return folder


def test_preflight_at_full_size_takes_the_official_single_file(tmp_path: Path) -> None:
    """Headers only: SDXL base, then DMD2's and DIDR's UNet with and without a trainer's prefix, then other files."""
    layout = layouts.sdxl_unet()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    betas["_class_name"] = "EulerDiscreteScheduler"
    part = ("unet", "UNet2DConditionModel", settings_of("sdxl", "unet"), layout)
    base = pipeline(tmp_path / "base", "StableDiffusionXLPipeline", part, "sdxl", betas)
    for prefix in ("", "unet.", "module."):
        file = layouts.hollow_file(tmp_path / "didr.safetensors", {prefix + k: v for k, v in layout.items()})
        made = SDXL(SDXL.Config(pipeline=str(base), generator=str(file)))
        assert made.latent_shape == (4, 128, 128) and made.pixels == 1024
    assert SDXL(SDXL.Config(pipeline=str(base), resolution=512)).latent_shape == (4, 64, 64)
    file = layouts.hollow_file(tmp_path / "cut.safetensors", dict(list(layout.items())[:-1]))
    with pytest.raises(DIDRError, match=r"tensors 1 missing \(conv_out\.bias\)\. Expected the diffusers layout"):
        SDXL(SDXL.Config(pipeline=str(base), generator=str(file)))
    with pytest.raises(DIDRError, match="overflows in float16"):
        SDXL(SDXL.Config(pipeline=str(base), decode_dtype="float16"))


def test_preflight_at_full_size_takes_z_image_turbo(tmp_path: Path) -> None:
    layout = layouts.zimage_transformer()
    part = ("transformer", "ZImageTransformer2DModel", settings_of("zimage", "transformer"), layout)
    base = pipeline(tmp_path / "base", "ZImagePipeline", part, "zimage", {"shift": 6.0})
    file = layouts.hollow_file(tmp_path / "turbo.safetensors", layout, "BF16")
    made = ZImage(ZImage.Config(pipeline=str(base), generator=str(file), shift=3.0))
    assert made.latent_shape == (16, 128, 128) and (made.schedule.shift, made.shift) == (6.0, 3.0)  # type: ignore[attr-defined]
