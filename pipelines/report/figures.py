"""Pictures of a run: the before/after grid and the curves. Readable at half size, safe for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Okabe-Ito: told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#6b7280"
MODEL_COLOURS = {"start": GREY, "control": ORANGE, "aligned": BLUE, "teacher": GREEN}
MODEL_LABELS = {"start": "before", "aligned": "after"}

TARGET = 160  # px of a picture in the grid, about
GAP, CARD_GAP, MARGIN = 6, 26, 28
INK, FAINT, PAPER = "#1f2430", "#6b7280", "#ffffff"


def save_grid(rows: Mapping[str, Tensor], captions: Sequence[str], path: Path, title: str = "") -> Path:
    """A card a prompt: the models' pictures side by side (same prompt, same noise), the caption below.

    Args:
        rows: ``{model: pictures [N, 3, H, W] in [0, 1]}``, in the order to show.
        captions: N prompts.

    Raises:
        ValueError: models with other numbers of pictures than captions, or none at all.
    """
    counts = {name: len(images) for name, images in rows.items()}
    if not rows or not captions or any(n != len(captions) for n in counts.values()):
        raise ValueError(f"save_grid: {len(captions)} captions but pictures {counts}")
    tiles = {name: [_tile(image) for image in images] for name, images in rows.items()}
    side, high = next(iter(tiles.values()))[0].size
    card = len(rows) * side + (len(rows) - 1) * GAP
    columns = min(len(captions), max(1, 8 // len(rows)))  # eight pictures across: captions stay readable on a page
    head, body = _font(17, bold=True), _font(16)
    wrapped = [_wrap(caption, body, card) for caption in captions]
    title_height, label_height = (40 if title else 0), 34
    heights = []  # of the lines of cards
    for first in range(0, len(captions), columns):
        longest = max(len(lines) for lines in wrapped[first : first + columns])
        heights.append(high + 8 + 21 * longest + CARD_GAP)
    width = 2 * MARGIN + columns * card + (columns - 1) * CARD_GAP
    canvas = Image.new("RGB", (width, 2 * MARGIN + title_height + label_height + sum(heights) - CARD_GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN), title, fill=INK, font=_font(20, bold=True))
    top = MARGIN + title_height
    for column in range(columns):
        for place, name in enumerate(rows):
            left = MARGIN + column * (card + CARD_GAP) + place * (side + GAP)
            colour = MODEL_COLOURS.get(name, INK)
            draw.rectangle((left, top, left + side - 1, top + 3), fill=colour)
            draw.text((left, top + 7), MODEL_LABELS.get(name, name), fill=colour, font=head)
    for i in range(len(captions)):
        left = MARGIN + (i % columns) * (card + CARD_GAP)
        y = top + label_height + sum(heights[: i // columns])
        for place, name in enumerate(rows):
            x = left + place * (side + GAP)
            canvas.paste(tiles[name][i], (x, y))
            draw.rectangle((x, y, x + side - 1, y + high - 1), outline="#d7dae0")
        for k, line in enumerate(wrapped[i]):
            draw.text((left, y + high + 5 + 21 * k), line, fill=INK, font=body)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)
    return path


def _tile(image: Tensor) -> Image.Image:
    """``[3, H, W]`` in [0, 1] to about TARGET px: whole multiples (nearest) for small pictures, a good filter for large ones."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    made = Image.fromarray(pixels)
    high, wide = pixels.shape[:2]
    if max(high, wide) <= TARGET:
        times = max(1, round(TARGET / max(high, wide)))
        return made.resize((wide * times, high * times), Image.Resampling.NEAREST)
    scale = 2 * TARGET / max(high, wide)  # photographs need more room than 32 px scenes
    return made if scale >= 1 else made.resize((round(wide * scale), round(high * scale)), Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> Any:
    """DejaVu as matplotlib brings it: the same on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: Any, width: int, most: int = 3) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    for i, line in enumerate(lines):  # one word longer than the card
        while font.getlength(line) > width and len(line) > 2:
            line = line.rstrip("…")[:-1] + "…"
        lines[i] = line
    return lines or [""]


@dataclass(frozen=True)
class Panel:
    """One set of axes: which metrics, what the axes are called."""

    title: str
    y: str
    lines: tuple[tuple[str, str, str], ...]  # metric, label, colour
    log: bool = False
    zero: bool = False  # a horizontal line at 0

    def present(self, history: Sequence[Mapping[str, Any]]) -> bool:
        return any(row.get(key) is not None for row in history for key, _, _ in self.lines)


PANELS = (
    Panel("Reward", "gain over start (sd)", (("reward/gain", "training reward", BLUE),), zero=True),
    Panel("Reward, published scale", "score (mean of the batch)", (("reward/raw", "training reward", SKY),)),
    Panel("Teaching assistant", "DSM loss", (("loss/assistant", "TA loss", VERMILION),)),
    Panel(
        "Reward against matching",
        "ratio, cosine (no unit)",
        (
            ("drs/ratio", "norm ratio DRS / matching", PURPLE),
            ("drs/cosine", "cosine", SKY),
            ("reward/ratio", "norm ratio reward / matching", PURPLE),
            ("reward/cosine", "cosine", SKY),
        ),
        zero=True,
    ),
    Panel(
        "Gradient norms",
        "norm before clipping (log)",
        (("grad/generator", "generator", BLUE), ("grad/assistant", "assistant", VERMILION)),
        log=True,
    ),
    Panel(
        "Watch against hacking",
        "latents (no unit), clipped (share)",
        (
            ("latent/mean", "latent mean", GREY),
            ("latent/std", "latent deviation", BLUE),
            ("image/clipped", "clipped values", ORANGE),
        ),
    ),
    Panel(
        "Held-out prompts",
        "against the start (sd)",
        (
            ("heldout/reward", "training reward", BLUE),
            ("heldout/judge", "held-out judge", ORANGE),
            ("heldout/utility", "true utility", GREEN),
        ),
        zero=True,
    ),
    Panel(
        "What captions leave free",
        "against the start (bits)",
        (("heldout/background_bits", "backgrounds", PURPLE), ("heldout/position_bits", "positions", GREY)),
        zero=True,
    ),
    Panel("Anchor", "regression loss", (("loss/anchor", "anchor loss", GREEN),)),
)


def save_curves(history: Sequence[Mapping[str, Any]], path: Path, alarms: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Curves over steps: raw values faint, a running mean on top; steps with alarms are marked on the lower edge.

    Args:
        history: rows of metrics.jsonl. alarms: rows of alarms.jsonl.

    Raises:
        ValueError: nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [p for p in PANELS if p.present(history)]
    if not panels:
        raise ValueError("save_curves: no known metric in the history")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ringing = sorted({int(row["step"]) for row in alarms})
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw(axes, panel, history)
        if ringing:
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(ringing, [0.012] * len(ringing), "|", color=VERMILION, markersize=9, **edge)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def _draw(axes: Any, panel: Panel, history: Sequence[Mapping[str, Any]]) -> None:
    for key, label, colour in panel.lines:
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if not points:
            continue
        steps, values = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
        smooth = running_mean(values, max(1, len(values) // 25))
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth, color=colour, linewidth=2.2, label=label)
    if panel.zero:
        axes.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    if panel.log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    axes.set_title(panel.title, loc="left", fontsize=14, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=12, color=INK)
    axes.set_ylabel(panel.y, fontsize=12, color=INK)
    axes.tick_params(labelsize=11, colors=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if len(panel.lines) > 1:
        axes.legend(fontsize=11, frameon=False, loc="best")


def plain_ticks(axis: Any) -> None:
    """On a logarithmic axis a few round numbers, rather than powers of ten with one label."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Centred mean over ``2 reach + 1`` points, fewer at the ends (no shrinking towards zero there)."""
    kernel = np.ones(2 * min(reach, (len(values) - 1) // 2) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
