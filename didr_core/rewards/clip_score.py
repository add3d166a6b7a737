"""CLIPScore (arXiv 2104.08718) as text-to-image tables report it: ``100 cos(image, text)``.

Published weights: any ``CLIPModel``, e.g. ``openai/clip-vit-large-patch14``. The paper's own unit is ``2.5 max(cos, 0)`` and torchmetrics
cuts at 0 as well; without the cut a picture that does not fit at all still has a gradient.
"""

from __future__ import annotations

import torch

from didr_core.config import Component, locate
from didr_core.rewards._clip import ClipReward, check_clip, load_clip


class ClipScore(ClipReward):
    """A differentiable reward of agreement with the prompt, blind to beauty; usual as a judge or as a part of a composite."""

    class Config(Component):
        """`path`: a CLIPModel folder. `tokenizer`: folder of its tokenizer, by default the same."""

        name: str = "clip_score"
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

    def factor(self) -> float:
        """100."""
        return 100.0
