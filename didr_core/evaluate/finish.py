"""What a run shows and leaves behind: before/after pictures, held-out scores, the export. Runs where the networks are: all workers score,
each a part of the prompts, and rank 0 writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.config import Config
from didr_core.data.prompts import PromptIndex
from didr_core.diffusion import sampling
from didr_core.evaluate import control
from didr_core.evaluate.contestants import contestants
from didr_core.evaluate.evaluator import Evaluator, text_towers
from didr_core.evaluate.scores import card_section, origin, read_scores
from didr_core.evaluate.watch import SEEDS, Watch
from didr_core.export.folder import export_run, exported
from didr_core.train.learner import Learner
from didr_core.train.loop import Look, train
from didr_core.train.observer import Observer
from didr_core.train.patience import Patience
from didr_core.train.run_folder import RunFolder
from didr_core.types import Backbone

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
        learner.backbone.load_decoder()
        with text_towers(learner.backbone, learner.device), torch.no_grad():
            self.condition = learner.backbone.encode(self.captions).to(learner.device)
        self.start: Tensor | None = None

    @torch.no_grad()
    def pictures(self, network: nn.Module) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1], CPU."""
        backbone = self.learner.backbone
        z = sampling.noise(GRID_SEED, range(len(self.captions)), backbone.latent_shape).to(self.learner.device)
        return self._decoded(torch.cat([backbone.generate(network, z[r], self.condition[r]) for r in self._rows()]))

    def _decoded(self, latents: Tensor) -> Tensor:
        backbone, device = self.learner.backbone, self.learner.device
        return torch.cat([backbone.decode(latents[r].to(device)).float().cpu() for r in self._rows()])

    def _rows(self) -> Iterator[slice]:
        size = self.config.train.at_once or len(self.captions)
        return (slice(first, first + size) for first in range(0, len(self.captions), size))

    def show(self, path: Path, title: str, network: nn.Module | None = None) -> Path:
        """A grid of the start beside ``network``, the running average of now."""
        if self.start is None:
            self.start = self.pictures(self.learner.generator("start"))
        path.parent.mkdir(parents=True, exist_ok=True)
        now = self.pictures(network or self.learner.generator("ema"))
        self.draw({"start": self.start, "aligned": now}, self.captions, path, title)
        return path

    @torch.no_grad()
    def show_all(self, path: Path, title: str, kept: Mapping[str, Tensor]) -> None:
        """The grid of all models that were scored: of latents ``[N, C, h, w]`` by model, made from the gallery's prompts and noise."""
        self.draw({name: self._decoded(latents) for name, latents in kept.items()}, self.captions, path, title)

    def after(self, step: int, network: nn.Module) -> None:
        """The grid of a step."""
        self.show(self.run.path / "grids" / f"step-{step:06d}.png", f"{self.config.name}, step {step}", network)


def train_and_finish(
    config: Config,
    run: RunFolder,
    index: PromptIndex,
    observer: Observer | None = None,
    draw: Draw | None = None,
    profile: bool = False,
) -> None:
    """A whole run in this process: restore, steps, export and scores. Call it inside :func:`didr_core.train.loop.outcome`.

    Raises:
        DIDRError: anything a user can mend; the run folder keeps its checkpoints.
    """
    observer = Patience(observer or Observer(), config.workers.patience_s)
    with observer.watching():
        learner = train(
            config, run, index, observer, lambda learner: looker(learner, learner.config, run, draw), profile
        )
        finish(learner, learner.config, run, observer.stage, draw)


def looker(learner: Learner, config: Config, run: RunFolder, draw: Draw | None = None) -> Look:
    """What `evaluation.every` asks for: a grid, where there is something to draw with, and held-out measures against the start."""
    gallery, watch = Gallery(learner, config, run, draw) if draw else None, None
    if count := config.evaluation.watch:
        size = config.train.at_once or 64
        given: dict[str, Any] = {"backbone": learner.backbone, "reward": learner.reward, "batch": size}
        evaluator = Evaluator.of(config, heldout(config, count), SEEDS, learner.device, **given)
        watch = Watch(evaluator, learner.generator("start"))

    def look(step: int, network: nn.Module) -> Mapping[str, float]:
        if gallery:
            gallery.after(step, network)
        return watch.look(network) if watch else {}

    return look


