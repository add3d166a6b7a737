"""Pictures from an export folder, in one step: the same as stock diffusers makes from it with the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from didr_core import config as configs
from didr_core.config import Config, build
from didr_core.diffusion import sampling
from didr_core.networks import roles
from didr_core.train import checkpoint
from didr_core.train.run_folder import RunFolder
from didr_core.types import Backbone, DIDRError

MODEL_INDEX = "model_index.json"


BESIDE = ("start", "teacher")


class OneStep:
    """An exported generator, ready to sample, and what it may be seen beside: the models of ``samplers``, by name."""

    def __init__(
        self, folder: Path, device: torch.device | str = "cpu", beside: Sequence[str] = (), run: Path | None = None
    ) -> None:
        """Load ``folder``, as `didr align` or `didr export` wrote it.

        Args:
            beside: of :data:`BESIDE`: what training began from, in one step; its reference, in `evaluation.teacher_steps` (or 50).
            run: the folder of the run, which says where those lie; an export hides this machine's paths.

        Raises:
            DIDRError: not an export of ours, no such device here, or weights of a model ``beside`` are not here.
        """
        if unknown := set(beside) - set(BESIDE):
            raise DIDRError(f"--beside {', '.join(unknown)}: expected {' or '.join(BESIDE)}")
        for file in (MODEL_INDEX, "config.yaml"):
            if not (folder / file).is_file():
                raise DIDRError(
                    f"export {str(folder)!r}: {file} is missing. Expected a folder that `didr align` or `didr export` wrote."
                )
        # what trained it need not be here
        drawing = {"algorithm": "diff_instruct", "reward": None, "judge": None, "device": str(device)}
        config = configs.recorded(folder / "config.yaml", values=drawing)
        self.device = config.torch_device
        self.backbone: Backbone = build("backbones", config.backbone.exported(folder))
        network = self.backbone.load_network("generator").to(self.device)
        self.samplers = {"aligned": sampling.one_step(self.backbone, network)}
        if beside:
            began = configs.recorded((run or folder) / "config.yaml", values=drawing)
            base: Backbone = build("backbones", began.backbone)
            base.to(self.device)
            if "start" in beside:
                start = sampling.one_step(base, base.load_network("generator").to(self.device))
                self.samplers = {"start": start, **self.samplers}
            if "teacher" in beside:
                teacher, steps = base.load_network("reference").to(self.device), began.evaluation.teacher_steps or 50
                self.samplers["teacher"] = sampling.reference(base, teacher, steps, began.guidance.reference)
        self.backbone.load_text()
        self.backbone.load_decoder()
        self.backbone.to(self.device)

    @torch.no_grad()
    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], model: str = "aligned") -> Tensor:
        """``[N, 3, H, W]`` in [0, 1], CPU; picture i from ``torch.Generator().manual_seed(seeds[i])``, on the CPU as diffusers draws it."""
        shape = tuple(self.backbone.latent_shape)
        z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(self.device)
        condition = self.backbone.encode(list(prompts)).to(self.device)
        return self.backbone.decode(self.samplers[model](condition, z)).float().cpu()

    def rows(self, prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> Iterator[dict[str, Tensor]]:
        """For each prompt and seed the pictures ``[3, H, W]`` of all models, by name."""
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            made = {model: self.pictures(prompts[part], seeds[part], model) for model in self.samplers}
            yield from (dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True))


SAME = 0.1
"""Mean difference of two latents, in standard deviations, up to which half precision may be the cause."""


@torch.no_grad()
def refuse_another_picture(config: Config, folder: Path, generator: nn.Module) -> None:
    """Loads the export in ``folder`` again and draws one picture of up to 32 latent pixels a side, with it and with ``generator``.

    Raises:
        DIDRError: they differ by more than rounding, or hold NaN; or the export cannot be loaded.
    """
    backbone: Backbone = build("backbones", config.backbone.exported(folder))
    channels, *sides = backbone.latent_shape
    z = torch.randn(1, channels, *(min(n, 32) for n in sides), generator=torch.Generator().manual_seed(0))
    backbone.load_text()
    condition = backbone.encode(["a photograph of a cat"])
    backbone.free_text()
    latents = []
    for network in (generator, backbone.load_network("generator")):
        device = next((p.device for p in network.parameters()), z.device)
        latents.append(backbone.generate(network, z.to(device), condition.to(device)).float().cpu())
    ours, theirs = latents
    difference = ((ours - theirs).abs().mean() / ours.std()).item()
    backbone.load_decoder()
    if not (difference <= SAME and backbone.decode(theirs).isfinite().all()):
        raise DIDRError(
            f"export: what was written draws another picture than the generator (mean difference {difference:.3f} standard deviations, "
            f"expected at most {SAME}). The usual cause: numbers too large for half precision. "
            "`didr export --weights generator` writes the raw weights instead of their average."
        )


def to_image(picture: Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 1] to 8 bits, rounded as diffusers rounds."""
    return Image.fromarray((picture.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())


def trained_generator(config: Config, run: RunFolder, which: str = "ema") -> tuple[Backbone, nn.Module, int]:
    """Backbone, generator weights of the newest checkpoint, and its step, without optimizers or the other networks.

    Args:
        which: "ema" (the running average that exports hold) or "generator" (the raw weights).

    Raises:
        DIDRError: the run has no checkpoint, or a damaged one.
    """
    step = run.last_step()
    if not step:
        raise DIDRError(f"run {run.place}: no checkpoint yet, so there is nothing to export.")
    run.fetch(f"checkpoints/{run.checkpoint(step).name}")
    backbone: Backbone = build("backbones", config.backbone)
    network = roles.bare_generator(backbone, config.backbone, config.roles)
    with checkpoint.fits(run.checkpoint(step)):
        network.load_state_dict(checkpoint.read(run.checkpoint(step), which))
    return backbone, network.requires_grad_(False), step
