"""Rewards against independent implementations (tests/reference_rewards.py) under the same weights; published layouts; what `check` says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_rewards as reference
import torch
from random_models import byte_tokenizer
from reference_rewards import BLIP_L_16, TINY_BLIP, TINY_H, VIT_H_14, fill
from torch import Tensor
from torch.nn import functional as F

from didr_core.config import build
from didr_core.config.registry import find
from didr_core.rewards import _blip, hpsv2
from didr_core.rewards import images as preparation
from didr_core.rewards._head import linear_layers
from didr_core.types import DIDRError

PROMPTS = ["a red circle", "blue above", "two squares, a red circle"]
SIDE = 32
HEAD = (24, 16, 8, 4, 1)


def reward(name: str, **options: Any) -> Any:
    return build("rewards", find("rewards", name).Config(name=name, **options))


def pictures(height: int = SIDE, width: int = SIDE) -> Tensor:
    """Three smooth pictures [3, 3, H, W] well inside (0, 1)."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    waves = [torch.sin((1 + n) * x + (2.3 - c) * y + n * c) for n in range(3) for c in range(3)]
    return 0.5 + 0.35 * torch.stack(waves).view(3, 3, height, width)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files of every reward at toy size."""
    root = tmp_path_factory.mktemp("rewards")
    for name, version in (("HPS_v2.1_compressed.pt", 1), ("HPS_v2_compressed.pt", 2)):
        folder = byte_tokenizer(root / f"hps{version}")
        torch.save({"state_dict": fill(reference.open_clip_shapes(TINY_H))}, folder / name)
    torch.save(fill(reference.image_reward_shapes(TINY_BLIP)), reference.bert_tokenizer(root / "ir") / "ImageReward.pt")
    reference.clip_folder(root / "clip", TINY_H)
    torch.save(reference.head_state(TINY_H["out"], HEAD), root / "sac+logos+ava1-l14-linearMSE.pth")
    return root


def clip_ids(folder: Path) -> Tensor:
    """Token ids [3, 16] as open_clip makes them: start, text, end, zeros."""
    from transformers import CLIPTokenizer

    rows = CLIPTokenizer.from_pretrained(folder)(PROMPTS, truncation=True, max_length=16)["input_ids"]
    return torch.tensor([row + [0] * (16 - len(row)) for row in rows])


def bert_inputs(folder: Path) -> tuple[Tensor, Tensor]:
    """Ids and mask [3, 35], upstream's max_length."""
    from transformers import BertTokenizer

    rows = BertTokenizer.from_pretrained(folder)(PROMPTS)["input_ids"]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return ids, ids > 0


def transformers_cosine(folder: Path, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit_scale) cos and cos, by CLIPModel's own forward."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    logits = model(input_ids=clip_ids(folder), pixel_values=pixels).logits_per_image.diagonal()
    return logits, logits / model.logit_scale.exp()


def aesthetic_reference(root: Path, pixels: Tensor) -> Tensor:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(root / "clip").eval().requires_grad_(False)
    features = model.visual_projection(model.vision_model(pixels).pooler_output)
    state = reference.head_state(TINY_H["out"], HEAD)
    return reference.head(state, features / features.norm(dim=-1, keepdim=True), len(HEAD))


CASES: dict[str, tuple[Callable[[Path], Any], Callable[[Path, Tensor], Tensor]]] = {
    "hpsv2": (
        lambda root: reward("hpsv2", path=str(root / "hps1")),
        lambda root, x: (
            100
            * reference.open_clip_cosine(fill(reference.open_clip_shapes(TINY_H)), x, clip_ids(root / "hps1"), TINY_H)
        ),
    ),
    "image_reward": (
        lambda root: reward("image_reward", path=str(root / "ir" / "ImageReward.pt")),
        lambda root, x: reference.image_reward_score(
            fill(reference.image_reward_shapes(TINY_BLIP)), x, *bert_inputs(root / "ir"), TINY_BLIP
        ),
    ),
    "pickscore": (
        lambda root: reward("pickscore", path=str(root / "clip")),
        lambda root, x: transformers_cosine(root / "clip", x)[0],
    ),
    "clip_score": (
        lambda root: reward("clip_score", path=str(root / "clip")),
        lambda root, x: 100 * transformers_cosine(root / "clip", x)[1],
    ),
    "aesthetic": (
        lambda root: reward("aesthetic", path=str(root), clip=str(root / "clip")),
        aesthetic_reference,
    ),
}


