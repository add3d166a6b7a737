"""Read pictures of the tiny world back, with no learned part.

``read_pictures`` finds the background (from the border), the fade of the picture, connected parts of one colour, and fits to every part
the five shapes drawn by the renderer itself (area and centroid give size and place, a small search refines them; soft intersection over
union decides). ``check`` then compares a reading with the facts of a caption, facet by facet.

Thresholds: a shape is right when its template fits best AND with IoU >= 0.75 (strict) or 0.62 (loose). At 0.62 blobs pass as circles; at
0.82 even autoencoder reconstructions fail.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from didr_core.world.captions import CaptionFacts
from didr_core.world.scenes import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    CANVAS,
    COLOUR_RGB,
    COLOURS,
    FADE_RANGE,
    SHAPE_AREA,
    SHAPE_CENTROID,
    SHAPES,
    SIZE_RANGE,
    coverage,
    max_radius,
)

STRICT_IOU = 0.75
LOOSE_IOU = 0.62
MAX_PARTS = 6
MIN_AREA = 14.0  # soft pixels; the smallest object covers about 47
STRAY_AREA = 10.0  # soft pixels of foreground that no part explains, allowed in a strict picture
BACKGROUND_TOLERANCE = 0.16
COLOUR_TOLERANCE = 0.17  # RGB distance of a part's colour from the line background-canonical
FADE_LIMITS = (0.3, 1.35)
RELATION_MARGIN = 3.0  # pixels
FACETS = ("count", "colour", "shape", "relation", "background")


@dataclass
class Readings:
    """What B pictures show. Parts are sorted by area, largest first; slots beyond ``parts`` hold -1 or 0.

    background [B] (-1 when no known one is near), parts [B] counts, colour [B, P], shape [B, P], iou [B, P], x, y, radius, fade [B, P],
    stray [B] soft pixels of foreground outside the parts.
    """

    background: np.ndarray
    parts: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    iou: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    fade: np.ndarray
    stray: np.ndarray


def _label(classes: np.ndarray) -> np.ndarray:
    """Connected parts (4-neighbours of equal class): classes [B, H, W] int, -1 for none -> labels [B, H, W], 0 for none."""
    number = np.arange(1, CANVAS * CANVAS + 1, dtype=np.int32).reshape(CANVAS, CANVAS)
    labels = np.where(classes >= 0, number, 0)
    ways = [(axes, step) for axes in ((1, 0, 2), (2, 0, 1)) for step in (1, -1)]  # down, up, right, left
    views = [(labels.transpose(axes)[::step], classes.transpose(axes)[::step]) for axes, step in ways]
    while True:
        before = labels.copy()
        for lines, kinds in views:  # a sweep carries a part's largest number across the whole picture at once
            for i in range(1, CANVAS):
                np.maximum(lines[i], lines[i - 1], out=lines[i], where=kinds[i] == kinds[i - 1])
        if np.array_equal(before, labels):
            return labels


def _overlap(matte: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Soft intersection over union of [N, H, W] pairs."""
    both = np.minimum(matte, template).sum((1, 2))
    return both / np.maximum(matte.sum((1, 2)) + template.sum((1, 2)) - both, 1e-6)


