"""Captions of the tiny world: a small grammar, its exact inverse, and which facts no training stage may see.

``write_caption(facts, rng)`` picks one of several wordings; ``parse_caption`` inverts every one of them, so a checker needs the text only.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from didr_core.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    FADE_RANGE,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZE_RANGE,
    Scenes,
    max_radius,
    place,
)

NUMBERS = {2: ("two", "a pair of"), 3: ("three", "a trio of")}
PREFIXES = ("", "", "", "a picture of ")
JOINS = ("and", "with", "beside")
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
}
BACKGROUND_WORDS = (" on a {} background", " on {}", ", {} background", " against {}")
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}

KIND_WEIGHTS = {"single": 0.25, "count": 0.2, "pair": 0.25, "relation": 0.3}
NAMED_BACKGROUND = 0.6
HELD_OUT_SHARE = 12  # per cent of all facts, by hash
# Colour, shape and role that stand together in no training caption: "red circle above ..." and "... below a red circle" alike.
HELD_OUT_COMBINATIONS = frozenset(
    {
        ("red", "circle", "above"),
        ("green", "square", "left"),
        ("blue", "triangle", "right"),
        ("yellow", "cross", "below"),
        ("purple", "ring", "above"),
        ("red", "cross", "left"),
        ("blue", "circle", "below"),
        ("yellow", "triangle", "right"),
    }
)


@dataclass(frozen=True)
class CaptionFacts:
    """What a caption says. ``objects`` are (colour, shape) in the order named; ``count`` > 1 repeats the one object of kind "count".

    ``relation`` is where the first object lies as seen from the second; ``background`` is None when the caption leaves it free.
    """

    kind: str
    objects: tuple[tuple[str, str], ...]
    count: int
    relation: str | None = None
    background: str | None = None

    def expanded(self) -> tuple[tuple[str, str], ...]:
        """The objects a right picture shows, one entry each."""
        return self.objects * self.count if self.kind == "count" else self.objects

    def key(self) -> str:
        """One string for all facts that describe the same pictures ("A above B" and "B below A")."""
        objects, relation = self.objects, self.relation
        if self.kind == "pair":
            objects = tuple(sorted(objects))
        if relation in ("below", "right"):
            objects, relation = objects[::-1], OPPOSITE[relation]
        return f"{self.kind}|{objects}|{self.count}|{relation}|{self.background}"


def write_caption(facts: CaptionFacts, rng: np.random.Generator) -> str:
    """One of the wordings of these facts, drawn by rng."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    named = [f"{colour} {shape}" for colour, shape in facts.objects]
    prefix = "" if facts.kind == "relation" else pick(PREFIXES)
    if facts.kind == "single":
        body = f"a {named[0]}"
    elif facts.kind == "count":
        body = f"{pick(NUMBERS[facts.count])} {named[0]}{'es' if named[0].endswith('cross') else 's'}"
    elif facts.kind == "pair":
        body = f"a {named[0]} {pick(JOINS)} a {named[1]}"
    else:
        body = f"a {named[0]} {pick(RELATION_WORDS[str(facts.relation)])} a {named[1]}"
    ending = "" if facts.background is None else pick(BACKGROUND_WORDS).format(facts.background)
    return prefix + body + ending


def _either(options: Iterable[str]) -> str:
    return "(?:" + "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True)) + ")"


_OBJECT = rf"({_either(COLOURS)}) ({_either(SHAPES)})"
_PLURALS = {("crosses" if shape == "cross" else shape + "s"): shape for shape in SHAPES}
_NUMBER_OF = {word: number for number, words in NUMBERS.items() for word in words}
_RELATION_OF = {word: relation for relation, words in RELATION_WORDS.items() for word in words}
_START = rf"(?:{_either(PREFIXES)})"
_BACKGROUND = f"({_either(BACKGROUNDS)})"
_ENDING = "(?:" + "|".join(re.escape(w).replace(r"\{\}", _BACKGROUND) for w in BACKGROUND_WORDS) + ")?"
_COUNTED = re.compile(rf"{_START}({_either(_NUMBER_OF)}) ({_either(COLOURS)}) ({_either(_PLURALS)}){_ENDING}")
_NAMED = re.compile(rf"{_START}a {_OBJECT}(?: ({_either([*JOINS, *_RELATION_OF])}) a {_OBJECT})?{_ENDING}")


