"""Rewards against the numbers of upstream's own packages (golden_rewards.json, made by make_golden.py) under the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_rewards as toy
from safetensors.torch import load_file, save_file
from torch import Tensor

from didr_core.config import build
from didr_core.config.registry import find
from didr_core.rewards import hpsv2
from didr_core.rewards import images as preparation

GOLDEN = json.loads((Path(__file__).parent / "golden_rewards.json").read_text())
NAMES = [*GOLDEN["values"]]


def reward(name: str, **options: Any) -> Any:
    return build("rewards", find("rewards", name).Config(name=name, **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy.write(tmp_path_factory.mktemp("rewards"))
    openai = hpsv2.to_transformers(torch.load(folder / "openai.pt"))
    toy.clip_folder(folder / "openai", {k: v.contiguous() for k, v in openai.items()}, act="quick_gelu")
    return folder


@pytest.fixture(scope="module")
def loaded(root: Path) -> dict[str, Any]:
    """Every reward of the golden numbers, checked and loaded."""
    head, clip = str(root / "sac+logos+ava1-l14-linearMSE.pth"), str(root / "openai")
    rewards = {
        "hpsv2": reward("hpsv2", path=str(root / "hps")),
        "image_reward": reward("image_reward", path=str(root / "ir" / "ImageReward.pt")),
        "aesthetic": reward("aesthetic", path=head, clip=clip),
        "aesthetic relu": reward("aesthetic", path=str(root / "ava+logos-l14-reluMSE.pth"), clip=clip),
        "pickscore": reward("pickscore", path=str(root / "clip")),
        "clip_score": reward("clip_score", path=str(root / "clip")),
    }
    for of in rewards.values():
        of.check()
        of.load()
    return rewards


def scored(of: Any, picture: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Scores [P] of one picture [3, H, W] for every prompt, and the gradient of their sum in it."""
    leaf = picture.clone().requires_grad_()
    score = of.score(leaf.expand(len(prompts), -1, -1, -1), of.prepare(prompts))
    return score.detach(), torch.autograd.grad(score.sum(), leaf)[0]


@pytest.mark.parametrize("shape", toy.PICTURES)
@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_upstreams(loaded: dict[str, Any], name: str, shape: str) -> None:
    golden = {kind: torch.tensor(values) for kind, values in GOLDEN["values"][name][shape].items()}
    score, gradient = scored(loaded[name], toy.picture(shape) / 255, toy.PROMPTS[: len(golden["exact"])])
    scale = max(1.0, float(golden["exact"].abs().max()))
    assert (score - golden["exact"]).abs().max() <= 1e-4 * scale
    rounded = name != "hpsv2" and shape in ("large", "edges")  # PIL's 8 bits after its resize
    assert (score - golden["official"]).abs().max() <= (0.06 if rounded else 1e-4) * scale
    assert golden["gradient"].norm() > 1e-3 * scale
    assert (torch.tensor(toy.along(gradient)) - golden["gradient"]).norm() <= 1e-3 * golden["gradient"].norm()


def test_the_golden_numbers_tell_prompts_and_croppings_apart() -> None:
    for name in NAMES:
        scores = torch.tensor([GOLDEN["values"][name][shape]["exact"] for shape in toy.PICTURES])
        scale = max(1.0, float(scores.abs().max()))
        assert scores.std(0).min() > 1e-3 * scale, name
        if not name.startswith("aesthetic"):
            assert (scores[:, :, None] - scores[:, None, :]).abs().amax(0).fill_diagonal_(1).min() > 1e-4 * scale, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(100, 100), (101, 67), (225, 224)])
