"""ImageReward (arXiv 2304.05977): BLIP's picture tokens cross-attended by its text encoder, a linear head on [CLS], standardised.

Two layouts. The published ``ImageReward.pt`` (``THUDM/ImageReward``), with ``tokenizer`` naming a folder of bert-base-uncased's tokenizer.
Or a folder of ours: ``vision/`` (BlipVisionModel), ``text/`` (BlipTextModel), ``head.safetensors`` (``layers.N.weight/bias``), tokenizer
files, ``reward.json`` (``mean``, ``std``, ``max_length``). Scores are standardised with the published mean and deviation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.config import Component, locate
from didr_core.networks.loading import (
    check_folder,
    check_model,
    find_file,
    load_pretrained,
    read_state,
)
from didr_core.networks.tokenizers import check_tokenizer, read_tokenizer
from didr_core.rewards import _blip
from didr_core.rewards._head import linear_head, linear_layers
from didr_core.rewards.images import clip_pixels
from didr_core.types import DIDRError, Tensors

FILE = "ImageReward.pt"
PUBLISHED = {"mean": 0.16717362830052426, "std": 1.0333394966054072, "max_length": 35}
"""Constants of upstream's ImageReward.py."""


class ImageReward:
    """A differentiable reward. The text tower needs the picture, so that actors prepare token ids, not features."""

    differentiable = True

    class Config(Component):
        """`path`: the published file, or a folder with it, or a folder in our layout. `tokenizer`: folder of its tokenizer, by default the
        folder of `path`."""

        name: str = "image_reward"
        path: str
        tokenizer: str | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = locate(config.path)
        self._vision: Any = None
        self._text: Any = None
        self._tokenizer: Any = None
        self._head: nn.Sequential | None = None
        self._settings: dict[str, Any] = {}

    @property
    def published(self) -> bool:
        """Whether `path` is upstream's single file (or a folder with it)."""
        return not (self.path / "vision").is_dir() and (self.path.is_file() or (self.path / FILE).is_file())

    def check(self) -> None:
        """Raises DIDRError unless `path` is whole, in one of the two layouts. Reads no weights."""
        if self.published:
            file = find_file("reward.path", self.path, [FILE])
            _blip.check(file, read_state("reward.path", file))
            check_tokenizer("reward.tokenizer", self._tokenizer_folder())
            return
        if not self.path.is_dir():
            find_file("reward.path", self.path, [FILE])
        check_model("reward.path", self.path / "vision", ("blip_vision_model",))
        check_model("reward.path", self.path / "text", ("blip_text_model",))
        head = find_file("reward.path", self.path, ["head.safetensors"])
        linear_layers("reward.path", head, read_state("reward.path", head))
        settings = check_folder("reward.path", self.path, "reward.json", "max_length", [*range(1, 513)])
        if not all(isinstance(settings.get(k), int | float) for k in ("mean", "std")) or not settings["std"]:
            raise DIDRError(
                f"reward.path={str(self.path)!r}: reward.json says {settings}; expected mean, and std above 0."
            )
        check_tokenizer("reward.tokenizer", self._tokenizer_folder())

    def tokenizers(self) -> dict[Path, int]:
        """See :class:`didr_core.types.Reward`."""
        settings = PUBLISHED if self.published else json.loads((self.path / "reward.json").read_text())
        return {self._tokenizer_folder(): int(settings["max_length"])}

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load towers, head and tokenizer, frozen, float32."""
        from transformers import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.check()
        if self.published:
            file = find_file("reward.path", self.path, [FILE])
            state = read_state("reward.path", file)
            self._settings = dict(PUBLISHED)
            vision, text = _blip.convert(state)
            head = linear_head("reward.path", file, state, "mlp.layers.")
        else:
            self._settings = json.loads((self.path / "reward.json").read_text())
            vision = load_pretrained("reward.path", BlipVisionModel, self.path / "vision")
            text = load_pretrained("reward.path", BlipTextModel, self.path / "text", add_pooling_layer=False)
            file = self.path / "head.safetensors"
            head = linear_head("reward.path", file, read_state("reward.path", file))
        self._vision, self._text, self._head = vision.to(device), text.to(device), head.to(device)
        self._tokenizer = read_tokenizer("reward.tokenizer", self._tokenizer_folder())
        if len(self._tokenizer) > text.config.vocab_size:
            raise DIDRError(
                f"reward.tokenizer={str(self._tokenizer_folder())!r}: has {len(self._tokenizer)} tokens, the text tower "
                f"{text.config.vocab_size}. Expected the tokenizer that the model was trained with (bert-base-uncased)."
            )

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
        pixels = clip_pixels(images, self._vision.config.image_size, round)
        pooled: Tensor = self._vision(pixel_values=pixels).pooler_output
        return pooled.float()

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """Scores ``[B]``, standardised as published."""
        if self._head is None:
            raise DIDRError("reward image_reward: load() comes before prepare() and score()")
        pixels = clip_pixels(images, self._vision.config.image_size, round)
        tokens = self._vision(pixel_values=pixels).last_hidden_state
        seen = torch.ones(tokens.shape[:-1], dtype=torch.long, device=tokens.device)
        out = self._text(
            input_ids=inputs["ids"].to(tokens.device),
            attention_mask=inputs["mask"].to(tokens.device),
            encoder_hidden_states=tokens,
            encoder_attention_mask=seen,
            return_dict=True,
        )
        raw: Tensor = self._head(out.last_hidden_state[:, 0].float()).squeeze(-1)
        return (raw - self._settings["mean"]) / self._settings["std"]

    def _tokenizer_folder(self) -> Path:
        if self.config.tokenizer:
            return locate(self.config.tokenizer)
        return self.path.parent if self.path.is_file() else self.path