def parse_caption(text: str) -> CaptionFacts:
    """The facts of a caption. Raises ValueError when the text is not of this world's grammar."""
    if not isinstance(text, str):
        raise ValueError(f"a caption must be a string, got {type(text).__name__}")
    plain = " ".join(text.lower().strip().rstrip(".").split())
    if match := _COUNTED.fullmatch(plain):
        number, colour, shapes, *ending = match.groups()
        background = next(filter(None, ending), None)
        return CaptionFacts("count", ((colour, _PLURALS[shapes]),), _NUMBER_OF[number], None, background)
    if match := _NAMED.fullmatch(plain):
        colour, shape, word, other, form, *ending = match.groups()
        background = next(filter(None, ending), None)
        if word is None:
            return CaptionFacts("single", ((colour, shape),), 1, None, background)
        kind = "relation" if word in _RELATION_OF else "pair"
        return CaptionFacts(kind, ((colour, shape), (other, form)), 1, _RELATION_OF.get(word), background)
    raise ValueError(
        f"caption {text!r} is not of the tiny world's grammar; expected for example 'a red circle on a white background', "
        f"'two blue rings', 'a green cross and a red square' or 'a red circle to the left of a blue square on gray'"
    )


def roles(facts: CaptionFacts) -> set[tuple[str, str, str]]:
    """The (colour, shape, role) combinations that a relation caption holds, both objects' roles."""
    if facts.relation is None:
        return set()
    first, second = facts.objects
    return {(*first, facts.relation), (*second, OPPOSITE[facts.relation])}


def is_held_out(facts: CaptionFacts) -> bool:
    """Whether no training stage may see these facts: a held-out combination, or one of the 12 % of facts chosen by a hash."""
    if roles(facts) & HELD_OUT_COMBINATIONS:
        return True
    return zlib.crc32(("didr-zoo " + facts.key()).encode()) % 100 < HELD_OUT_SHARE


def sample_facts(
    rng: np.random.Generator, kinds: dict[str, float] | None = None, held_out: bool | None = False
) -> CaptionFacts:
    """Draw facts; ``held_out`` False gives training facts, True held-out ones, None either."""
    weights = kinds or KIND_WEIGHTS
    names = list(weights)
    chances = np.array([weights[name] for name in names])
    while True:
        kind = names[int(rng.choice(len(names), p=chances / chances.sum()))]
        first = (COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))])
        second = (COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))])
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))] if rng.random() < NAMED_BACKGROUND else None
        if kind in ("pair", "relation") and first == second:
            continue
        facts = CaptionFacts(
            kind=kind,
            objects=(first, second) if kind in ("pair", "relation") else (first,),
            count=int(rng.integers(2, 4)) if kind == "count" else 1,
            relation=RELATIONS[rng.integers(len(RELATIONS))] if kind == "relation" else None,
            background=background,
        )
        if held_out is None or is_held_out(facts) == held_out:
            return facts


def draw_scenes(facts: list[CaptionFacts], rng: np.random.Generator) -> Scenes:
    """Draw one right scene for each entry: free background, layout and order uniformly, size and fade independent of all else."""
    total = len(facts)
    colour = np.zeros((total, MAX_OBJECTS), dtype=np.int64)
    shape = np.zeros_like(colour)
    objects = np.zeros(total, dtype=np.int64)
    background = rng.integers(len(BACKGROUNDS), size=total)
    layouts = []
    coin = rng.random((total, 2))
    for row, entry in enumerate(facts):
        shown = list(entry.expanded())
        if entry.kind == "single":
            layouts.append("single")
        elif entry.kind == "count" and entry.count == 3:
            layouts.append("up" if coin[row, 0] < 0.5 else "down")
        elif entry.kind == "relation":
            layouts.append("vertical" if entry.relation in ("above", "below") else "horizontal")
            shown = shown[::-1] if entry.relation in ("below", "right") else shown
        else:
            layouts.append("vertical" if coin[row, 0] < 0.5 else "horizontal")
            shown = shown[::-1] if coin[row, 1] < 0.5 else shown
        objects[row] = len(shown)
        colour[row, : len(shown)] = [COLOURS.index(name) for name, _ in shown]
        shape[row, : len(shown)] = [SHAPES.index(name) for _, name in shown]
        if entry.background is not None:
            background[row] = BACKGROUNDS.index(entry.background)
    x, y = place(layouts, rng)
    limit = np.array([max_radius(int(number)) for number in objects], dtype=np.float32)
    radius = limit * rng.uniform(*SIZE_RANGE, size=total).astype(np.float32)
    fade = rng.uniform(*FADE_RANGE, size=total).astype(np.float32)
    return Scenes(objects, colour, shape, x, y, radius, fade, background)
