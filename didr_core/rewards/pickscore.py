"""PickScore (arXiv 2305.01569): ``exp(logit_scale) cos(image, text)`` of a transformers ``CLIPModel`` trained on pairs of pictures.

Published weights: ``yuvalkirstain/PickScore_v1`` (scores about 22), whose tokenizer is that of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.
The bundled world's taste reward is the same class at toy size.
"""

from __future__ import annotations

from torch import Tensor

from didr_core.rewards._clip import ClipFolderReward


class PickScore(ClipFolderReward):
    """A differentiable reward; text features are made once per prompt by reward-model actors."""

    class Config(ClipFolderReward.Config):
        """`path`, `tokenizer`: see :class:`didr_core.rewards._clip.ClipFolderReward`."""

        name: str = "pickscore"

    def factor(self) -> Tensor:
        """The trained temperature, 100 in the published weights."""
        scale: Tensor = self.towers.model.logit_scale.exp()
        return scale
