"""Files that a generator may start from besides folders: whole models as A1111 and ComfyUI take them, and LoRAs of either naming."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from didr_core.backbones.sdxl import SDXL
from didr_core.backbones.zimage import ZImage
from didr_core.config import Roles, build, fingerprint
from didr_core.networks import lora, roles
from didr_core.types import DIDRError
from didr_core.world import random_models

State = dict[str, Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
RESNET |= {"conv_shortcut": "skip_connection"}
WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}
WHOLE |= {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {"sdxl": random_models.sdxl(root / "sdxl"), "zimage": random_models.zimage(root / "zimage")}


def backbone(folders: dict[str, Path], family: str, **options: Any) -> Any:
    kind = {"sdxl": SDXL, "zimage": ZImage}[family]
    more = {"max_tokens": 64} if family == "zimage" else {}
    return kind(kind.Config(name=family, pipeline=str(folders[family]), **more, **options))


def a1111(state: State, layers: int) -> State:
    """An SDXL UNet's tensors under the names of the authors' code, which A1111 and ComfyUI use: written out by hand."""
    out: State = {}
    per = layers + 1  # things a block has on the way down: its layers, and a downsampler
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer in WHOLE:
            new = WHOLE[layer]
        else:
            side, block, kind, k, rest = re.fullmatch(
                r"(down|up|mid)_blocks?\.?(\d*)\.(\w+)\.(\d+)\.?(.*)", layer
            ).groups()  # type: ignore[union-attr]
            b, n = int(block or 0), int(k)
            has_attention = any(re.match(rf"{side}_blocks\.{b}\.attentions", other) for other in state)
            column = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if has_attention else 1}[kind]
            if side == "mid":
                at = f"middle_block.{1 if kind == 'attentions' else 2 * n}"
            elif kind == "upsamplers":
                at = f"output_blocks.{b * per + per - 1}.{column}"
            elif side == "up":
                at = f"output_blocks.{b * per + n}.{column}"
            else:
                at = f"input_blocks.{b * per + (per if kind == 'downsamplers' else n + 1)}.{column}"
            rest = {"resnets": RESNET.get(rest), "downsamplers": "op"}.get(kind) or rest
            new = f"{at}.{rest}"
        out[f"model.diffusion_model.{new}.{leaf}"] = value.clone().contiguous()
    return out


def test_a_whole_model_of_a1111_is_a_generator(folders: dict[str, Path], tmp_path: Path) -> None:
    unet = backbone(folders, "sdxl").load_network("reference")
    state = {name: (value.detach() + 0.01).contiguous() for name, value in unet.state_dict().items()}
    file = a1111(state, unet.config.layers_per_block)
    assert len(file) == len(state)
    file |= {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "conditioner.embedders.0.x": torch.zeros(1)}
    save_file(file, tmp_path / "juggernaut.safetensors")
    found = backbone(folders, "sdxl", generator=str(tmp_path / "juggernaut.safetensors")).load_network("generator")
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    del file["model.diffusion_model.out.2.bias"]
    save_file(file, tmp_path / "cut.safetensors")
    with pytest.raises(DIDRError, match=r"cut\.safetensors': tensors 1 missing \(conv_out\.bias\)"):
        backbone(folders, "sdxl", generator=str(tmp_path / "cut.safetensors"))


def saved_adapter(ours: Any, family: str, folder: Path) -> tuple[Tensor, State]:
    """A LoRA of alpha 6 and rank 2 saved as our exports save it; one weight as it is with it, and the base's whole state."""
    options = Roles.model_validate({"generator": "lora", "rank": 2, "alpha": 6})
    base = ours.load_network("reference")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapter = lora.add_adapter(base, "generator", options, ours, 0)
    with torch.no_grad():
        for i, weight in enumerate(adapter.parameters()):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    part = "unet" if family == "sdxl" else "transformer"
    (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(f'{{"_class_name": "{ours.family.pipeline}"}}')
    lora.save_adapter(adapter, folder)
    return lora.plain(adapter).state_dict(), before  # type: ignore[return-value]


@pytest.mark.parametrize(("family", "file"), [("sdxl", lora.ADAPTER), ("sdxl", lora.KOHYA), ("zimage", lora.ADAPTER)])
def test_a_lora_is_merged_into_the_start_alone(
    folders: dict[str, Path], tmp_path: Path, family: str, file: str
) -> None:
    expected, before = saved_adapter(backbone(folders, family), family, tmp_path)
    ours = backbone(folders, family, lora=str(tmp_path / file))
    found, reference = (ours.load_network(role).state_dict() for role in ("generator", "reference"))
    assert found.keys() == expected.keys() == before.keys()
    assert max((expected[name] - before[name]).abs().max() for name in before) > 0.01
    for name, value in found.items():
        assert (value - expected[name]).abs().max() < 1e-6, name
        assert torch.equal(reference[name], before[name])
    assert not roles.starts_as_reference(ours._options)
    assert ours.fingerprint("start") != backbone(folders, family).fingerprint("start")
    assert ours._options.exported(tmp_path).lora is None
    assert fingerprint.component("backbones", ours._options) != fingerprint.component(
        "backbones", backbone(folders, family)._options
    )


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def file(**tensors: Tensor) -> str:
        save_file({name.replace("__", "."): value for name, value in tensors.items()}, tmp_path / "x.safetensors")
        return str(tmp_path / "x.safetensors")

    block, te = "unet__mid_block__attentions", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"

    def pair(layer: str, width: int, value: float = 0.0, names: tuple[str, str] = ("lora_A", "lora_B")) -> State:
        down, up = torch.full((2, width), value), torch.zeros(width, 2)
        return {f"{layer}__{names[0]}__weight": down, f"{layer}__{names[1]}__weight": up}

    q = f"{block}__0__transformer_blocks__0__attn1__to_q"
    kohyas = pair(te, 16, names=("lora_down", "lora_up")) | {f"{te}__alpha": torch.tensor(2.0)}
    for told, tensors in (
        (r"changes mid_block\.attentions\.7\.to_q .* not there", pair(f"{block}__7__to_q", 16)),
        (r"to_q of \[17, 17\], \[\d+, \d+\] there", pair(q, 17)),
        ("holds NaN", pair(q, 16, float("nan"))),
        ("not of the unet", kohyas),
    ):
        with pytest.raises(DIDRError, match=rf"^backbone\.lora=.*{told}"):
            backbone(folders, "sdxl", lora=file(**tensors))
    with pytest.raises(DIDRError, match="no such file"):
        backbone(folders, "sdxl", lora=str(tmp_path / "no.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(b"12345678{")
    with pytest.raises(DIDRError, match="cut short"):
        backbone(folders, "sdxl", lora=str(tmp_path / "cut.safetensors"))
    assert build("backbones", SDXL.Config(name="sdxl", pipeline=str(folders["sdxl"])))
