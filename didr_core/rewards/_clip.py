"""What the rewards with a CLIP inside share: a frozen float32 CLIPModel with its tokenizer, and unit-length features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from didr_core.config import Component, locate
from didr_core.networks.loading import check_model, load_pretrained, read_json
from didr_core.networks.tokenizers import check_tokenizer, read_tokenizer
from didr_core.rewards.images import clip_pixels
from didr_core.types import DIDRError, Tensors

CLIP_TENSORS = (
    "logit_scale",
    "visual_projection.weight",
    "text_projection.weight",
    "vision_model.embeddings.class_embedding",
    "text_model.embeddings.token_embedding.weight",
)
"""One tensor of each part of a CLIPModel."""


class Towers:
    """A ``CLIPModel`` and its tokenizer. ``pixels(images, size)`` prepares pictures."""

    def __init__(self, model: Any, tokenizer: Any, pixels: Callable[[Tensor, int], Tensor] = clip_pixels) -> None:
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit-length text features ``[B, D]``, float32. Prompts are cut at the tower's length, its end token kept."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        out = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(out.pooler_output.float(), dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Picture features ``[B, D]``, not normalised, of ``images [B, 3, H, W]`` in [0, 1]."""
        pixels = self.pixels(images, self.model.config.vision_config.image_size)
        pooled: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return pooled.float()

    def cosine(self, images: Tensor, text: Tensor) -> Tensor:
        """Cosines ``[B]`` of ``images [B, 3, H, W]`` in [0, 1] with unit-length ``text [B, D]``."""
        return (F.normalize(self.features(images), dim=-1) * text).sum(-1)


class ClipReward:
    """Base of rewards that are a factor times a cosine; a subclass loads ``_towers`` and says the factor."""

    differentiable = True
    _towers: Towers | None = None

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``{"text": [B, D]}``, unit length."""
        return {"text": self.towers.text(prompts)}

    def features(self, images: Tensor) -> Tensor:
        """Picture features ``[B, D]``, not normalised: what a Fréchet distance is measured in."""
        return self.towers.features(images)

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """Scores ``[B]`` on the published scale."""
        return self.factor() * self.towers.cosine(images, inputs["text"])

    def factor(self) -> Tensor | float:
        """From cosine to the published scale."""
        raise NotImplementedError

    @property
    def towers(self) -> Towers:
        """The loaded model.

        Raises:
            DIDRError: :meth:`load` was not called.
        """
        if self._towers is None:
            raise DIDRError(f"reward {type(self).__name__}: load() comes before prepare() and score()")
        return self._towers


class ClipFolderReward(ClipReward):
    """One whose weights are a transformers ``CLIPModel`` folder. The subclass names itself in its Config and says the factor."""

    class Config(Component):
        """`path`: a CLIPModel folder. `tokenizer`: folder of its tokenizer, by default the same."""

        path: str
        tokenizer: str | None = None

    def __init__(self, config: Config) -> None:
        self.folder = locate(config.path)
        self.tokenizer = locate(config.tokenizer or config.path)

    def check(self) -> None:
        """Raises DIDRError unless the folders hold a whole CLIPModel and a tokenizer."""
        check_clip(self.folder, self.tokenizer)

    def tokenizers(self) -> dict[Path, int]:
        """See :class:`didr_core.types.Reward`."""
        content = read_json("reward.path", self.folder / "config.json")
        return {self.tokenizer: content.get("text_config", {}).get("max_position_embeddings", 77)}

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load model and tokenizer, frozen."""
        self._towers = load_clip(self.folder, self.tokenizer, device)


def check_clip(folder: Path, tokenizer: Path) -> None:
    """Raises DIDRError unless ``folder`` holds a whole CLIPModel and ``tokenizer`` a tokenizer."""
    check_model("reward.path", folder, ("clip",), CLIP_TENSORS)
    check_tokenizer("reward.tokenizer", tokenizer)


def load_clip(folder: Path, tokenizer: Path, device: torch.device | str) -> Towers:
    """A CLIPModel folder in float32, frozen.

    Raises:
        DIDRError: see :func:`check_clip`, :func:`load_tokenizer`.
    """
    from transformers import CLIPModel

    check_clip(folder, tokenizer)
    model = load_pretrained("reward.path", CLIPModel, folder).to(device)
    return Towers(model, load_tokenizer(tokenizer, model))


def load_tokenizer(folder: Path, model: Any) -> Any:
    """The tokenizer in ``folder``, which must end prompts with the token that ``model`` (a CLIPModel) pools at.

    Raises:
        DIDRError: see :func:`read_tokenizer`; another vocabulary: the text features would silently be those of a wrong position.
    """
    tokenizer = read_tokenizer("reward.tokenizer", folder)
    text = model.config.text_config
    legacy = text.eos_token_id == 2  # transformers' sign for "the largest id", in configs written before 2023
    end = text.vocab_size - 1 if legacy else text.eos_token_id
    if tokenizer.eos_token_id != end or len(tokenizer) > text.vocab_size:
        raise DIDRError(
            f"reward.tokenizer={str(folder)!r}: ends prompts with token {tokenizer.eos_token_id} of {len(tokenizer)}, but the model "
            f"pools at token {end} of {text.vocab_size}. Expected the tokenizer that the model was trained with."
        )
    return tokenizer
