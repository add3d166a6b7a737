"""LAION's aesthetic predictor, version 2 (improved-aesthetic-predictor): a head on unit-length picture features of CLIP ViT-L/14.

Scores are on the 1 to 10 of the people who rated its training pictures, not bounded to it. The prompt is not looked at, so that alone it
rewards one pretty picture for everything: use it as a part of a composite, or as a judge. Published weights:
``sac+logos+ava1-l14-linearMSE.pth`` (or a sibling of it, ``ava+logos-l14-reluMSE.pth`` with its ReLUs) and
``openai/clip-vit-large-patch14``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from didr_core.config import Component, locate
from didr_core.networks.loading import check_model, find_file, load_pretrained, read_state
from didr_core.rewards._head import linear_head, linear_layers
from didr_core.rewards.images import clip_pixels
from didr_core.types import DIDRError, Tensors

FILE = "sac+logos+ava1-l14-linearMSE.pth"


class Aesthetic:
    """A differentiable reward without text."""

    differentiable = True

    class Config(Component):
        """`path`: the published head, or a folder with it. `clip`: folder of the CLIPModel that it was trained on."""

        name: str = "aesthetic"
        path: str
        clip: str

    def __init__(self, config: Config) -> None:
        self.path, self.folder = locate(config.path), locate(config.clip)
        self._vision: Any = None
        self._head: nn.Sequential | None = None

    def check(self) -> None:
        """Raises DIDRError unless the head is whole and fits the CLIP. Reads no weights but the head's."""
        self._checked()

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load picture tower and head, frozen, float32; the text tower is left out."""
        from transformers import CLIPVisionModelWithProjection

        state, file, width = self._checked()
        self._head = linear_head("reward.path", file, state).to(device)
        tower = load_pretrained("reward.clip", CLIPVisionModelWithProjection, self.folder, projection_dim=width)
        self._vision = tower.to(device)

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Nothing: ``{}``."""
        return {}

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """Scores ``[B]``, about 1 to 10."""
        if self._head is None:
            raise DIDRError("reward aesthetic: load() comes before score()")
        pixels = clip_pixels(images, self._vision.config.image_size, round)
        features = self._vision(pixel_values=pixels).image_embeds.float()
        scores: Tensor = self._head(F.normalize(features, dim=-1)).squeeze(-1)
        return scores

    def _checked(self) -> tuple[dict[str, Tensor], Path, int]:
        file = find_file("reward.path", self.path, [FILE])
        state = read_state("reward.path", file)
        width = linear_layers("reward.path", file, state)[0][1][1]
        content = check_model("reward.clip", self.folder, ("clip", "clip_vision_model"), ("visual_projection.weight",))
        # A CLIPModel goes by its own `projection_dim`, whatever (or nothing) its parts say; 512 is transformers' default.
        parts = (content, content.get("vision_config"))
        said = [part.get("projection_dim") for part in parts if isinstance(part, dict)]
        gives = next(filter(None, said), 512)
        if width not in (gives, *said):
            raise DIDRError(
                f"reward.clip={str(self.folder)!r}: its picture features have {gives} numbers, the head {file.name} takes {width}. "
                "Expected the CLIP that the head was trained on (openai/clip-vit-large-patch14: 768)."
            )
        return state, file, width
