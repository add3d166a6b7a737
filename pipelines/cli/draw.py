"""`didr sample` and `didr compare`: pictures of finished runs, and of what they began from, on the same noise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

from didr_core.data.prompts import PromptIndex
from didr_core.data.storage import disk
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError

if TYPE_CHECKING:
    from didr_core.export.sample import OneStep
    from pipelines.evaluate import Options


def model_of(run: str | None, export: Path | None, device: str, beside: Sequence[str]) -> OneStep:
    """The generator of a run or of an export folder, with the models ``beside`` it.

    Raises:
        DIDRError: neither or both are given, the run is not exported, or see :class:`didr_core.export.sample.OneStep`.
    """
    if (run is None) == (export is None):
        raise DIDRError("sample: give either --run RUN or --export DIR")
    folder = export or exported(str(run))
    from didr_core.export.sample import OneStep  # torch, which a wrong name does not wait for

    return OneStep(folder, device, beside, folder.parent if run else None)


def exported(run: str) -> Path:
    """The export folder of a run.

    Raises:
        DIDRError: no such run, or it is not exported.
    """
    found = RunFolder.find(run)
    folder = found.fetch("export")
    if not any(folder.glob("*")):
        raise DIDRError(
            f"run {found.place}: not exported yet (status {found.info().get('status')!r}). Say `didr export --run {run}` first."
        )
    return folder


def prompts_of(given: Sequence[str], file: str | None) -> list[str]:
    """What was typed, then all prompts of the file.

    Raises:
        DIDRError: there is neither, or the file cannot be read.
    """
    index = PromptIndex.open(file, key="--prompts") if file else None
    texts = [*given, *(prompt.prompt for prompt in (index.first(len(index)) if index else ()))]
    if not texts:
        raise DIDRError('sample: nothing to draw. Give --prompt "TEXT", or --prompts FILE.')
    return texts


def draw(
    model: OneStep, prompts: Sequence[str], seed: int, count: int, output: Path, grid: Path | None
) -> Iterator[Path]:
    """Write and yield a PNG for each prompt, noise and model, and at the end the ``grid`` of all.

    Raises:
        DIDRError: a file cannot be written.
    """
    from didr_core.export.sample import to_image

    texts = [text for text in prompts for _ in range(count)]
    seeds = [seed + place for place in range(len(texts))]
    rows = []
    with disk("--output", output):
        output.mkdir(parents=True, exist_ok=True)
        for text, number, row in zip(texts, seeds, model.rows(texts, seeds), strict=True):
            for name, picture in row.items():
                path = output / f"{_slug(text)}-seed{number}{'' if name == 'aligned' else '-' + name}.png"
                said = PngInfo()
                said.add_itxt("prompt", text)
                said.add_text("seed", str(number))
                to_image(picture).save(path, pnginfo=said)
                yield path
            rows += [row] if grid else []
    if grid:
        from pipelines.report.pictures import save_pictures

        with disk("--grid", grid):
            yield save_pictures(rows, texts, seeds, grid)


def contest_of_runs(
    run: str, other: str, prompts: str | None, count: int, beside: Sequence[str], command: str
) -> tuple[Options, Path]:
    """Two runs (and what is ``beside`` them) as a contest by the recipe of the first, and a folder for it beside that run.

    Raises:
        DIDRError: one of them is no run, or not exported.
    """
    from pipelines.evaluate import Options

    found = [exported(name).parent for name in (run, other)]
    names = [path.name for path in found]
    if names[0] == names[1]:  # of two output folders
        names = [f"{path.parent.name}-{path.name}" for path in found]
    models = [f"{name}={path}" for name, path in zip(names, found, strict=True)]
    options = Options(
        [*models, *beside], str(found[0] / "config.yaml"), ["tracking.uri=none"], prompts, count, command=command
    )
    return options, found[0].parent / f"compare-{'-'.join(names)}"


def _slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:60] or "picture"
