"""The reward alone (ReFL, arXiv 2304.05977, and R0, arXiv 2503.13070, at one step): what reward hacking looks like, nothing to be used.

Nothing keeps the generator near the reference, so the reward's blind spots are found first. R0 answers with regularised weights and
several rewards; here only the anchor (`train.anchor`) can be added.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.algorithms._clean_reward import clean_reward
from didr_core.config import Component
from didr_core.types import GeneratorContext


class RewardOnly:
    """``min E[-weight r(g(z))]``, or ReFL's ``weight max(0, margin - r)`` where a margin is given.

    Needs: the gradient of a differentiable reward through the decoder; neither TA nor reference, so the TA is not trained.
    Costs: generator, decoder and reward, forward and backward: the cheapest update of all.
    """

    needs_reward = True
    needs_reward_gradient = True
    needs_assistant = False

    class Config(Component):
        """`weight` and `margin`; see their descriptions in `didr config show`."""

        name: str = "reward_only"
        weight: float = Field(
            1.0,
            gt=0,
            description="loss per standard deviation of the starting generator's reward; Adam divides it out again, so it matters only"
            " against train.anchor and the gradient clip",
        )
        margin: float | None = Field(
            None,
            description="reward above which a picture is left alone, in standard deviations above the starting generator's mean; none ="
            " no end",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """``-weight r(x0)`` or ``weight max(0, margin - r(x0))``, per sample ``[B]``."""
        margin = self.config.margin
        reward, _ = clean_reward(ctx)
        loss = -reward if margin is None else losses.hinge(reward, margin)
        metrics = {} if margin is None else {"reward/reached": (reward.detach() >= margin).to(reward.dtype)}
        return self.config.weight * loss, metrics
