"""The analytic checker as a reward: reads the picture with rules, so it has no gradient. Like a person's verdict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from didr_core.config.registry import Component
from didr_core.types import DIDRError, Tensors
from didr_core.world import assess

LONGEST = 128  # bytes of a caption; the world's longest has 76


class CheckerReward:
    """A black box: needs an estimator that differentiates no reward (`drp.estimator=importance`)."""

    differentiable = False

    class Config(Component):
        """Nothing to set: the score is the world's utility (faithfulness, then size and contrast)."""

        name: str = "didr_core.world.checker_reward:CheckerReward"

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing to load."""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``caption [B, 128]``: the text itself, UTF-8 bytes padded with zeros.

        Raises:
            DIDRError: a prompt that is no caption of the bundled world.
        """
        rows = torch.zeros(len(prompts), LONGEST, dtype=torch.uint8)
        for row, prompt in zip(rows, prompts, strict=True):
            try:
                assess.parse_caption(prompt)
            except ValueError as error:
                raise DIDRError(
                    f"reward.name={self.config.name!r}: prompt {prompt!r} is not a caption of the bundled world ({error}). "
                    "Use data.prompts=world://prompts/train, or another reward."
                ) from error
            text = prompt.encode()
            row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {"caption": rows}

    @torch.no_grad()
    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``[B, 3, 32, 32]`` to the utility ``[B]``; NaN where the picture is not finite, so that the run stops and names the prompt."""
        captions = [bytes(row).rstrip(b"\0").decode() for row in inputs["caption"].cpu().numpy()]
        pictures = images.detach().float().cpu()
        broken = ~pictures.flatten(1).isfinite().all(1)
        readable = pictures.masked_fill(broken[:, None, None, None], 0.0)
        scores = torch.from_numpy(assess.utility(readable.numpy(), captions))
        return scores.masked_fill(broken, float("nan")).to(images.device)