def finish(
    learner: Learner, config: Config, run: RunFolder, say: Say = lambda *_: None, draw: Draw | None = None
) -> None:
    """Grid (where there is something to draw with), ``scores.json``, ``export/``. Safe to repeat. Every worker must call it.

    Raises:
        DIDRError: the disk is full, or an export folder holds something that is not ours.
    """
    picture, writes = run.path / "grid.png", not learner.parallel.rank
    title = f"{config.name}: before and after {config.sizes.generator_updates} generator updates"
    gallery = None
    if draw and writes:
        say("drawing the grid", 0, 0)
        gallery = Gallery(learner, config, run, draw)
        gallery.show(picture, title)
    if config.evaluation.prompts:
        kept = score(learner, config, run, say)
        if gallery and kept:
            gallery.show_all(picture, title, kept)
    if writes:
        say("exporting", 0, 0)
        scored = bool(config.evaluation.prompts)
        export(config, run, learner.backbone, learner.generator("ema"), scored=scored, overwrite=True)


def export(
    config: Config,
    run: RunFolder,
    backbone: Backbone,
    network: nn.Module,
    folder: Path | None = None,
    *,
    scored: bool = True,
    overwrite: bool = False,
) -> Path:
    """``network`` as an export folder (`export/` of the run), with the run's grid and, where ``scored``, its scores beside it.

    Raises:
        DIDRError: see :func:`didr_core.export.folder.export_run`; or scores.json is broken.
    """
    scores = run.path / "scores.json"
    tree = read_scores(scores) if scored and scores.is_file() else None
    return export_run(
        config,
        backbone,
        network,
        folder or run.path / "export",
        scores=tree,
        told=card_section(tree),
        run=run.info(),
        pictures=run.path / "grid.png",
        overwrite=overwrite,
        redraw=True,
    )


def score(learner: Learner, config: Config, run: RunFolder, say: Say) -> dict[str, Tensor]:
    """Every contestant on the held-out prompts, shared by all workers; rank 0 writes ``scores.json`` and ``scores.npz``.

    Returns:
        Their latents of the grid's prompts and noise, on the CPU; none where fewer prompts than the grid has are scored.
    """
    say("scoring", 0, 0)
    generators = {"start": learner.generator("start"), "aligned": learner.generator("ema")}
    if config.evaluation.control and not control.kept(config.evaluation.control):
        generators["control"] = exported(config, config.evaluation.control).to(learner.device)
    prompts = heldout(config, config.evaluation.prompts)
    evaluator = Evaluator.of(
        config,
        prompts,
        range(config.evaluation.seeds),
        learner.device,
        backbone=learner.backbone,
        reward=learner.reward,
        batch=config.train.at_once or 64,
        parallel=learner.parallel,
        keep=config.evaluation.grid if config.evaluation.grid <= config.evaluation.prompts else 0,
    )
    scores = evaluator.compare(
        contestants(config, learner.backbone, generators, learner.generator("reference")),
        facts=origin(config.data.heldout or config.data.prompts, run.commands() or ["didr align"]),
        progress=lambda name, done, total: say(f"scoring {name}", done, total),
    )
    scores = control.with_control(scores, config, prompts)
    if not learner.parallel.rank:
        scores.write(run.path)
    return evaluator.kept


def heldout(config: Config, count: int) -> list[str]:
    """The first ``count`` held-out prompts in file order; training prompts where none are held out."""
    data = config.data
    key = "data.heldout" if data.heldout else "data.prompts"
    return [
        p.prompt for p in PromptIndex.open(data.heldout or data.prompts, data.column, data.id_column, key).first(count)
    ]
