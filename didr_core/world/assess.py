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
from didr_core.world.checker import MAX_PARTS, Readings, check, read_pictures
from didr_core.world.scenes import BACKGROUNDS, CELL_MID, COLOURS, SHAPES, SINGLE_JITTER

STRICT_BONUS = 3.0
FAITHFULNESS_WEIGHT = 4.0
TASTE_WEIGHTS = {"size": 1.0, "contrast": 1.0}
MEASURES = (
    "strict",
    "loose",
    "count",
    "colour",
    "shape",
    "relation",
    "background",
    "shape_iou",
    "size",
    "contrast",
    "centring",
    "utility",
)
POSITION_GROUPS = {
    "single": 9,
    "pair": 4,
    "two": 2,
    "three": 2,
}  # group of captions -> number of coarse layouts it leaves free
POSITION_BINS = 9

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
    taste = sum(weight * checks[name] for name, weight in TASTE_WEIGHTS.items())
    return (FAITHFULNESS_WEIGHT * graded + STRICT_BONUS * checks["strict"] + taste).astype(np.float32)


def utility(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Utility [N] of pictures [N, 3, 32, 32] in [0, 1] for their captions."""
    return assess(images, captions)["utility"]


def _group(facts: CaptionFacts) -> str:
    """Which set of free layouts a caption has; "" when a relation fixes the layout."""
    if facts.kind == "count":
        return "two" if facts.count == 2 else "three"
    return "" if facts.kind == "relation" else facts.kind


def _position_bin(group: str, facts: CaptionFacts, readings: Readings, row: int) -> int:
    """Coarse layout of the picture among those its caption leaves free; -1 when not readable or not free."""
    shown = int(readings.parts[row])
    if group == "" or shown != len(facts.expanded()) or shown > MAX_PARTS:
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
    looks = list(zip(readings.colour[row, :2].tolist(), readings.shape[row, :2].tolist(), strict=False))
    first = (COLOURS.index(facts.objects[0][0]), SHAPES.index(facts.objects[0][1]))
    if first not in looks:
        return -1
    one = looks.index(first)
    before = x[one] < x[1 - one] if horizontal else y[one] < y[1 - one]
    return 2 * int(horizontal) + int(before)


def assess(images: np.ndarray, captions: Sequence[str]) -> Assessment:
    """Measure pictures [N, 3, 32, 32] (float in [0, 1]) against captions.

    Returns arrays [N]: every name of MEASURES; ``background_seen`` (index, -1 unreadable), ``background_free`` (bool), ``position_bin``
    (-1 unreadable or not free), ``position_group`` (str, "" when not free), ``kind`` (str), ``caption`` (str).
    Raises ValueError for wrong shapes, non-finite pixels, or a caption outside the grammar.
    """
    images = np.asarray(images, dtype=np.float32)
    if not np.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values; the generator or decoder failed")
    facts = [parse_caption(caption) for caption in captions]
    readings = read_pictures(images)
    out = check(readings, facts)
    out["utility"] = utility_of(out)
    groups = [_group(fact) for fact in facts]
    out["background_seen"] = readings.background
    out["background_free"] = np.array([fact.background is None for fact in facts], dtype=bool)
    bins = [
        _position_bin(group, fact, readings, row) for row, (group, fact) in enumerate(zip(groups, facts, strict=False))
    ]
    out["position_bin"] = np.array(bins, dtype=np.int64)
    out["position_group"] = np.array(groups, dtype=object)
    out["kind"] = np.array([fact.kind for fact in facts], dtype=object)
    out["caption"] = np.array([str(caption) for caption in captions], dtype=object)
    return out


def _bits(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits along the last axis of counts; 0 where all are zero."""
    total = counts.sum(-1, keepdims=True)
    share = counts / np.maximum(total, 1e-12)
    return -(share * np.log2(np.maximum(share, 1e-12))).sum(-1)


class _Freedom:
    """Histograms of what captions leave free, by caption, so that resampling captions is one matrix product."""

    def __init__(self, data: Assessment) -> None:
        self.names, self.index = np.unique(data["caption"].astype(str), return_inverse=True)
        captions = len(self.names)
        self.tables: dict[str, np.ndarray] = {}
        seen = data["background_free"] & (data["background_seen"] >= 0)
        self.tables["background"] = self._table(seen, data["background_seen"], len(BACKGROUNDS), captions)
        for group, size in POSITION_GROUPS.items():
            rows = (data["position_group"] == group) & (data["position_bin"] >= 0)
            self.tables[group] = self._table(rows, data["position_bin"], size, captions)

    def _table(self, rows: np.ndarray, bins: np.ndarray, size: int, captions: int) -> np.ndarray:
        table = np.zeros((captions, size))
        np.add.at(table, (self.index[rows], bins[rows]), 1)
        return table

    def marginal(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Entropies over all captions together for caption weights [R, C]."""
        out = {"background_bits": _bits(weights @ self.tables["background"])}
        bits, mass = [], []
        for group in POSITION_GROUPS:
            counts = weights @ self.tables[group]
            bits.append(_bits(counts))
            mass.append(counts.sum(-1))
        total = np.maximum(np.sum(mass, axis=0), 1e-12)
        out["position_bits"] = np.sum([b * m for b, m in zip(bits, mass, strict=False)], axis=0) / total
        return out

    def within(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Mean entropy inside each caption across its pictures (Miller-Madow corrected); needs repeated captions to mean anything."""
        out = {}
        for name, tables in {"background": ["background"], "position": list(POSITION_GROUPS)}.items():
            top, bottom = np.zeros(len(weights)), np.zeros(len(weights))
            for table in (self.tables[key] for key in tables):
                counts = table.sum(1)
                used = counts > 1
                bias = (np.maximum((table > 0).sum(1) - 1, 0)) / (2 * np.log(2) * np.maximum(counts, 1))
                bits = np.minimum(_bits(table) + bias, np.log2(table.shape[1]))
                top += weights[:, used] @ bits[used]
                bottom += weights[:, used].sum(1)
            out[f"{name}_bits_within"] = np.where(bottom > 0, top / np.maximum(bottom, 1e-12), np.nan)
        return out

    def all(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        return {**self.marginal(weights), **self.within(weights)}


def summary(data: Assessment) -> dict[str, float]:
    """Means of MEASURES, strict by kind, and entropies in bits of what captions leave free.

    ``background_bits`` (at most 2) is over captions that name no background; ``position_bits`` over captions that leave the layout free
    (mean over groups, at most about 2.1 for the bundled prompts); ``*_within`` are inside one caption (NaN without repeats).
    """
    out = {name: float(data[name].mean()) for name in MEASURES}
    for kind in sorted(set(data["kind"])):
        out[f"strict_{kind}"] = float(data["strict"][data["kind"] == kind].mean())
    freedom = _Freedom(data)
    out.update({name: float(value[0]) for name, value in freedom.all(np.ones((1, len(freedom.names)))).items()})
    free = data["background_free"] & (data["background_seen"] >= 0)
    shares = np.bincount(data["background_seen"][free], minlength=len(BACKGROUNDS)) / max(1, int(free.sum()))
    out.update({f"free_{name}": float(share) for name, share in zip(BACKGROUNDS, shares, strict=False)})
    out["pictures"] = float(len(data["caption"]))
    return out


def _interval(values: np.ndarray) -> tuple[float, float]:
    return float(np.nanpercentile(values, 2.5)), float(np.nanpercentile(values, 97.5))


def compare(
    a: Assessment, b: Assessment, scores: Sequence[str] = ("utility",), resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Paired comparison of two sets of pictures for the same captions in the same order.

    ``scores`` names arrays [N] held by both (add a reward's scores to the dicts to have it judged too): ``win_<score>`` is the share of
    comparisons that a wins, ties half. Every measure and every entropy gets ``{"a", "b", "difference", "low", "high"}``; intervals are 95 %
    bootstrap over captions, so repeated seeds of a caption stay together.
    """
    if len(a["caption"]) != len(b["caption"]) or not np.array_equal(a["caption"].astype(str), b["caption"].astype(str)):
        raise ValueError("compare needs the same captions in the same order on both sides")
    missing = [name for name in scores if name not in a or name not in b]
    if missing:
        raise ValueError(f"scores {missing} are missing from one side; add them as arrays before comparing")
    one, two = _Freedom(a), _Freedom(b)
    captions = len(one.names)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(captions, np.full(captions, 1 / captions), size=resamples).astype(np.float64)
    pictures = np.bincount(one.index, minlength=captions).astype(np.float64)

    def mean_by_resample(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(one.index, weights=values.astype(np.float64), minlength=captions)
        return (weights @ sums) / (weights @ pictures)

    out: dict[str, dict[str, float]] = {}
    for name in scores:
        won = (a[name] > b[name]) + 0.5 * (a[name] == b[name])
        low, high = _interval(mean_by_resample(won))
        out[f"win_{name}"] = {"share": float(won.mean()), "low": low, "high": high}
    for name in dict.fromkeys((*MEASURES, *scores)):
        low, high = _interval(mean_by_resample(a[name]) - mean_by_resample(b[name]))
        left, right = float(a[name].mean()), float(b[name].mean())
        out[name] = {"a": left, "b": right, "difference": left - right, "low": low, "high": high}
    whole = np.ones((1, captions))
    left_all, right_all, left_boot, right_boot = one.all(whole), two.all(whole), one.all(weights), two.all(weights)
    for name in left_all:
        gaps = left_boot[name] - right_boot[name]
        low, high = _interval(gaps) if np.isfinite(gaps).any() else (float("nan"), float("nan"))
        left, right = float(left_all[name][0]), float(right_all[name][0])
        out[name] = {"a": left, "b": right, "difference": left - right, "low": low, "high": high}
    return out