def _fit(matte: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Best shape of each matte [N, 32, 32]: (shape, iou, x, y, radius), all [N]."""
    total = len(matte)
    grid = np.arange(CANVAS, dtype=np.float32) + 0.5
    area = np.maximum(matte.sum((1, 2)), 1e-6)
    cx = (matte.sum(1) * grid).sum(1) / area
    cy = (matte.sum(2) * grid).sum(1) / area
    kinds = len(SHAPES)
    best_iou = np.full((total, kinds), -1.0, dtype=np.float32)
    best = np.zeros((total, kinds, 3), dtype=np.float32)

    def attempt(kind: int, rows: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> None:
        iou = _overlap(matte[rows], coverage(np.full(len(rows), kind), x, y, r))
        better = iou > best_iou[rows, kind]
        chosen = rows[better]
        best_iou[chosen, kind] = iou[better]
        best[chosen, kind] = np.stack([x, y, r], 1)[better]

    everything = np.arange(total)
    for kind in range(kinds):
        radius = np.sqrt(area / SHAPE_AREA[kind])
        for factor in (0.94, 1.0, 1.06):
            attempt(kind, everything, cx, cy - SHAPE_CENTROID[kind] * radius * factor, radius * factor)
    for reach in (0.6, 0.3):  # refine only what could still win or decide strictness
        leader = best_iou.max(1)
        for kind in range(kinds):
            rows = np.flatnonzero(best_iou[:, kind] > leader - 0.12)
            for dx, dy, grow in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
                if len(rows):
                    x, y, r = best[rows, kind].T
                    attempt(kind, rows, x + reach * dx, y + reach * dy, r * (1 + 0.06 * reach * grow))
    shape = best_iou.argmax(1)
    x, y, radius = best[everything, shape].T
    return shape, best_iou[everything, shape], x, y, radius


def read_pictures(pictures: np.ndarray, chunk: int = 512) -> Readings:
    """Read pictures [B, 3, 32, 32] in [0, 1]."""
    if pictures.ndim != 4 or pictures.shape[1:] != (3, CANVAS, CANVAS):
        raise ValueError(f"pictures must be [B, 3, {CANVAS}, {CANVAS}] in [0, 1], got {pictures.shape}")
    starts = range(0, max(len(pictures), 1), chunk)
    pieces = [_read(np.asarray(pictures[i : i + chunk], dtype=np.float32)) for i in starts]
    return Readings(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in vars(pieces[0])})


def _read(pictures: np.ndarray) -> Readings:
    count = len(pictures)
    edge = [pictures[:, :, 0], pictures[:, :, -1], pictures[:, :, 1:-1, 0], pictures[:, :, 1:-1, -1]]
    border = np.median(np.concatenate(edge, axis=2), axis=2)  # [B, 3]
    gaps = np.linalg.norm(border[:, None] - BACKGROUND_RGB, axis=2)
    nearest = gaps.argmin(1)
    known = np.where(gaps.min(1) <= BACKGROUND_TOLERANCE, nearest, -1)

    # Every pixel's place on each line background -> canonical colour; the nearest line is its class.
    direction = COLOUR_RGB[None] - BACKGROUND_RGB[nearest][:, None]  # [B, C, 3]
    length = (direction**2).sum(2)
    offset = (pictures - border[:, :, None, None]).reshape(count, 3, -1)
    along = np.einsum("bkc,bcp->bkp", direction, offset) / length[:, :, None]
    residual = (
        (offset**2).sum(1)[:, None]
        - along**2 * length[:, :, None]
        + 4.0 * np.minimum(along, 0) ** 2 * length[:, :, None]
    )
    classes = residual.argmin(1)
    amount = np.take_along_axis(along, classes[:, None], 1)[:, 0]
    strength = np.sqrt((offset**2).sum(1))
    foreground = (amount > 0.2) & (strength > 0.12)
    fade = np.ones(count, dtype=np.float32)
    for row in range(count):
        values = amount[row][foreground[row]]
        if len(values):
            fade[row] = np.clip(np.percentile(values, 75), 0.4, 1.2)
    inside = foreground & (amount > 0.5 * fade[:, None])
    labels = _label(np.where(inside, classes, -1).reshape(count, CANVAS, CANVAS)).reshape(count, -1)

    slots = {name: np.zeros((count, MAX_PARTS), np.float32) for name in ("iou", "x", "y", "radius", "fade")}
    unread = {name: np.full((count, MAX_PARTS), -1) for name in ("colour", "shape")}
    out = Readings(known, np.zeros(count, np.int64), **unread, **slots, stray=np.zeros(count, np.float32))
    mattes, places = [], []
    for row in range(count):
        names, sizes = np.unique(labels[row], return_counts=True)
        parts = sorted((p for p in zip(sizes, names, strict=True) if p[1] and p[0] >= MIN_AREA), reverse=True)
        out.parts[row] = len(parts)
        explained = np.zeros(CANVAS * CANVAS, dtype=bool)
        for slot, (_, name) in enumerate(parts[:MAX_PARTS]):
            core = labels[row] == name
            colour = offset[row][:, core]
            top = along[row, classes[row][core][0], core]
            mean = colour[:, top >= np.percentile(top, 50)].mean(1)
            kind = int(np.argmin([_line_gap(mean, direction[row, k]) for k in range(len(COLOURS))]))
            level = float(mean @ direction[row, kind] / length[row, kind])
            gap = _line_gap(mean, direction[row, kind])
            if gap <= COLOUR_TOLERANCE and FADE_LIMITS[0] <= level <= FADE_LIMITS[1]:
                out.colour[row, slot] = kind
            out.fade[row, slot] = level
            near = _grow(_grow(core.reshape(CANVAS, CANVAS)))
            others = (labels[row] > 0) & ~core
            matte = np.clip(along[row, kind] / max(level, 0.2), 0, 1) * near.reshape(-1) * ~others
            explained |= near.reshape(-1)
            mattes.append(matte.reshape(CANVAS, CANVAS))
            places.append((row, slot))
        rest = np.clip(strength[row] / 0.5, 0, 1) * (strength[row] > 0.2) * ~explained
        out.stray[row] = rest.sum()
    if mattes:
        shape, iou, x, y, radius = _fit(np.stack(mattes).astype(np.float32))
        place = tuple(np.array(places).T)
        out.shape[place], out.iou[place], out.x[place], out.y[place], out.radius[place] = shape, iou, x, y, radius
    return out


def _line_gap(offset: np.ndarray, direction: np.ndarray) -> float:
    """Distance of a colour offset from the ray along direction."""
    level = max(float(offset @ direction / (direction @ direction)), 0.0)
    return float(np.linalg.norm(offset - level * direction))


def _grow(mask: np.ndarray) -> np.ndarray:
    """One step of 4-neighbour dilation."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def _match(facts: CaptionFacts, colours: np.ndarray, shapes: np.ndarray) -> list[int]:
    """Part index for each object the caption shows (or -1), each part used once; picks the assignment that gets most right."""
    wanted = [(COLOURS.index(colour), SHAPES.index(shape)) for colour, shape in facts.expanded()]
    score = np.array([np.append(2 * (colours == c) + 2.1 * (shapes == s), 0.0) for c, s in wanted])  # -1, no part: 0
    nothing = [-1] * len(wanted)
    if facts.kind == "count":
        return [*np.argsort(-score[0, :-1], kind="stable").tolist(), *nothing][: len(wanted)]
    choices = itertools.permutations([*range(len(colours)), *nothing], len(wanted))
    return list(max(choices, key=lambda parts: sum(score[row, part] for row, part in enumerate(parts))))


def _beside(relation: str, dx: float, dy: float) -> bool:
    """Whether an object displaced by (dx, dy) from another stands in that relation to it."""
    along, across = {"above": (-dy, dx), "below": (dy, dx), "left": (-dx, dy), "right": (dx, dy)}[relation]
    return along >= RELATION_MARGIN and along > abs(across)


def check(readings: Readings, facts: list[CaptionFacts]) -> dict[str, np.ndarray]:
    """Compare readings with captions' facts. Per picture, all float32 [B] in [0, 1] (relation is 1 where none is asked):

    strict, loose; count, colour, shape, relation, background as right or wrong; ``*_part`` the share of objects with the right colour or
    shape (graded); size (radius over the renderer's range), contrast (fade over its range), centring, shape_iou.
    """
    if len(readings.parts) != len(facts):
        raise ValueError(f"{len(readings.parts)} pictures but {len(facts)} captions; give one caption for each picture")
    graded = ("count_part", "colour_part", "shape_part", "shape_iou", "size", "contrast", "centring")
    out = {name: np.zeros(len(facts), dtype=np.float32) for name in ("strict", "loose", *FACETS, *graded)}
    for row, fact in enumerate(facts):
        shown = min(int(readings.parts[row]), MAX_PARTS)
        colours, shapes, iou = readings.colour[row, :shown], readings.shape[row, :shown], readings.iou[row, :shown]
        wanted = fact.expanded()
        match = _match(fact, colours, shapes)
        found = [part for part in match if part >= 0]
        pairs = list(zip(match, wanted, strict=True))
        good_colour = [part >= 0 and colours[part] == COLOURS.index(colour) for part, (colour, _) in pairs]
        named_shape = [part >= 0 and shapes[part] == SHAPES.index(shape) for part, (_, shape) in pairs]
        fit = [float(iou[part]) if part >= 0 else 0.0 for part in match]
        strict_shape = [good and f >= STRICT_IOU for good, f in zip(named_shape, fit, strict=True)]
        loose_shape = [good and f >= LOOSE_IOU for good, f in zip(named_shape, fit, strict=True)]
        count = readings.parts[row] == len(wanted)
        relation = True
        if fact.relation is not None:
            relation = len(found) == 2 and _beside(
                fact.relation,
                readings.x[row, match[0]] - readings.x[row, match[1]],
                readings.y[row, match[0]] - readings.y[row, match[1]],
            )
        named = -1 if fact.background is None else BACKGROUNDS.index(fact.background)
        background = readings.background[row] >= 0 and named in (-1, readings.background[row])
        base = count and all(good_colour) and relation and background and readings.stray[row] <= STRAY_AREA
        out["strict"][row] = base and all(strict_shape)
        out["loose"][row] = base and all(loose_shape)
        out["count"][row], out["colour"][row], out["shape"][row] = count, all(good_colour), all(strict_shape)
        out["relation"][row], out["background"][row] = relation, background
        out["count_part"][row] = max(0.0, 1 - abs(int(readings.parts[row]) - len(wanted)) / len(wanted))
        out["colour_part"][row], out["shape_part"][row] = np.mean(good_colour), np.mean(strict_shape)
        out["shape_iou"][row] = float(np.mean(fit))
        if found:
            radius = readings.radius[row, found].mean() / max_radius(len(wanted))
            out["size"][row] = _within(float(radius), SIZE_RANGE) * len(found) / len(wanted)
            out["contrast"][row] = (
                _within(float(readings.fade[row, found].mean()), FADE_RANGE) * len(found) / len(wanted)
            )
            offset = np.hypot(readings.x[row, found].mean() - CANVAS / 2, readings.y[row, found].mean() - CANVAS / 2)
            out["centring"][row] = max(0.0, 1 - float(offset) / 8)
    return out


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))
