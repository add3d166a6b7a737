"""The tiny world: scenes of coloured shapes on a plain background, and their renderer.

A picture is 32x32 RGB. A scene holds one to three objects of one size and one `fade`. Every object has a colour and a shape; the drawn
colour is ``fade * canonical + (1 - fade) * background``, so `fade` is contrast. Size and fade are drawn independently of everything
else and no caption names them: they are what taste can prefer without touching what the captions leave free (background, position).

Coverage is antialiased from signed distances, ``clip(0.5 - distance, 0, 1)``; the checker fits templates drawn by this same function
(a template drawn otherwise, say a triangle without its blurred tip, costs many points of measured accuracy).

Shapes: B pictures, K <= 3 object slots, H = W = 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CANVAS = 32
MAX_OBJECTS = 3

COLOURS = ("red", "green", "blue", "yellow", "purple")
COLOUR_RGB = np.array(
    [[0.90, 0.12, 0.12], [0.10, 0.72, 0.18], [0.12, 0.25, 0.92], [0.96, 0.87, 0.10], [0.76, 0.12, 0.86]],
    dtype=np.float32,
)
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS = ("white", "black", "gray", "brown")
BACKGROUND_RGB = np.array(
    [[0.96, 0.96, 0.96], [0.04, 0.04, 0.04], [0.52, 0.52, 0.52], [0.42, 0.27, 0.14]], dtype=np.float32
)
RELATIONS = ("above", "below", "left", "right")
KINDS = ("single", "count", "pair", "relation")

SIZE_RANGE = (0.7, 1.0)  # radius as a share of the largest the cell allows
FADE_RANGE = (0.5, 1.0)
SINGLE_RADIUS, SINGLE_JITTER = 11.5, 4.0
CELL_RADIUS, CELL_JITTER = 6.5, 0.8
CELL_LOW, CELL_MID, CELL_HIGH = 8.0, 16.0, 24.0

# Shapes fit the box [-r, r]^2. Area / r^2, and how far the centroid lies below the box centre in units of r.
SHAPE_AREA = np.array([np.pi, 4 * 0.88**2, 1.8, 8 * 0.36 - 4 * 0.36**2, 0.75 * np.pi], dtype=np.float32)
SHAPE_CENTROID = np.array([0.0, 0.0, 0.2, 0.0, 0.0], dtype=np.float32)


def max_radius(objects: int) -> float:
    """Largest radius in pixels for a scene of that many objects."""
    return SINGLE_RADIUS if objects == 1 else CELL_RADIUS


@dataclass
class Scenes:
    """B scenes as arrays. Slots beyond ``objects`` hold zeros and are not drawn.

    objects [B] int, colour [B, K] int, shape [B, K] int, x [B, K] and y [B, K] pixels, radius [B] pixels, fade [B], background [B] int.
    """

    objects: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    fade: np.ndarray
    background: np.ndarray

    def __len__(self) -> int:
        return len(self.objects)


def distance(shape: int, u: np.ndarray, v: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside) of points (u right, v down, from the box centre) to a shape of radius r; broadcasts."""
    if SHAPES[shape] == "circle":
        return np.sqrt(u * u + v * v) - r
    if SHAPES[shape] == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.75 * r) - 0.25 * r
    au = np.abs(u)
    if SHAPES[shape] == "triangle":
        return np.maximum(v - 0.8 * r, (1.8 * au - (v + r)) / np.float32(np.sqrt(1 + 1.8**2)))
    av = np.abs(v)
    if SHAPES[shape] == "square":
        return np.maximum(au, av) - 0.88 * r
    if SHAPES[shape] == "cross":
        w = 0.36 * r
        return np.minimum(np.maximum(au - r, av - w), np.maximum(au - w, av - r))
    raise ValueError(f"shape index {shape} is not in 0..{len(SHAPES) - 1}")


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Antialiased coverage [N, 32, 32] in [0, 1] of N shapes; shape [N] int, x, y, r [N] in pixels (pixel centres at .5)."""
    grid = np.arange(CANVAS, dtype=np.float32) + 0.5
    out = np.empty((len(shape), CANVAS, CANVAS), dtype=np.float32)
    for index in range(len(SHAPES)):
        rows = np.flatnonzero(shape == index)
        if len(rows):
            u = grid[None, None, :] - x[rows, None, None].astype(np.float32)
            v = grid[None, :, None] - y[rows, None, None].astype(np.float32)
            out[rows] = np.clip(0.5 - distance(index, u, v, r[rows, None, None].astype(np.float32)), 0, 1)
    return out


def render(scenes: Scenes) -> np.ndarray:
    """Draw scenes as float32 [B, 3, 32, 32] in [0, 1]."""
    count, slots = scenes.colour.shape
    background = BACKGROUND_RGB[scenes.background]
    picture = np.broadcast_to(background[:, :, None, None], (count, 3, CANVAS, CANVAS)).copy()
    for slot in range(slots):
        rows = np.flatnonzero(scenes.objects > slot)
        if not len(rows):
            continue
        matte = coverage(scenes.shape[rows, slot], scenes.x[rows, slot], scenes.y[rows, slot], scenes.radius[rows])
        drawn = COLOUR_RGB[scenes.colour[rows, slot]] * scenes.fade[rows, None] + background[rows] * (
            1 - scenes.fade[rows, None]
        )
        picture[rows] += matte[:, None] * (drawn[:, :, None, None] - picture[rows])
    return picture


def place(layouts: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw centres x, y [B, 3] for layouts: "single", "horizontal" (slot 0 left), "vertical" (slot 0 above), "up" or "down" (three)."""
    cells = {
        "single": [(CELL_MID, CELL_MID)],
        "horizontal": [(CELL_LOW, CELL_MID), (CELL_HIGH, CELL_MID)],
        "vertical": [(CELL_MID, CELL_LOW), (CELL_MID, CELL_HIGH)],
        "up": [(CELL_MID, CELL_LOW), (CELL_LOW, CELL_HIGH), (CELL_HIGH, CELL_HIGH)],
        "down": [(CELL_LOW, CELL_LOW), (CELL_HIGH, CELL_LOW), (CELL_MID, CELL_HIGH)],
    }
    centres = np.zeros((len(layouts), MAX_OBJECTS, 2), dtype=np.float32)
    jitter = rng.uniform(-1, 1, size=centres.shape).astype(np.float32)
    for row, layout in enumerate(layouts):
        spots = cells[layout]
        scale = SINGLE_JITTER if layout == "single" else CELL_JITTER
        centres[row, : len(spots)] = np.asarray(spots, dtype=np.float32) + scale * jitter[row, : len(spots)]
    return centres[..., 0], centres[..., 1]
