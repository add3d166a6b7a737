"""DMD2 without its GAN (arXiv 2405.14867): distribution matching distillation with two time scales, no reward."""

from __future__ import annotations

from torch import Tensor

from didr_core.algorithms import losses
from didr_core.config import Component
from didr_core.types import GeneratorContext


class DMD2:
    """Gradient ``E[W (D_psi - D~_ref) dg/dtheta]`` with ``W = 1 / mean |x0 - D~_ref|`` per sample (DMD, arXiv 2311.18828, eq. 7 and 8).

    It is Diff-Instruct with the normaliser always on. What DMD2 adds is the time scales: several TA updates to one of the generator
    (`train.assistant_updates`, 5 in the paper) in place of DMD's regression to stored pairs. Left out: the GAN on real pictures, which
    would need data, and the backward simulation, which one-step generators do not need.

    Needs: TA and reference without gradient; no reward.
    Costs: one TA and one guided reference evaluation without gradient, and the generator's backward pass.
    """

    needs_reward = False

    class Config(Component):
        """No options; set `train.assistant_updates=5` for the paper's time scales."""

        name: str = "dmd2"

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """``0.5 mean (x0 - sg(x0 - W (D_psi - D~_ref)))^2``, per sample ``[B]``."""
        reference = ctx.reference()
        matching = ctx.assistant() - reference
        weight = losses.normalizer(ctx.x0.detach(), reference)
        return losses.matching(ctx.x0, weight * matching), {"matching/rms": losses.rms(matching)}
