"""The last judge of the tiny world: what every report and benchmark measures pictures with. Pure numpy, no learned part.

``utility`` stands for people. It has two parts:

* faithfulness: 4 x the mean of the graded facets, plus 3 when everything is right (strict). A right picture is worth at least 6.9,
  a wrong one at most 6, so a wrong picture always loses to a right one.
* taste: size + contrast, each 0..1 over the renderer's range (larger and better contrasted objects are preferred).

Centring is measured but deliberately NOT part of taste: captions leave the position free, and we measure the entropy of what they leave
free. A taste for centring would make the collapse of positions the right answer and hide it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from didr_core.world.captions import CaptionFacts, parse_caption
from didr_core.world.checker import FACETS, MAX_PARTS, Readings, check, read_pictures
from didr_core.world.scenes import CELL_MID, COLOURS, SHAPES, SINGLE_JITTER

STRICT_BONUS = 3.0
FAITHFULNESS_WEIGHT = 4.0
MEASURES = ("strict", "loose", *FACETS, "shape_iou", "size", "contrast", "centring", "utility")
POSITION_GROUPS = {"single": 9, "pair": 4, "two": 2, "three": 2}  # captions -> number of coarse layouts they leave free

Assessment = dict[str, np.ndarray]


def utility_of(checks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Utility [B] from the per-picture measures of ``checker.check``."""
    graded = (
        checks["count_part"]
        + checks["colour_part"]
        + 0.5 * (checks["shape_part"] + np.minimum(1.0, checks["shape_iou"] / 0.85))
        + checks["relation"]
        + checks["background"]
    ) / 5.0
    taste = checks["size"] + checks["contrast"]
    return (FAITHFULNESS_WEIGHT * graded + STRICT_BONUS * checks["strict"] + taste).astype(np.float32)


def utility(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Utility [N] of pictures [N, 3, 32, 32] in [0, 1] for their captions."""
    return assess(images, captions)["utility"]


def _group(facts: CaptionFacts) -> str:
    """Which of POSITION_GROUPS a caption is in; "relation" fixes the layout."""
    if facts.kind == "count":
        return "two" if facts.count == 2 else "three"
    return facts.kind


def _position_bin(group: str, facts: CaptionFacts, readings: Readings, row: int) -> int:
    """Coarse layout of the picture among those its caption leaves free; -1 when not readable or not free."""
    shown = int(readings.parts[row])
    if group not in POSITION_GROUPS or shown != len(facts.expanded()) or shown > MAX_PARTS:
        return -1
    x, y = readings.x[row, :shown], readings.y[row, :shown]
    if group == "single":
        step = 2 * SINGLE_JITTER / 3
        across, down = (int(np.clip((v - CELL_MID + SINGLE_JITTER) // step, 0, 2)) for v in (x[0], y[0]))
        return 3 * down + across
    if group == "three":
        return int((y < CELL_MID).sum() >= 2)
    horizontal = abs(x[0] - x[1]) > abs(y[0] - y[1])
    if group == "two":
        return int(horizontal)
    looks = list(zip(readings.colour[row, :2].tolist(), readings.shape[row, :2].tolist(), strict=True))
    first = (COLOURS.index(facts.objects[0][0]), SHAPES.index(facts.objects[0][1]))
    if first not in looks:
        return -1
    one = looks.index(first)
    before = x[one] < x[1 - one] if horizontal else y[one] < y[1 - one]
    return 2 * int(horizontal) + int(before)


def assess(images: np.ndarray, captions: Sequence[str]) -> Assessment:
    """Measure pictures [N, 3, 32, 32] (float in [0, 1]) against captions.

    Returns arrays [N]: every name of MEASURES; ``background_code`` and ``position_code``, what was chosen of what the caption leaves free
    (index, -1 unreadable or not free); ``position_group``, the place in POSITION_GROUPS (their number where the layout is not free);
    ``background_free`` (bool), ``kind`` (str), ``caption`` (str).
    Raises ValueError for wrong shapes, non-finite pixels, or a caption outside the grammar.
    """
    images = np.asarray(images, dtype=np.float32)
    if not np.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values; the generator or decoder failed")
    facts = [parse_caption(caption) for caption in captions]
    readings = read_pictures(images)
    out = check(readings, facts)
    groups = [_group(fact) for fact in facts]
    free = np.array([fact.background is None for fact in facts], dtype=bool)
    bins = [
        _position_bin(group, fact, readings, row) for row, (group, fact) in enumerate(zip(groups, facts, strict=True))
    ]
    places = {name: place for place, name in enumerate(POSITION_GROUPS)}
    return out | {
        "utility": utility_of(out),
        "background_free": free,
        "background_code": np.where(free, readings.background, -1),
        "position_code": np.array(bins, dtype=np.int64),
        "position_group": np.array([places.get(group, len(places)) for group in groups], dtype=np.int64),
        "kind": np.array([fact.kind for fact in facts], dtype=object),
        "caption": np.array(captions, dtype=object),
    }
