"""A model family whose answers are known: the reference is the exact denoiser of a Gaussian mixture (:mod:`didr_core.diffusion.mixtures`).

It runs through the same learner, recipes and command line as SDXL, in seconds, and says how far a trained generator is from DIDR's exact
optimum (`python -m benchmarks.exactness`). Latents are points ``[B, D]``. The generator and the teaching assistant are small MLPs; the
assistant is the exact denoiser plus an MLP that starts at zero, so that it starts as the reference, as SDXL's does. Prompts carry no
meaning here: the law is unconditional, and guidance 1 is the only scale that makes sense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from didr_core.config import Component, locate
from didr_core.diffusion.mixtures import Mixture
from didr_core.diffusion.sampling import clamp_to_rewards
from didr_core.diffusion.schedule import Cosine, coeffs_like
from didr_core.types import Condition, DIDRError

WEIGHTS = "generator.safetensors"


class GaussianMixture:
    """Equal modes of one width, on a circle or drawn from N(0, I)."""

    usage = (
        "Weights of a small MLP, not a diffusers pipeline: sample with `didr sample` or `didr_core.export.sample.OneStep`. "
        "Pictures show the coordinates of a point as grey pixels."
    )

    class Config(Component):
        """`generator`: a file of MLP weights, or none for random ones. `extent`: decode shows coordinates in [-extent, extent]."""

        name: str = "gaussian_mixture"
        dim: int = 2
        modes: int = 6
        layout: Literal["circle", "normal"] = "circle"
        radius: float = 2.0  # of the circle
        std: float = 0.25  # of a mode
        layout_seed: int = 0  # of the normal layout
        width: int = 96
        depth: int = 3  # hidden layers
        extent: float = 8.0
        generator: str | None = None

        def exported(self, folder: Path) -> Self:
            """The generator is one file of the export."""
            return self.model_copy(update={"generator": str(folder / WEIGHTS)})

    def __init__(self, config: Config) -> None:
        self.config = config
        self.schedule = Cosine()
        self.latent_shape: tuple[int, ...] = (config.dim,)
        self.check()
        self.mixture = Mixture.equal(_means(config), config.std)

    def check(self) -> None:
        """Raises DIDRError unless the numbers make a mixture and the weights file is there."""
        for key in ("dim", "modes", "std", "width", "depth", "extent"):
            if not getattr(self.config, key) > 0:
                raise DIDRError(f"backbone.{key}={getattr(self.config, key)}: expected a positive number")
        if self.config.layout == "circle" and self.config.dim != 2:
            raise DIDRError(
                f"backbone.layout='circle' lies in 2 dimensions, got dim={self.config.dim}; use layout=normal"
            )
        if self.config.generator is not None and not locate(self.config.generator).is_file():
            raise DIDRError(
                f"backbone.generator={self.config.generator!r}: no such file. Expected {WEIGHTS} of an export."
            )

    def load_network(self, role: str) -> nn.Module:
        """The exact denoiser, the assistant (equal to it at first), or the generator; float32, eval.

        Raises:
            DIDRError: the generator's file holds another architecture.
        """
        c = self.config
        if role == "reference":
            return _Denoiser(self.mixture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if role == "assistant":
                return _Assistant(self.mixture, c.width, c.depth).eval()
            network = _Generator(c.dim, c.width, c.depth).eval()
        if c.generator is None:
            return network
        from safetensors.torch import load_file

        state = {k: v.float() for k, v in load_file(locate(c.generator)).items()}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise DIDRError(
                f"backbone.generator={c.generator!r}: not the weights of an MLP with dim={c.dim}, width={c.width}, depth={c.depth}"
            ) from error
        return network

    def load_decoder(self) -> None:
        """Nothing to load."""

    def load_text(self) -> None:
        """Nothing to load."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """``unused [B, 1]`` zeros: the law does not depend on the prompt."""
        return Condition({"unused": torch.zeros(len(prompts), 1)})

    def null(self, like: Condition) -> Condition:
        """The same as :meth:`encode`."""
        return like.map(torch.zeros_like)

    def x0(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The networks predict ``x0`` themselves."""
        alpha, sigma = coeffs_like(self.schedule, t, x)
        return network(x, alpha, sigma)  # type: ignore[no-any-return]

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        """One evaluation ``z [B, D] -> x0 [B, D]``."""
        return network(z)  # type: ignore[no-any-return]

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, D]`` to grey pictures ``[B, 3, H, W]``, a pixel a coordinate, as square as D allows."""
        high = next(h for h in range(math.isqrt(self.config.dim), 0, -1) if self.config.dim % h == 0)
        grey = (latent / self.config.extent / 2 + 0.5).view(len(latent), 1, high, -1)
        return clamp_to_rewards(grey.expand(-1, 3, -1, -1))

    def export(self, generator: nn.Module, folder: str) -> None:
        """The MLP's weights (float32), and ``model_index.json`` with the mixture; diffusers has no such pipeline."""
        from safetensors.torch import save_file

        state = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
        save_file(state, Path(folder) / WEIGHTS)
        index: dict[str, Any] = {"_class_name": "GaussianMixture"} | self.config.model_dump(exclude={"generator"})
        (Path(folder) / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def _means(config: GaussianMixture.Config) -> Tensor:
    """``[N, D]``."""
    if config.layout == "circle":
        angle = torch.arange(config.modes) * (2 * math.pi / config.modes)
        return config.radius * torch.stack([angle.cos(), angle.sin()], 1)
    return torch.randn(config.modes, config.dim, generator=torch.Generator().manual_seed(config.layout_seed))


def _mlp(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, width), nn.SiLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class _Denoiser(nn.Module):
    """``E[x0 | x_t]`` of a mixture; buffers only."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.log_weights = nn.Buffer(mixture.log_weights.clone())
        self.means = nn.Buffer(mixture.means.clone())
        self.variances = nn.Buffer(mixture.variances.clone())

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``x [B, D]``, ``alpha, sigma [B, 1]``."""
        return Mixture(self.log_weights, self.means, self.variances).denoise(x, alpha, sigma)


class _Assistant(nn.Module):
    """Exact denoiser plus ``sigma MLP(x, alpha, sigma)``, zero at first."""

    def __init__(self, mixture: Mixture, width: int, depth: int) -> None:
        super().__init__()
        dim = mixture.means.shape[1]
        self.reference = _Denoiser(mixture)
        self.mlp = _mlp(dim + 4, dim, width, depth)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        time = torch.cat([alpha, sigma, 2 * alpha * sigma, alpha.square() - sigma.square()], 1)
        return self.reference(x, alpha, sigma) + sigma * self.mlp(torch.cat([x, time], 1))  # type: ignore[no-any-return]


class _Generator(nn.Module):
    """``g(z) = A z + MLP(z)``."""

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        self.mlp = _mlp(dim, dim, width, depth)
        nn.init.eye_(self.linear.weight)

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, D]``."""
        return self.linear(z) + self.mlp(z)  # type: ignore[no-any-return]