def test_white_pictures_keep_their_gradient(loaded: dict[str, Any], name: str, size: tuple[int, int]) -> None:
    """As a picture a hair below white does, which nothing clamps."""
    of, white = loaded[name], torch.ones(3, *size)
    _, at_the_end = scored(of, white, toy.PROMPTS[:3])
    _, inside = scored(of, white * (1 - 1e-5), toy.PROMPTS[:3])
    assert (at_the_end - inside).norm() <= 1e-2 * inside.norm()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_slope(loaded: dict[str, Any], name: str) -> None:
    """Central differences: the whole path from pixels to score is differentiated."""
    of, picture, prompts = loaded[name], toy.picture("large") / 255, toy.PROMPTS[:3]
    direction = toy.noise(picture.numel(), 3).float().view_as(picture)
    _, gradient = scored(of, picture, prompts)
    step = 2e-3
    up, down = (scored(of, picture + sign * step * direction, prompts)[0].double().sum() for sign in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=3e-2, abs=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(loaded: dict[str, Any], name: str) -> None:
    of, pictures = loaded[name], torch.stack([toy.picture("white"), toy.picture("white") / 3]) / 255
    together = of.score(pictures, of.prepare(toy.PROMPTS[:2]))
    alone = [of.score(pictures[i : i + 1], of.prepare(toy.PROMPTS[i : i + 1])) for i in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)


@pytest.mark.parametrize("plain", [True, False], ids=["one-projection_dim", "parts-that-say-another"])
def test_the_clip_of_an_aesthetic_head_may_say_its_width_in_one_place(root: Path, tmp_path: Path, plain: bool) -> None:
    """As laion's ViT-H and clips without a `projection_dim` in `vision_config`: CLIPModel goes by its own."""
    folder = tmp_path / "clip"
    toy.clip_folder(folder, load_file(root / "openai" / "model.safetensors"), act="quick_gelu")
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part]["projection_dim"] = 512
        if plain:
            del config[part]["projection_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    of = reward("aesthetic", path=str(root / "sac+logos+ava1-l14-linearMSE.pth"), clip=str(folder))
    of.check()
    of.load()
    score, _ = scored(of, toy.picture("tall") / 255, [""])
    assert score.tolist() == pytest.approx(GOLDEN["values"]["aesthetic"]["tall"]["exact"], rel=1e-4)


def test_prompts_are_mended_as_upstream_does() -> None:
    """What ftfy and html.unescape make of a prompt; test_scores_and_gradients_are_upstreams holds the tokens that follow."""
    for prompt, mended in (
        ("A “cat’s” ﬁne\u00a0hat", 'a "cat\'s" fine hat'),
        ("tom &amp; jerry &lt;3", "tom & jerry <3"),
        ("<lora:hat:1> tom &amp;amp; jerry", "<lora:hat:1> tom & jerry"),
        ("ＦＵＬＬ　ｗｉｄｔｈ\n\tcafÃ©", "full width café"),
        ("  ", ""),
    ):
        assert hpsv2.clean(prompt) == mended


@pytest.mark.parametrize("size", [(224, 224), (96, 64), (64, 100), (300, 301)])
def test_resizing_is_pils_bicubic_within_its_rounding(size: tuple[int, int]) -> None:
    from PIL import Image

    # Noise that stays inside of the range: PIL also cuts to it between its two passes (18/255 for noise of full contrast).
    grain = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)).mul(127).add(64).round()
    square, std = 56, torch.tensor(toy.STD).view(3, 1, 1)
    image = Image.fromarray(grain.permute(1, 2, 0).byte().numpy())
    target = tuple(int(square * side / min(size)) for side in size)
    pil = image.resize(target[::-1], Image.Resampling.BICUBIC)
    for half in (int, round):
        top, left = (half((side - square) / 2) for side in target)
        cut = np.array(pil)[top : top + square, left : left + square]
        got = preparation.clip_pixels(grain[None] / 255, square, half)[0]
        assert ((got - normalised(cut)) * std).abs().max() <= 4 / 255
    whole = tuple(round(side * square / max(size)) for side in size)
    frame = Image.new("RGB", (square, square))
    pil = image.resize(whole[::-1], Image.Resampling.BICUBIC)
    frame.paste(pil, ((square - whole[1]) // 2, (square - whole[0]) // 2))
    got = preparation.padded_pixels(grain[None] / 255, square)[0]
    assert ((got - normalised(np.array(frame))) * std).abs().max() <= 4 / 255


def normalised(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] of 8 bits to the towers' units [3, H, W]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (toy.MEAN, toy.STD))
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std


def test_half_precision_pictures_are_prepared_in_float32() -> None:
    picture = (toy.picture("large") / 255)[None]
    exact = preparation.clip_pixels(picture, toy.SIDE)
    for kind in (torch.float16, torch.bfloat16):
        got = preparation.clip_pixels(picture.to(kind), toy.SIDE)
        assert got.dtype == torch.float32 and (got - exact).abs().max() < 0.05


def test_weights_of_another_shape_than_the_configuration_are_one_line(root: Path, tmp_path: Path) -> None:
    state = load_file(root / "clip" / "model.safetensors")
    folder = toy.clip_folder(tmp_path / "clip", state)
    state["visual_projection.weight"] = torch.zeros(7, 160)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    of = reward("pickscore", path=str(folder))
    with pytest.raises(Exception, match=r"reward\.path=.*visual_projection\.weight \[7, 160\] instead of \[24, 160\]"):
        of.load()
