"""Stand-ins for every file that docs/sdxl.md downloads: the published names and layouts at toy size, as folders for a local hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import stock
import torch
import toy_rewards

from didr_core.world import random_models

NEVER = b"far too large to be fetched"
LICENCES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "tianweiy/DMD2": "cc-by-nc-sa-4.0",
    "xswu/HPSv2": "apache-2.0",
}
"""What stand-ins say of themselves; the others `mit`."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def sdxl_hub(root: Path) -> dict[str, Path]:
    """Folder by repository. Files that the page's lines must leave out hold :data:`NEVER`."""
    base = random_models.sdxl(root / "base")
    stock.saved(*PARTS, dtype=torch.float16, variant="fp16")(base)
    for part in ("tokenizer", "tokenizer_2"):  # as published: without the file of fast tokenizers
        (base / part / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(base / "tokenizer" / name, base / "tokenizer_2" / name)
    for name in ("sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx"):
        (base / name).write_bytes(NEVER)
    made = {
        "stabilityai/stable-diffusion-xl-base-1.0": base,
        "tianweiy/DMD2": _start(root / "dmd2", base),
        "madebyollin/taesdxl": _decoder(root / "taesdxl"),
        "xswu/HPSv2": _hpsv2(root / "hpsv2"),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _tokenizer(root / "laion"),
        "yuvalkirstain/PickScore_v1": _pickscore(root / "pickscore"),
    }
    for repository, folder in made.items():
        (folder / "README.md").write_text(f"---\nlicense: {LICENCES.get(repository, 'mit')}\n---\n")
    return made


def _start(folder: Path, base: Path) -> Path:
    """DMD2's UNet: SDXL's, other numbers, a pickled file."""
    folder.mkdir()
    unet = stock.load(base, "unet", variant="fp16", torch_dtype=torch.float16).state_dict()
    state = {name: value + 0.01 * torch.randn_like(value) for name, value in unet.items()}
    torch.save(state, folder / "dmd2_sdxl_1step_unet_fp16.bin")
    (folder / "dmd2_sdxl_4step_unet_fp16.bin").write_bytes(NEVER)
    return folder


def _decoder(folder: Path) -> Path:
    from diffusers import AutoencoderTiny

    blocks = {f"num_{side}_blocks": (1, 1, 1, 1) for side in ("encoder", "decoder")}
    widths = {f"{side}_block_out_channels": (8, 8, 8, 8) for side in ("encoder", "decoder")}
    AutoencoderTiny(**blocks, **widths).save_pretrained(folder)
    (folder / "taesdxl_decoder.pth").write_bytes(NEVER)
    return folder


def _hpsv2(folder: Path) -> Path:
    folder.mkdir()
    torch.save({"state_dict": _filled(toy_rewards.open_clip_shapes)}, folder / "HPS_v2.1_compressed.pt")
    (folder / "HPS_v2_compressed.pt").write_bytes(NEVER)
    return folder


def _tokenizer(folder: Path) -> Path:
    toy_rewards.clip_tokenizer(folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(NEVER)
    return folder


def _pickscore(folder: Path) -> Path:
    toy_rewards.clip_folder(folder, _filled(toy_rewards.clip_model_shapes))
    (folder / "pytorch_model.bin").write_bytes(NEVER)
    return folder


def _filled(shapes: object) -> toy_rewards.State:
    return toy_rewards.fill(shapes(toy_rewards.TINY_H))  # type: ignore[operator]
