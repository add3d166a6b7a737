"""PickScore (arXiv 2305.01569): ``exp(logit_scale) cos(image, text)`` of a transformers ``CLIPModel`` trained on pairs of pictures.

Published weights: ``yuvalkirstain/PickScore_v1`` (scores about 22). The bundled world's taste reward is the same class at toy size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from didr_core.config import Component, locate
from didr_core.contracts import DIDRError, Tensors
from didr_core.images import clip_pixels
from didr_core.weights import check_folder, quiet


class PickScore:
    """A differentiable reward; text features are made once per prompt by reward-model actors."""

    differentiable = True

    class Config(Component):
        """`path`: a CLIPModel folder with its tokenizer."""

        name: str = "pickscore"
        path: str

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = locate(config.path)
        self._model: Any = None
        self._tokenizer: Any = None

    def check(self) -> None:
        """Raises DIDRError unless the folder holds a CLIPModel."""
        check_folder("reward.path", self.folder, "config.json", "model_type", ("clip",))

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load model and tokenizer, frozen."""
        from transformers import AutoTokenizer, CLIPModel

        self.check()
        quiet()
        self._model = (
            CLIPModel.from_pretrained(self.folder, dtype=torch.float32).to(device).eval().requires_grad_(False)
        )
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``{"text": [B, D]}``, unit length."""
        model = self._loaded()
        length = model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            features = model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        return {"text": F.normalize(features.float(), dim=-1)}

    def features(self, images: Tensor) -> Tensor:
        """Picture features ``[B, D]``, not normalised, of pictures ``[B, 3, H, W]`` in [0, 1]."""
        model = self._loaded()
        pixels = clip_pixels(images, model.config.vision_config.image_size)
        pooled: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
        return pooled.float()

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """Scores ``[B]`` on PickScore's scale."""
        features = F.normalize(self.features(images), dim=-1)
        return self._loaded().logit_scale.exp() * (features * inputs["text"]).sum(-1)  # type: ignore[no-any-return]

    def _loaded(self) -> Any:
        if self._model is None:
            raise DIDRError("reward pickscore: load() comes before prepare() and score()")
        return self._model
