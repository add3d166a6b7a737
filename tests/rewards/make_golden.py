"""Makes golden_rewards.json: what upstream's own packages say of the toy models, pictures and prompts of tests/toy_rewards.py.

Not a test and not run by them. Upstream's packages pin old ones, so that they get an environment of their own (any CPU build of torch):

    python -m venv golden
    golden/bin/pip install torch==2.13.0 transformers==4.49.0 ftfy==6.3.1 pillow requests clint lightning-utilities
    golden/bin/pip install setuptools==69.5.1  # newer ones lack pkg_resources, which clip imports
    golden/bin/pip install --no-deps --no-build-isolation torchvision==0.28.0 timm==0.6.13 fairscale==0.4.13 torchmetrics==1.9.0 \
        hpsv2==1.2.0 image-reward==1.5 clip-anytorch==2.6.0
    golden/bin/python tests/rewards/make_golden.py

Upstream's code scores; only its weights, sizes and vocabularies are replaced by ours. For each reward and picture:

- ``official``: the package's own call on a PIL picture, with PIL's rounding to 8 bits wherever it resizes;
- ``exact``: the same model behind the same transforms on float tensors, which differ by that rounding alone. Where upstream's PIL cuts
  to [0, 1] after a resize, so does this, straight-through, as the trainer does (HPSv2 resizes float tensors and cuts nothing);
- ``gradient``: of the sum of ``exact`` in the picture, by :func:`toy_rewards.along`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
SITE = Path(torch.__file__).parents[1]
sys.path.insert(0, str(HERE.parent))
warnings.filterwarnings("ignore")

import toy_rewards as toy  # noqa: E402

# torchvision's wheels are of CUDA builds, whose compiled operators a CPU build of torch does not find; nothing here calls them.
operators = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
# `ImageReward` without its __init__, which imports a trainer and its many packages.
sys.modules["ImageReward"] = types.ModuleType("ImageReward")
sys.modules["ImageReward"].__path__ = [str(SITE / "ImageReward")]

Official = Callable[[Any, str], float]
Exact = Callable[[Tensor, str], Tensor]
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "hpsv2",
    "image-reward",
    "clip-anytorch",
    "torchmetrics",
    "timm",
    "ftfy",
)


def cut(pixels: Tensor) -> Tensor:
    """clamp(0, 1), straight-through."""
    return pixels + (pixels.clamp(0, 1) - pixels).detach()


def through(transforms: list[Any], pixels: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] through torchvision's Resize, CenterCrop and Normalize of an upstream pipeline, as PIL would without rounding."""
    for transform in transforms:
        if type(transform).__name__ in ("Resize", "CenterCrop", "Normalize"):
            pixels = transform(pixels)
        if type(transform).__name__ == "Resize":
            pixels = cut(pixels)
    return pixels[None]


