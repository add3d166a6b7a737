"""Diff-Instruct++ (DI++, arXiv 2410.18881): integral KL to the reference, minus the reward of the clean picture."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.algorithms._clean_reward import clean_reward, pull
from didr_core.config import Component
from didr_core.types import GeneratorContext


class DiffInstructPP:
    """Gradient ``E[w(t) (s_psi - s~_ref) dg/dtheta] - weight grad_theta r(g(z))`` (Algorithm 1 of the paper).

    In x0 space: Diff-Instruct's ``W (D_psi - D~_ref)`` averaged over the latent's elements, and the reward of ``x0`` itself, at t = 0 only.
    With ``weight = 0`` it is Diff-Instruct.

    Needs: TA and reference without gradient, and the gradient of a differentiable reward through the decoder.
    Costs: Diff-Instruct's, plus decoder and reward forward and backward.
    """

    needs_reward = True
    needs_reward_gradient = True

    class Config(Component):
        """`weight` and `normalize`; see their descriptions in `didr config show`."""

        name: str = "diff_instruct_pp"
        weight: float = Field(
            0.05,
            ge=0,
            description="loss per standard deviation of the starting generator's reward, against the matching loss averaged over the"
            " latent's N elements (a paper's weight on the sum is N times this); 0 = Diff-Instruct, the reward is only watched",
        )
        normalize: bool = Field(True, description="DMD's weight W per sample; false = 1")

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """``0.5 mean (x0 - sg(x0 - W (D_psi - D~_ref)))^2 - weight r(x0)``, per sample ``[B]``."""
        reference = ctx.reference()
        matching = ctx.assistant() - reference
        unit = losses.normalizer(ctx.x0.detach(), reference) if self.config.normalize else 1.0
        loss = losses.matching(ctx.x0, unit * matching)
        if self.config.weight == 0:
            return loss, {"matching/rms": losses.rms(matching)}
        reward, gradient = clean_reward(ctx)
        return loss - self.config.weight * reward, pull(matching, self.config.weight * gradient, unit)
