"""The backbone and the rewards of a recipe without their weights: real classes around networks on the meta device (or random ones).

Architectures come from the configs in the folders that a recipe names; where there is no such folder, from the published sizes. So a
plan needs neither weights nor a GPU, and the code that is planned is the code that trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.backbones._pipeline import PipelineBackbone, read_json
from didr_core.config import Component, locate, registry
from didr_core.config.schema import leaves
from didr_core.networks.loading import quiet
from didr_core.plan import published
from didr_core.rewards import images
from didr_core.types import Condition, Scored, Tensors

CLIP_H = ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024)
CLIP_L = ((1024, 24, 16, 4096), (768, 12, 12, 3072), 768)
REWARDS = {"hpsv2": CLIP_H, "pickscore": CLIP_H, "clip_score": CLIP_L, "aesthetic": CLIP_L, "image_reward": CLIP_L}
"""Vision and text tower (width, layers, heads, inner width) and projection. ImageReward's BLIP is a ViT-L/16 and a 12-layer text tower
with cross-attention: CLIP ViT-L/14 stands in for it (427M parameters for 447M)."""


class _Hollow:
    """Before a family's own class in the order of methods: everything but reading weights is the family's."""

    where = "meta"

    def check(self) -> None:
        """Nothing: there are no weights to look at."""

    def load_network(self: Any, role: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(role == "generator")  # where there are weights: the TA starts as the reference
            return super().load_network(role)  # type: ignore[misc, no-any-return]

    def _pretrained(self: Any, name: str, folder: Path, dtype: torch.dtype) -> Any:
        file = folder / "config.json"
        config = read_json(file) if file.is_file() else self.network_config
        return from_config(name, config, self.where).to(dtype)

    def _from_file(self: Any, path: Path) -> nn.Module:
        with torch.device(self.where):
            return self._empty()  # type: ignore[no-any-return]

    def _merged(self: Any, network: nn.Module) -> nn.Module:
        return network

    def load_text(self: Any) -> None:
        index = read_json(self.folder / "model_index.json")
        folders = [self.folder / part for part in index if part.startswith("text_encoder")]
        towers = [from_config(read_json(f / "config.json")["architectures"][0], f, self.where) for f in folders]
        self._text = nn.ModuleList(towers).to(getattr(torch, self._options.text_dtype))

    def encode(self: Any, prompts: Sequence[str]) -> Condition:
        return self.blank(len(prompts))  # type: ignore[no-any-return]


def backbone(config: Component, folder: Path, where: str = "meta") -> Any:
    """The backbone of ``config`` around networks on the device ``where``; None for families that do not say how to plan them (``blank``).

    Args:
        folder: an empty one, for the configs of the published sizes. It must last as long as the backbone.
    """
    family = registry.find("backbones", config.name)
    if not issubclass(family, PipelineBackbone) or family.blank is PipelineBackbone.blank:
        return None
    quiet()
    options: Any = config
    absent = {key: not _there(getattr(options, key)) for key in ("pipeline", "vae", "decoder")}
    if any(absent.values()) and config.name not in published.PARTS:
        return None
    if any(absent.values()):
        published.write(config.name, folder)
        own = {"pipeline": folder, "vae": folder / "vae", "decoder": folder / "decoder"}
        options = options.model_copy(update={key: str(own[key]) for key, missing in absent.items() if missing})
    return type(family.__name__, (_Hollow, family), {"where": where})(options)


def _there(path: str | None) -> bool:
    """Whether the configs of a folder are here; of none, there is nothing to miss."""
    return path is None or any((locate(path) / name).is_file() for name in ("model_index.json", "config.json"))


def from_config(name: str, config: Any, where: str = "meta") -> Any:
    """A network of a class of diffusers (``config``: its settings) or transformers (its folder), eval, on the device ``where``."""
    import diffusers
    import transformers

    with torch.device(where):
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_config(config).eval()
        make = getattr(transformers, name)
        return make(make.config_class.from_pretrained(config)).eval()


class Reward(nn.Module):
    """CLIP models of the sizes of a reward's parts: pictures are resized and seen by each vision tower. ``unknown``: parts not counted;
    ``away``: keys of parts, or of the whole, that are scored elsewhere."""

    differentiable = True
    details: None = None
    features: None = None

    def __init__(self, config: Component | None, where: str = "meta", away: Collection[str] = ()) -> None:
        super().__init__()
        self.models = nn.ModuleList()
        self.unknown: list[str] = []
        self.begin = self._begin if away else None
        parts = leaves("reward", config) if config is not None and "reward" not in away else {}
        for part in (part for key, part in parts.items() if key not in away):
            settings = _clip_settings(part)
            if settings is None:
                self.unknown.append(part.name)
                continue
            from transformers import CLIPModel

            with torch.device(where):
                self.models.append(CLIPModel(settings).eval().requires_grad_(False))

    def score(self, pictures: Tensor, inputs: Tensors) -> Tensor:
        """``[B]``, of the right cost."""
        total = pictures.flatten(1).mean(1) if self.begin else pictures.new_zeros(len(pictures))
        for model in self.models:
            tower: Any = model.vision_model
            pixels = images.clip_pixels(pictures, tower.config.image_size)
            total = total + tower(pixels).pooler_output.mean(1)
        return total

    def _begin(self, pictures: Tensor, inputs: Tensors, weight: Tensor | None) -> Callable[[], Scored]:
        return lambda: (self.score(pictures, inputs), {})


def _clip_settings(part: Component) -> Any:
    """The CLIP model of a reward: of its own folder where it names one that is here, else of the published size; None: not known."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    folder = getattr(part, "clip", None) or getattr(part, "path", None)
    file = locate(folder) / "config.json" if folder else None
    if file and file.is_file() and json.loads(file.read_text()).get("model_type") == "clip":
        return CLIPConfig.from_pretrained(file.parent)
    if part.name not in REWARDS:
        return None
    vision, text, projection = REWARDS[part.name]

    def tower(make: Any, sizes: tuple[int, int, int, int], **more: Any) -> Any:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return make(**dict(zip(names, sizes, strict=True)), **more).to_dict()

    eyes = tower(CLIPVisionConfig, vision, patch_size=14, image_size=224)
    return CLIPConfig(text_config=tower(CLIPTextConfig, text), vision_config=eyes, projection_dim=projection)