def hpsv2(root: Path) -> tuple[Official, Exact]:
    toy.bpe_file(SITE / "hpsv2" / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz")  # the wheel forgot it
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    (v, layers, _, patch, _), (t, t_layers, _, _, words) = toy.TINY_H["vision"], toy.TINY_H["text"]
    factory._MODEL_CONFIGS["ViT-H-14"] = {
        "embed_dim": toy.TINY_H["out"],
        "vision_cfg": {"image_size": toy.SIDE, "layers": layers, "width": v, "head_width": 80, "patch_size": patch},
        "text_cfg": {"context_length": 77, "vocab_size": words, "width": t, "heads": t // 64, "layers": t_layers},
    }
    # As img_score.initialize_model, without the download.
    made = img_score.create_model_and_transforms("ViT-H-14", light_augmentation=True, aug_cfg={}, output_dict=True)
    img_score.model_dict.update(model=made[0], preprocess_val=made[2])
    file = str(root / "hps" / "HPS_v2.1_compressed.pt")
    made[0].load_state_dict(torch.load(file)["state_dict"])
    _, _, *transforms = made[2].transforms  # all behind ToTensor

    def exact(pixels: Tensor, prompt: str) -> Tensor:
        for transform in transforms:
            pixels = transform(pixels)
        out = made[0](pixels[None], img_score.get_tokenizer("ViT-H-14")([prompt]))
        return 100 * (out["image_features"] @ out["text_features"].T).squeeze()

    return lambda image, prompt: 100 * img_score.score(image, prompt, cp=file)[0], exact


def image_reward(root: Path) -> tuple[Official, Exact]:
    from ImageReward import ImageReward as upstream
    from ImageReward.models.BLIP import blip, blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    (v, layers, _, patch, _), (t, t_layers, t_hidden, places, words) = toy.TINY_BLIP["vision"], toy.TINY_BLIP["text"]
    tower = VisionTransformer(img_size=toy.SIDE, patch_size=patch, embed_dim=v, depth=layers, num_heads=v // 64)
    blip_pretrain.create_vit = lambda *_: (tower, v)
    folder, load = str(root / "ir"), blip.BertTokenizer.from_pretrained
    blip.BertTokenizer.from_pretrained = lambda _: load(folder)
    med = {"hidden_size": t, "num_hidden_layers": t_layers, "intermediate_size": t_hidden, "num_attention_heads": 1}
    med |= {"max_position_embeddings": places, "vocab_size": words, "add_cross_attention": True, "hidden_act": "gelu"}
    (root / "med_config.json").write_text(json.dumps(med | {"layer_norm_eps": 1e-12}))
    model = upstream.ImageReward(str(root / "med_config.json"))
    model.mlp, model.preprocess = upstream.MLP(t), upstream._transform(toy.SIDE)
    missing, unexpected = model.load_state_dict(torch.load(root / "ir" / "ImageReward.pt"), strict=False)
    assert all("_proj." in name and ".attn." not in name for name in missing), missing
    assert all(name.endswith("position_ids") for name in unexpected), unexpected
    model.eval()

    def exact(pixels: Tensor, prompt: str) -> Tensor:
        settings = {
            "padding": "max_length",
            "truncation": True,
            "max_length": 35,
            "return_tensors": "pt",
        }  # of its score
        text = model.blip.tokenizer(prompt, **settings)
        ready = through(model.preprocess.transforms, pixels)
        return model.score_gard(text.input_ids, text.attention_mask, ready).squeeze()

    return lambda image, prompt: model.score(prompt, image), exact


def aesthetic(root: Path, relu: bool) -> tuple[Official, Exact]:
    import clip

    upstream = importlib.import_module("ImageReward.models.AestheticScore")
    load = clip.load
    clip.load = lambda _, device, jit, download_root: load(str(root / "openai.pt"), device=device, jit=jit)
    model = upstream.AestheticScore(str(root))
    clip.load = load
    # The activations of the published ReLU head stand in its class as comments.
    source = inspect.getsource(upstream.MLP).replace("#nn.ReLU()", "nn.ReLU()" if relu else "#nn.ReLU()")
    exec(source, upstream.__dict__)
    model.mlp = upstream.MLP(toy.TINY_H["out"])
    file = "ava+logos-l14-reluMSE.pth" if relu else "sac+logos+ava1-l14-linearMSE.pth"
    model.mlp.load_state_dict(torch.load(root / file))
    model.eval()

    def official(image: Any, prompt: str) -> float:
        image.save(root / "picture.png")
        return model.score(prompt, str(root / "picture.png"))

    def exact(pixels: Tensor, prompt: str) -> Tensor:
        features = model.clip_model.encode_image(through(model.preprocess.transforms, pixels))
        return model.mlp(upstream.F.normalize(features).float()).squeeze()

    return official, exact


def clip_folder(root: Path, name: str) -> tuple[Official, Exact]:
    """PickScore by the lines of its model card, CLIPScore by torchmetrics (before its cut at 0)."""
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from torchvision.transforms import Normalize, Resize
    from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(root / "clip")
    model = CLIPModel.from_pretrained(root / "clip").eval().requires_grad_(False)
    factor = model.logit_scale.exp() if name == "pickscore" else 100.0
    settings = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    unit = torch.nn.functional.normalize

    def score(pixel_values: Tensor, prompt: str) -> Tensor:
        text = unit(model.get_text_features(**processor(text=prompt, **settings)), dim=-1)
        return (factor * text @ unit(model.get_image_features(pixel_values=pixel_values), dim=-1).T).squeeze()

    def official(image: Any, prompt: str) -> float:
        if name == "pickscore":
            return score(processor(images=image, **settings)["pixel_values"], prompt).item()
        return _clip_score_update(pil_to_tensor(image), prompt, model, processor)[0].item()

    def exact(pixels: Tensor, prompt: str) -> Tensor:
        small = cut(Resize(toy.SIDE, InterpolationMode.BICUBIC)(pixels))
        top, left = (small.shape[1] - toy.SIDE) // 2, (small.shape[2] - toy.SIDE) // 2  # of transformers' center_crop
        small = small[:, top : top + toy.SIDE, left : left + toy.SIDE]
        return score(Normalize(toy.MEAN, toy.STD)(small)[None], prompt)

    return official, exact


def main() -> None:
    """Writes golden_rewards.json beside this file."""
    from PIL import Image

    root = toy.write(Path(tempfile.mkdtemp()))
    rewards = {
        "hpsv2": hpsv2(root),
        "image_reward": image_reward(root),
        "aesthetic": aesthetic(root, relu=False),
        "aesthetic relu": aesthetic(root, relu=True),
        "pickscore": clip_folder(root, "pickscore"),
        "clip_score": clip_folder(root, "clip_score"),
    }
    values: dict[str, Any] = {}
    for name, (official, exact) in rewards.items():
        for shape in toy.PICTURES:
            whole = toy.picture(shape)
            image = Image.fromarray(whole.permute(1, 2, 0).byte().numpy())
            # torchmetrics slices the end token off long prompts, and pools at the first: not comparable.
            prompts = toy.PROMPTS[:-1] if name == "clip_score" else toy.PROMPTS
            prompts = [""] if name.startswith("aesthetic") else prompts
            leaf = (whole / 255).requires_grad_()
            scores = torch.stack([exact(leaf, prompt) for prompt in prompts])
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
            values.setdefault(name, {})[shape] = {
                "official": [round(float(official(image, prompt)), 6) for prompt in prompts],
                "exact": [round(score, 6) for score in scores.tolist()],
                "gradient": [float(f"{product:.6g}") for product in toy.along(gradient)],
            }
    shutil.rmtree(root)
    packages = {package: version(package) for package in PACKAGES}
    content = json.dumps({"made by": "tests/rewards/make_golden.py", "packages": packages, "values": values}, indent=1)
    content = re.sub(r"\[[^]]*\]", lambda numbers: " ".join(numbers[0].split()), content)  # a list a line
    (HERE / "golden_rewards.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
