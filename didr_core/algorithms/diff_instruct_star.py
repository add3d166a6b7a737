"""Diff-Instruct* (DI*, arXiv 2410.20898): score-based divergence to the reference, minus the reward of the clean picture.

Without the reward it is Score Implicit Matching (SIM, arXiv 2410.16794): ``algorithm.weight=0``.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from didr_core.algorithms import losses
from didr_core.algorithms._clean_reward import clean_reward, pull
from didr_core.config import Component
from didr_core.diffusion.schedule import expand
from didr_core.types import GeneratorContext


class DiffInstructStar:
    """``min E[-weight r(g(z))] + E_t E_{x_t}[d(y)]``, ``d(y) = sqrt(|y|^2 + c^2) - c`` (pseudo-Huber), ``y ∝ s_psi - s~_ref``.

    Its gradient is that of ``-weight r(x0) - d'(y)^T (s_psi(x_t) - grad log q(x_t|x0))``: through ``x_t`` and both networks, whose weights
    take none. Here ``y = D_psi - D~_ref = (sigma^2/alpha)(s_psi - s~_ref)``, and ``|y|`` is its root mean square over the
    latent's N elements, so that ``c`` means the same at every noise level and size.

    Needs: TA and reference with gradient in ``x_t``, and the gradient of a differentiable reward through the decoder.
    Costs: Diff-Instruct's, plus the backward pass of TA and guided reference (their activations are kept), plus decoder and reward forward
    and backward.
    """

    needs_reward = True
    needs_reward_gradient = True

    class Config(Component):
        """`weight` and `c`; see their descriptions in `didr config show`."""

        name: str = "diff_instruct_star"
        weight: float = Field(
            0.02,
            ge=0,
            description="loss per standard deviation of the starting generator's reward, against the divergence of the root mean square (a"
            " paper's weight on the norm is sqrt(N) times this); 0 = Score Implicit Matching, the reward is only watched",
        )
        c: float = Field(
            0.01,
            gt=0,
            description="where the divergence turns from squared to linear, in latent units (root mean square of D_psi - D~_ref)",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """``mean(y (x0 - D_psi(x_t))) / sqrt(mean y^2 + c^2) - weight r(x0)``, per sample ``[B]``."""
        assistant, reference = ctx.assistant(grad=True), ctx.reference(grad=True)
        loss = losses.score_divergence(ctx.x0, assistant, reference, self.config.c)
        matching = (assistant - reference).detach()
        if self.config.weight == 0:
            return loss, {"matching/rms": losses.rms(matching)}
        reward, gradient = clean_reward(ctx)
        size = losses.pseudo_huber(matching, self.config.c) + self.config.c
        unit = 1 / expand(size, matching)  # of the term that reaches x0 directly, without the Jacobians
        return loss - self.config.weight * reward, pull(matching, self.config.weight * gradient, unit)
