"""DIDR (arXiv 2605.24001): integral KL to the diffused optimum ``p*_t`` of reward-tilted RLHF."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.config import Component
from didr_core.types import GeneratorContext


class DIDR:
    """Gradient ``W (D_psi - D~_ref - (sigma^2/alpha) s_r)``; needs a reward and the DRP."""

    needs_reward = True
    uses_drs = True

    class Config(Component):
        """`normalize`; see its description in `didr config show`."""

        name: str = "didr"
        normalize: bool = Field(True, description="DMD's weight W per sample; false = 1")

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage II: follow ``E[w(t) (s_psi - s~_ref - s_r) dg/dtheta]``, written in x0 space."""
        drs = ctx.drs()
        reference = ctx.reference()
        target = losses.tilted_target(reference, drs, ctx.alpha, ctx.sigma)
        matching = ctx.assistant() - reference
        weight = losses.normalizer(ctx.x0.detach(), reference) if self.config.normalize else 1.0
        tilt = target - reference
        metrics = {
            "drs/rms": losses.rms(tilt),
            "matching/rms": losses.rms(matching),
            "drs/cosine": losses.cosine(tilt, -matching),
        }
        return losses.matching(ctx.x0, weight * (matching - tilt)), metrics
