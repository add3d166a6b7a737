"""Diff-Instruct (arXiv 2305.18455): integral KL to the reference itself; DIDR without a reward, and its control."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.config import Component
from didr_core.types import GeneratorContext


class DiffInstruct:
    """Gradient ``W (D_psi - D~_ref)``; needs no reward."""

    needs_reward = False

    class Config(Component):
        """`normalize`; see its description in `didr config show`."""

        name: str = "diff_instruct"
        normalize: bool = Field(True, description="DMD's weight W per sample; false = 1")

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Follow ``E[w(t) (s_psi - s~_ref) dg/dtheta]``, written in x0 space."""
        reference = ctx.reference()
        matching = ctx.assistant() - reference
        weight = losses.normalizer(ctx.x0.detach(), reference) if self.config.normalize else 1.0
        return losses.matching(ctx.x0, weight * matching), {"matching/rms": losses.rms(matching)}
