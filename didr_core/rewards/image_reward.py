"""ImageReward (arXiv 2304.05977): BLIP's picture tokens cross-attended by its text encoder, an MLP on [CLS], standardised.

Folder layout: ``vision/`` (BlipVisionModel), ``text/`` (BlipTextModel), ``head.safetensors`` (``layers.N.weight/bias``,
linear layers without activations, as published), tokenizer files, ``reward.json`` (``mean``, ``std``, ``max_length``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.config import Component, locate
from didr_core.contracts import DIDRError, Tensors
from didr_core.images import clip_pixels
from didr_core.weights import check_folder, quiet


class ImageReward:
    """A differentiable reward. The text tower needs the picture, so that actors prepare token ids, not features."""

    differentiable = True

    class Config(Component):
        """`path`: a folder in the layout above."""

        name: str = "image_reward"
        path: str

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = locate(config.path)
        self._vision: Any = None
        self._text: Any = None
        self._tokenizer: Any = None
        self._head: nn.Sequential | None = None
        self._settings: dict[str, Any] = {}

    def check(self) -> None:
        """Raises DIDRError unless the folder has the layout above."""
        check_folder("image_reward path", self.folder / "vision", "config.json", "model_type", ("blip_vision_model",))
        check_folder("image_reward path", self.folder / "text", "config.json", "model_type", ("blip_text_model",))
        for file in ("head.safetensors", "reward.json"):
            if not (self.folder / file).is_file():
                raise DIDRError(
                    f"image_reward path={str(self.folder)!r}: {file} is missing; see the layout in didr_core/rewards/image_reward.py."
                )

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load towers, head and tokenizer, frozen."""
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.check()
        quiet()
        self._settings = json.loads((self.folder / "reward.json").read_text())
        self._vision = (
            BlipVisionModel.from_pretrained(self.folder / "vision", dtype=torch.float32)
            .to(device)
            .eval()
            .requires_grad_(False)
        )
        text = BlipTextModel.from_pretrained(self.folder / "text", add_pooling_layer=False, dtype=torch.float32)
        self._text = text.to(device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
        weights = load_file(self.folder / "head.safetensors")
        keys = sorted((k for k in weights if k.endswith(".weight")), key=lambda k: int(k.split(".")[-2]))
        layers: list[nn.Module] = []
        for key in keys:
            out_features, in_features = weights[key].shape
            layer = nn.Linear(in_features, out_features)
            layer.load_state_dict(
                {"weight": weights[key].float(), "bias": weights[key.replace("weight", "bias")].float()}
            )
            layers.append(layer)
        self._head = nn.Sequential(*layers).to(device).eval().requires_grad_(False)

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``{"ids": [B, L], "mask": [B, L]}``."""
        if self._tokenizer is None:
            raise DIDRError("reward image_reward: load() comes before prepare() and score()")
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._settings["max_length"],
            truncation=True,
            return_tensors="pt",
        )
        return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}

    def features(self, images: Tensor) -> Tensor:
        """Pooled features ``[B, D]`` of pictures ``[B, 3, H, W]`` in [0, 1], for feature distances."""
        if self._vision is None:
            raise DIDRError("reward image_reward: load() comes before features()")
        pooled: Tensor = self._vision(pixel_values=clip_pixels(images, self._vision.config.image_size)).pooler_output
        return pooled.float()

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """Scores ``[B]``, standardised as published."""
        if self._head is None:
            raise DIDRError("reward image_reward: load() comes before prepare() and score()")
        pixels = clip_pixels(images, self._vision.config.image_size)
        tokens = self._vision(pixel_values=pixels).last_hidden_state
        seen = torch.ones(tokens.shape[:-1], dtype=torch.long, device=tokens.device)
        out = self._text(
            input_ids=inputs["ids"],
            attention_mask=inputs["mask"],
            encoder_hidden_states=tokens,
            encoder_attention_mask=seen,
            return_dict=True,
        )
        raw = self._head(out.last_hidden_state[:, 0].float()).squeeze(-1)
        return (raw - self._settings["mean"]) / self._settings["std"]
