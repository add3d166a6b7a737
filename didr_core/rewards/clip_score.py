"""CLIPScore (arXiv 2104.08718) as text-to-image tables report it: ``100 cos(image, text)``.

Published weights: any ``CLIPModel``, e.g. ``openai/clip-vit-large-patch14``. The paper's own unit is ``2.5 max(cos, 0)`` and torchmetrics
cuts at 0 as well; without the cut a picture that does not fit at all still has a gradient. Prompts past the text tower's 77 tokens keep
their end token here, as CLIP was trained; torchmetrics slices it off, pools elsewhere and gives other scores for them.
"""

from __future__ import annotations

from didr_core.rewards._clip import ClipFolderReward


class ClipScore(ClipFolderReward):
    """A differentiable reward of agreement with the prompt, blind to beauty; usual as a judge or as a part of a composite."""

    class Config(ClipFolderReward.Config):
        """`path`, `tokenizer`: see :class:`didr_core.rewards._clip.ClipFolderReward`."""

        name: str = "clip_score"

    def factor(self) -> float:
        """100."""
        return 100.0
