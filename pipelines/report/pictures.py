"""Pictures of several models on the same noise, together in one file: a PNG or a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from didr_core.config.files import replace_text
from didr_core.evaluate.contest import png
from pipelines.report.figures import save_grid
from pipelines.report.page import render

SMALL, SIDE = 128, 256  # pixels: pictures up to the first are shown by whole pixels, larger than the second are shrunk


def save_pictures(
    rows: Sequence[Mapping[str, Tensor]], prompts: Sequence[str], seeds: Sequence[int], path: Path
) -> Path:
    """``{model: picture [3, H, W] in [0, 1]}`` of each prompt and seed, as ``path`` (.png or .html)."""
    if path.suffix == ".png":
        return save_grid({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, prompts, path)
    cards = [
        {
            "prompt": prompt,
            "told": f"seed {seed}",
            "pictures": [{"model": name, "value": "", "data": inlined(png(image))} for name, image in row.items()],
        }
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True)
    ]
    page = render(
        "pictures.html.j2",
        name=path.stem,
        cards=cards,
        **card_size(next(iter(rows[0].values())).shape[1:], len(rows[0])),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path


def card_size(size: Sequence[int], models: int) -> dict[str, object]:
    """How a page shows cards of ``models`` pictures of ``size``: by whole pixels or smoothly, and how wide, in CSS pixels."""
    return {"small": max(size) <= SMALL, "width": max(240, 110 * models)}


def inlined(picture: bytes) -> str:
    """A picture (PNG) for a page, shrunk where it is large."""
    with Image.open(io.BytesIO(picture)) as image:
        if max(image.size) <= SIDE:
            return "image/png;base64," + base64.b64encode(picture).decode()
        file = io.BytesIO()
        image.thumbnail((SIDE, SIDE))
        image.convert("RGB").save(file, "jpeg", quality=88)
    return "image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
