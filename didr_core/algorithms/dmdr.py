"""DMDR-style (arXiv 2511.13649): DMD2's distribution matching as the regulariser of a hinge on the clean picture's reward."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.algorithms._clean_reward import clean_reward, pull
from didr_core.config import Component
from didr_core.diffusion.schedule import expand
from didr_core.types import GeneratorContext


class DMDR:
    """``L_DMD + weight max(0, margin - r(g(z)))``: DMD2's gradient, and ReFL's (arXiv 2304.05977) on pictures below the margin.

    With ``weight = 0`` it is DMD2, with a margin that no picture reaches it is DI++ with the normaliser. Left out of the paper's recipe:
    the cold start with dynamic guidance and dynamic renoising, and its policy-gradient variants for rewards without a gradient.

    Needs: TA and reference without gradient, and the gradient of a differentiable reward through the decoder.
    Costs: DMD2's, plus decoder and reward forward and backward.
    """

    needs_reward = True
    needs_reward_gradient = True

    class Config(Component):
        """`weight` and `margin`; see their descriptions in `didr config show`."""

        name: str = "dmdr"
        weight: float = Field(
            0.05,
            ge=0,
            description="loss per standard deviation of the starting generator's reward below the margin, against the matching loss"
            " averaged over the latent's N elements (a paper's weight on the sum is N times this); 0 = DMD2, the reward is only watched",
        )
        margin: float = Field(
            2.0,
            description="reward above which a picture is left alone, in standard deviations above the starting generator's mean",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """``0.5 mean (x0 - sg(x0 - W (D_psi - D~_ref)))^2 + weight max(0, margin - r(x0))``, per sample ``[B]``."""
        reference = ctx.reference()
        matching = ctx.assistant() - reference
        unit = losses.normalizer(ctx.x0.detach(), reference)
        loss = losses.matching(ctx.x0, unit * matching)
        if self.config.weight == 0:
            return loss, {"matching/rms": losses.rms(matching)}
        reward, gradient = clean_reward(ctx)
        short = (reward.detach() < self.config.margin).to(gradient.dtype)
        push = self.config.weight * gradient * expand(short, gradient)
        metrics = pull(matching, push, unit) | {"reward/reached": 1 - short}
        return loss + self.config.weight * losses.hinge(reward, self.config.margin), metrics
