"""PickScore (arXiv 2305.01569): ``exp(logit_scale) cos(image, text)`` of a transformers ``CLIPModel`` trained on pairs of pictures.

Published weights: ``yuvalkirstain/PickScore_v1`` (scores about 22), whose tokenizer is that of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.
The bundled world's taste reward is the same class at toy size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from didr_core.config import Component, locate
from didr_core.rewards._clip import ClipReward, check_clip, load_clip


class PickScore(ClipReward):
    """A differentiable reward; text features are made once per prompt by reward-model actors."""

    class Config(Component):
        """`path`: a CLIPModel folder. `tokenizer`: folder of its tokenizer, by default the same."""

        name: str = "pickscore"
        path: str
        tokenizer: str | None = None

    def __init__(self, config: Config) -> None:
        self.folder = locate(config.path)
        self.tokenizer = locate(config.tokenizer or config.path)

    def check(self) -> None:
        """Raises DIDRError unless the folders hold a whole CLIPModel and a tokenizer."""
        check_clip(self.folder, self.tokenizer)

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load model and tokenizer, frozen."""
        self._towers = load_clip(self.folder, self.tokenizer, device)

    def factor(self) -> Tensor:
        """The trained temperature, 100 in the published weights."""
        scale: Tensor = self.towers.model.logit_scale.exp()
        return scale