def scored(of: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [3] and the gradient of their sum in the pictures."""
    leaf = images.clone().requires_grad_()
    score = of.score(leaf, of.prepare(PROMPTS))
    return score.detach(), torch.autograd.grad(score.sum(), leaf)[0]


@pytest.mark.parametrize("size", [(SIDE, SIDE), (80, 80)], ids=["at-size", "resized"])
@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_equal_an_independent_implementation(
    folders: Path, name: str, size: tuple[int, int]
) -> None:
    make, expected = CASES[name]
    ours = make(folders)
    ours.check()
    ours.load()
    images = pictures(*size)
    leaf = images.clone().requires_grad_()
    small = leaf if size == (SIDE, SIDE) else F.interpolate(leaf, (SIDE, SIDE), mode="bicubic", antialias=True)
    theirs = expected(folders, reference.pixels(small))
    score, gradient = scored(ours, images)
    scale = max(1.0, float(theirs.detach().abs().max()))
    assert theirs.std() > 2e-4 * scale, "the test's pictures must differ in score"
    assert (score - theirs.detach()).abs().max() <= 1e-5 * scale
    truth = torch.autograd.grad(theirs.sum(), leaf)[0]
    assert truth.abs().max() > 0
    assert (gradient - truth).norm() <= 1e-4 * truth.norm()
    if size == (SIDE, SIDE):
        assert score.tolist() == pytest.approx(reference.golden()[name], abs=1e-4 * scale)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_slope(folders: Path, name: str) -> None:
    """Central differences: the whole path from pixels to score is differentiated."""
    ours = CASES[name][0](folders)
    ours.load()
    images, inputs = pictures(48, 64), ours.prepare(PROMPTS)
    direction = torch.cos(torch.arange(images.numel()).float()).view_as(images)
    _, gradient = scored(ours, images)
    step = 4e-3
    with torch.no_grad():
        up, down = (ours.score(images + sign * step * direction, inputs).double().sum() for sign in (1, -1))
    slope = float((up - down) / (2 * step))
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=3e-2, abs=2e-3)


def test_scores_do_not_depend_on_the_batch(folders: Path) -> None:
    for name, (make, _) in CASES.items():
        ours = make(folders)
        ours.load()
        together = ours.score(pictures(), ours.prepare(PROMPTS))
        alone = [ours.score(pictures()[i : i + 1], ours.prepare(PROMPTS[i : i + 1])) for i in range(3)]
        assert torch.allclose(together, torch.cat(alone), atol=1e-4), name


@pytest.mark.parametrize("size", [(224, 224), (96, 64), (64, 100), (300, 301)])
def test_resizing_is_pils_bicubic_within_its_rounding(size: tuple[int, int]) -> None:
    from PIL import Image

    # Noise that stays inside of the range: PIL also cuts to it between its two passes (18/255 for noise of full contrast).
    grain = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)).mul(127).add(64).round()
    square = 56
    height, width = size
    short = min(size)
    target = (int(square * height / short), int(square * width / short))
    pil = Image.fromarray(grain.permute(1, 2, 0).byte().numpy()).resize(target[::-1], Image.Resampling.BICUBIC)
    cut = torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255
    top, left = (target[0] - square) // 2, (target[1] - square) // 2
    expected = reference.pixels(cut[:, top : top + square, left : left + square])
    got = preparation.clip_pixels(grain[None] / 255, square)[0]
    assert ((got - expected) * reference.STD).abs().max() <= 4 / 255
    scale = square / max(size)
    whole = (round(height * scale), round(width * scale))
    pil = Image.fromarray(grain.permute(1, 2, 0).byte().numpy()).resize(whole[::-1], Image.Resampling.BICUBIC)
    frame = Image.new("RGB", (square, square))
    frame.paste(pil, ((square - whole[1]) // 2, (square - whole[0]) // 2))
    expected = reference.pixels(torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 255)
    got = preparation.padded_pixels(grain[None] / 255, square)[0]
    assert ((got - expected) * reference.STD).abs().max() <= 4 / 255


def test_half_precision_pictures_are_prepared_in_float32() -> None:
    exact = preparation.clip_pixels(pictures(80, 80), SIDE)
    for kind in (torch.float16, torch.bfloat16):
        got = preparation.clip_pixels(pictures(80, 80).to(kind), SIDE)
        assert got.dtype == torch.float32 and (got - exact).abs().max() < 0.05


# ---- published layouts at full size, without data ----


def on_meta(shapes: reference.Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def left_over(make: Callable[[], torch.nn.Module], state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    with torch.device("meta"):
        model = make()
    result = model.load_state_dict(state, strict=False, assign=True)  # shapes that differ raise
    return result.missing_keys, result.unexpected_keys


def test_hpsv2_1_loads_whole_into_a_clip_model() -> None:
    from transformers import CLIPModel

    shapes = reference.open_clip_shapes(VIT_H_14)
    state = on_meta(shapes)
    assert hpsv2.layout(state, Path("x")) == shapes
    assert round(sum(v.numel() for v in state.values()) / 1e6, 1) == 986.1
    config = hpsv2.clip_config(state)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert (config.vision_config.image_size, config.text_config.eos_token_id) == (224, 49407)
    assert left_over(lambda: CLIPModel(config), hpsv2.to_transformers(state)) == ([], [])


def test_pickscore_loads_whole_into_a_clip_model() -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 224}
    text = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
    assert left_over(lambda: CLIPModel(config), on_meta(reference.clip_model_shapes(VIT_H_14))) == ([], [])


def test_image_reward_loads_whole_into_blip() -> None:
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    state = on_meta(reference.image_reward_shapes(BLIP_L_16))
    _blip.check(Path("x"), state)
    (vision_config, text_config), (vision, text) = _blip.configs(state), _blip.to_transformers(state)
    assert (vision_config.num_attention_heads, vision_config.image_size, text_config.num_attention_heads) == (
        16,
        224,
        12,
    )
    assert left_over(lambda: BlipVisionModel(vision_config), vision) == ([], [])
    assert left_over(lambda: BlipTextModel(text_config, add_pooling_layer=False), text) == ([], [])


def test_the_aesthetic_head_is_read_whole() -> None:
    state = on_meta(reference.head_shapes(768, BLIP_L_16["head"]))
    layers = linear_layers("reward.path", Path("x"), state)
    assert [name for name, _ in layers] == [f"layers.{n}" for n in (0, 2, 4, 6, 7)]
    assert [shape for _, shape in layers] == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]


def test_check_of_a_full_size_file_takes_less_than_a_second(tmp_path: Path) -> None:
    """Full names and shapes; the data is one number a tensor, and `check` reads none of it."""
    folder = byte_tokenizer(tmp_path)
    shapes = reference.open_clip_shapes(VIT_H_14)
    hollow = {k: torch.zeros((), dtype=torch.half).expand(shape) for k, shape in shapes.items()}
    torch.save({"state_dict": hollow}, folder / "HPS_v2.1_compressed.pt")
    of = reward("hpsv2", path=str(folder))
    began = time.process_time()
    of.check()
    assert time.process_time() - began < 1.0


# ---- what `check` says ----


def refused(of: Any, *words: str) -> None:
    with pytest.raises(DIDRError) as said:
        of.check()
    for word in words:
        assert word in str(said.value), (word, str(said.value))


def test_check_names_what_is_wrong_with_an_hpsv2_file(folders: Path, tmp_path: Path) -> None:
    name, good = "HPS_v2.1_compressed.pt", fill(reference.open_clip_shapes(TINY_H))
    refused(reward("hpsv2", path=str(tmp_path / "no")), "reward.path=", "no such file or folder", name)
    refused(reward("hpsv2", path=str(folders / "hps2")), name, "found: HPS_v2_compressed.pt")
    reward("hpsv2", path=str(folders / "hps2"), version="2.0").check()
    old = folders / "hps2" / "HPS_v2_compressed.pt"
    refused(reward("hpsv2", path=str(old)), "is version 2.0", "reward.version='2.1'", "Set reward.version='2.0'")

    def broken(**changes: Any) -> Any:
        state = {k: v for k, v in (good | changes).items() if v is not None}
        torch.save({"state_dict": state}, tmp_path / name)
        return reward("hpsv2", path=str(tmp_path), tokenizer=str(folders / "hps1"))

    key = "visual.transformer.resblocks.1.ln_1.bias"
    refused(broken(**{key: None}), "1 missing", key, "ViT-H-14")
    refused(broken(**{key: torch.zeros(3)}), key, "[3] instead of [160]")
    refused(broken(extra=torch.zeros(1)), "1 unexpected (extra)")
    refused(broken(**{"visual.conv1.weight": None}), "visual.conv1.weight", "Expected a ViT-H-14")
    narrow = fill(reference.open_clip_shapes(TINY_H | {"vision": (96, 1, 64, 8, 4)}))
    refused(broken(**narrow), "vision width 96", "80")
    broken(attn_mask=torch.zeros(16, 16)).check()
    whole = (tmp_path / name).read_bytes()
    for content, word in (
        (whole[: len(whole) // 2], "not a readable torch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(reward("hpsv2", path=str(tmp_path)), "reward.path=", word)
    torch.save({"model": {"a": 1}}, tmp_path / name)
    refused(reward("hpsv2", path=str(tmp_path)), "a dict of model", "expected a state dict")
    refused(
        reward("hpsv2", path=str(folders / "hps1"), tokenizer=str(tmp_path)), "reward.tokenizer=", "no tokenizer there"
    )


def test_check_names_what_is_wrong_with_a_clip_folder(folders: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    def copy() -> Path:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(folders / "clip", tmp_path / "c")
        return tmp_path / "c"

    (copy() / "model.safetensors").unlink()
    of = reward("pickscore", path=str(tmp_path / "c"))
    refused(of, "no weights beside config.json", "model.safetensors")
    state = load_file(folders / "clip" / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, copy() / "model.safetensors")
    refused(of, "lack logit_scale")
    save_file({k: v for k, v in state.items() if not k.endswith("1.mlp.fc1.bias")}, copy() / "model.safetensors")
    with pytest.raises(DIDRError, match=r"weights lack .*mlp\.fc1\.bias"):  # not left at random
        of.load()
    weights = copy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(of, "not a whole safetensors file")
    copy()
    for file in ("tokenizer.json", "vocab.json"):
        (tmp_path / "c" / file).unlink(missing_ok=True)
    refused(of, "reward.tokenizer=", "no tokenizer there", "set `tokenizer`")
    reward("clip_score", path=str(tmp_path / "c"), tokenizer=str(folders / "hps1")).check()
    other = reward("pickscore", path=str(folders / "clip"), tokenizer=str(reference.bert_tokenizer(tmp_path / "bert")))
    with pytest.raises(DIDRError, match="Expected the tokenizer that the model was trained with"):
        other.load()


def test_check_names_what_is_wrong_with_the_linear_heads(folders: Path, tmp_path: Path) -> None:
    clip, file = str(folders / "clip"), tmp_path / "head.pth"
    of = reward("aesthetic", path=str(file), clip=clip)
    refused(of, "no such file or folder", "sac+logos+ava1-l14-linearMSE.pth")
    good = fill(reference.head_shapes(24, HEAD))
    for changes, words in (
        ({"layers.2.bias": None}, ("layers.2", "bias None")),
        ({"layers.7.weight": torch.zeros(2, 4), "layers.7.bias": torch.zeros(2)}, ("layers.7 gives 2", "a score is 1")),
        ({"layers.4.weight": torch.zeros(8, 9)}, ("layers.2 gives 16", "takes 9")),
    ):
        torch.save({k: v for k, v in (good | changes).items() if v is not None}, file)
        refused(of, "reward.path=", *words)
    torch.save(fill(reference.head_shapes(32, HEAD)), file)
    refused(of, "reward.clip=", "24 numbers", "takes 32")
    state = fill(reference.image_reward_shapes(TINY_BLIP)) | fill(reference.head_shapes(32, (16, 8, 1), "mlp.layers"))
    torch.save(state, tmp_path / "ImageReward.pt")
    refused(reward("image_reward", path=str(tmp_path)), "the head takes 32", "gives 64")
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(state, tmp_path / "ImageReward.pt")
    refused(reward("image_reward", path=str(tmp_path)), "1 missing", "crossattention.self.key.bias")
    refused(reward("image_reward", path=str(tmp_path / "empty")), "no such file or folder", "ImageReward.pt")
