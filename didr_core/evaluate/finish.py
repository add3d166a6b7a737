"""What a run shows and leaves behind: before/after pictures, held-out scores, the export. Runs where the networks are (rank 0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.config import Component, Config, build, locate
from didr_core.data.prompts import PromptIndex
from didr_core.diffusion import sampling
from didr_core.evaluate.scoreboard import provenance
from didr_core.evaluate.scores import Contestant, Scores, one_step_contestant, score_models, teacher_contestant
from didr_core.export.folder import export_run
from didr_core.train.learner import Learner
from didr_core.train.loop import Observer, train
from didr_core.train.run_folder import RunFolder
from didr_core.types import Backbone, DIDRError, Reward

Say = Callable[[str, int, int], None]
"""``(what is being done, done, to do)``; 0, 0 where there is nothing to count."""
Draw = Callable[[Mapping[str, Tensor], Sequence[str], Path, str], Any]
"""``(pictures [N, 3, H, W] by model, captions, path of the PNG, title)``."""

GRID_SEED = 0


class Gallery:
    """The same few held-out prompts and noise, drawn again whenever asked: what a run looks like as it goes on."""

    def __init__(self, learner: Learner, config: Config, run: RunFolder, draw: Draw) -> None:
        self.learner, self.config, self.run, self.draw = learner, config, run, draw
        self.captions = heldout(config, config.evaluation.grid)
        _ready(learner.backbone, learner.device)
        with torch.no_grad():
            self.condition = learner.backbone.encode(self.captions).to(learner.device)
        self.start: Tensor | None = None

    @torch.no_grad()
    def pictures(self, network: nn.Module) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1], CPU."""
        backbone = self.learner.backbone
        z = sampling.noise(GRID_SEED, range(len(self.captions)), backbone.latent_shape).to(self.learner.device)
        size = self.config.train.micro_batch or len(z)
        rows = (slice(start, start + size) for start in range(0, len(z), size))
        made = (backbone.decode(backbone.generate(network, z[r], self.condition[r])).float().cpu() for r in rows)
        return torch.cat(list(made))

    def show(self, path: Path, title: str, network: nn.Module | None = None) -> Path:
        """A grid of the start beside ``network``, the running average of now."""
        if self.start is None:
            self.start = self.pictures(self.learner.generator("start"))
        path.parent.mkdir(parents=True, exist_ok=True)
        now = self.pictures(network or self.learner.generator("ema"))
        self.draw({"start": self.start, "aligned": now}, self.captions, path, title)
        return path

    def after(self, step: int, network: nn.Module) -> None:
        """The grid of a step."""
        self.show(self.run.path / "grids" / f"step-{step:06d}.png", f"{self.config.name}, step {step}", network)


def train_and_finish(
    config: Config, run: RunFolder, index: PromptIndex, observer: Observer | None = None, draw: Draw | None = None
) -> None:
    """A whole run in this process: restore, steps, export and scores. Call it inside :func:`didr_core.train.loop.outcome`.

    Raises:
        DIDRError: anything a user can mend; the run folder keeps its checkpoints.
    """
    observer = observer or Observer()
    grid_of = (lambda learner: Gallery(learner, learner.config, run, draw).after) if draw else None
    learner = train(config, run, index, observer, grid_of)
    finish(learner, learner.config, run, observer.stage, draw)


def finish(
    learner: Learner, config: Config, run: RunFolder, say: Say = lambda *_: None, draw: Draw | None = None
) -> None:
    """Grid (where there is something to draw with), ``scores.json``, ``export/``. Safe to repeat.

    Raises:
        DIDRError: the disk is full, or an export folder holds something that is not ours.
    """
    picture = run.path / "grid.png"
    if draw:
        say("drawing the grid", 0, 0)
        Gallery(learner, config, run, draw).show(picture, f"{config.name}: before and after {config.train.steps} steps")
    scores = score(learner, config, run, say) if config.evaluation.prompts else None
    say("exporting", 0, 0)
    export_run(
        config,
        learner.backbone,
        learner.generator("ema"),
        run.path / "export",
        scores=scores.tree if scores else None,
        run=run.info(),
        pictures=picture if picture.is_file() else None,
        overwrite=True,
    )


def score(learner: Learner, config: Config, run: RunFolder, say: Say) -> Scores:
    """Every contestant on the held-out prompts; writes ``scores.json`` and ``scores.npz``."""
    backbone, device = learner.backbone, learner.device
    say("scoring", 0, 0)
    _ready(backbone, device)
    generators = {"start": learner.generator("start"), "aligned": learner.generator("ema")}
    if config.evaluation.control:
        generators["control"] = exported(config, config.evaluation.control).to(device)
    scores = score_models(
        backbone,
        contestants(config, backbone, generators, learner.generator("reference")),
        heldout(config, config.evaluation.prompts),
        seeds=range(config.evaluation.seeds),
        reward=_reward(config.reward, device, learner.reward),
        judge=_reward(config.judge, device),
        world=config.evaluation.world,
        batch=config.train.micro_batch or 64,
        device=device,
        progress=lambda name, done, total: say(f"scoring {name}", done, total),
        facts=provenance(config.data.heldout or config.data.prompts, [run.info().get("command") or "didr align"]),
    )
    scores.write(run.path)
    return scores


def contestants(
    config: Config, backbone: Backbone, generators: Mapping[str, nn.Module], reference: nn.Module
) -> list[Contestant]:
    """The rows of the table: start, control (where there is one), aligned, then the guided teacher of `evaluation.teacher_steps`."""
    rows = [
        one_step_contestant(name, backbone, generators[name])
        for name in ("start", "control", "aligned")
        if name in generators
    ]
    if steps := config.evaluation.teacher_steps:
        rows.append(teacher_contestant(backbone, reference, steps, config.guidance.reference))
    return rows


def exported(config: Config, folder: str | Path) -> nn.Module:
    """The generator that another run exported, as this config's backbone loads it; ``folder`` is the run's or its ``export``.

    Raises:
        DIDRError: nothing exported there, or nothing of this config's family.
    """
    backbone = config.backbone.exported(find_export(folder))
    network: nn.Module = build("backbones", backbone).load_network("generator")
    return network


def find_export(folder: str | Path) -> Path:
    """The exported pipeline of a run folder, or the folder itself where it is one."""
    for export in (locate(str(folder)) / "export", locate(str(folder))):
        if (export / "model_index.json").is_file():
            return export
    raise DIDRError(
        f"evaluation.control={str(folder)!r}: no export there. Expected the folder of a finished run (with export/model_index.json)"
        " or an exported pipeline."
    )


def heldout(config: Config, count: int) -> list[str]:
    """The first ``count`` held-out prompts in file order; training prompts where none are held out."""
    data = config.data
    key = "data.heldout" if data.heldout else "data.prompts"
    return [
        p.prompt for p in PromptIndex.open(data.heldout or data.prompts, data.column, data.id_column, key).first(count)
    ]


def _ready(backbone: Backbone, device: torch.device) -> None:
    """Text towers and decoder, which training itself does not hold or may not need."""
    backbone.load_text()
    backbone.load_decoder()
    getattr(backbone, "to", lambda _: None)(device)


def _reward(config: Component | None, device: torch.device, loaded: Reward | None = None) -> Reward | None:
    if config is None or loaded is not None:
        return loaded
    reward = build("rewards", config)
    reward.load(device)
    return reward  # type: ignore[no-any-return]
