"""An evaluation as a folder: models x prompts x seeds, drawn and judged a block of prompts at a time, by any number of processes.

    OUT/pictures/<model>-<hash>/000003.parquet    a row a picture: index, prompt, seed, picture (PNG), latent_mean, latent_std
    OUT/scores/<model>-<hash>/000003.parquet      a row a picture: index, prompt, seed, every measure, and features where asked for
    OUT/scores.json, scores.npz, report.html      once all are there

A block's file is written whole or not at all and is never made twice. The hashes are of all that the rows follow from (weights, settings,
prompts, seeds, versions of the libraries; scores: the rewards too). What is judged is the 8-bit picture that is kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from didr_core.config import Component, fingerprint
from didr_core.config.files import replaced
from didr_core.config.registry import configured
from didr_core.evaluate.features import cmmd, fid, kid, neighbours
from didr_core.evaluate.judges import Drawn, Judges, of_latents
from didr_core.evaluate.layouts import Row
from didr_core.evaluate.models import Model, Pictures
from didr_core.evaluate.scores import Arrays, Scores

Item = tuple[int, int]
"""A model, by its place, and a block of prompts."""
KEYS = ("index", "prompt", "seed", "picture")
NEAREST = 5
"""Neighbours that a ball reaches to, see :func:`didr_core.evaluate.features.neighbours`."""


@dataclass(frozen=True)
class Contest:
    """What is compared, and where it lies. Travels to actors by pickle; a folder must be one that all of them see."""

    folder: Path
    models: tuple[Model, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rewards: Mapping[str, Any]  # options by the name of the measure, plain: a class may live in a file of the user's
    world: str = "none"
    batch: int = 64  # prompts a block
    features: str = ""  # the reward whose picture features are kept beside the scores
    lpips: bool = False

    @cached_property
    def keys(self) -> list[tuple[str, str]]:
        """Names of each model's folders of pictures and of scores."""
        asked = hashlib.sha256(json.dumps([self.prompts, self.seeds, self.batch]).encode()).hexdigest()
        judged = {name: fingerprint.component("rewards", config) for name, config in self.judges().items()}
        keys = []
        for model in self.models:
            drawn = fingerprint.digest(model.fingerprint, asked)
            scored = fingerprint.digest(drawn, judged, self.world, *filter(None, (self.features, self.lpips)))
            keys.append((f"{model.name}-{drawn[:12]}", f"{model.name}-{scored[:12]}"))
        return keys

    def judges(self) -> dict[str, Component]:
        """The rewards' configs."""
        return {name: configured("rewards", tree) for name, tree in self.rewards.items()}

    @property
    def blocks(self) -> int:
        """Of every model."""
        return -(-len(self.prompts) // self.batch)

    def places(self, block: int) -> range:
        """The prompts of a block."""
        return range(block * self.batch, min(len(self.prompts), (block + 1) * self.batch))

    def pictures(self, item: Item) -> Path:
        """The file of a block's pictures."""
        return self.folder / "pictures" / self.keys[item[0]][0] / f"{item[1]:06d}.parquet"

    def scores_of(self, item: Item) -> Path:
        """The file of a block's scores."""
        return self.folder / "scores" / self.keys[item[0]][1] / f"{item[1]:06d}.parquet"

    def todo(self) -> list[Item]:
        """What is not scored yet, the dearest models first: what is left at the end is then soon done."""
        order = sorted(range(len(self.models)), key=lambda i: -self.models[i].cost)
        items = [(model, block) for model in order for block in range(self.blocks)]
        return [item for item in items if not self.scores_of(item).is_file()]

    def cost(self, item: Item) -> int:
        """Of a block, in network calls on one picture; being judged counts as one."""
        return (self.models[item[0]].cost + 1) * len(self.places(item[1])) * len(self.seeds)

    def scores(self, facts: Mapping[str, Any], focus: str) -> Scores:
        """All models compared, from the files.

        Args:
            facts: see :func:`didr_core.evaluate.scores.origin`. focus: named first in its pairs.
        """
        arrays: dict[str, Arrays] = {}
        rows: dict[str, Any] = {}
        for place, model in enumerate(self.models):
            parts = [_read_scores(file, len(self.seeds)) for file in self._scores_of(place)]
            arrays[model.name] = {name: np.concatenate([p[0][name] for p in parts], 1)[None] for name in parts[0][0]}
            seconds, calls = (sum(told[key] for _, told in parts) for key in ("seconds", "calls"))
            pictures = len(self.prompts) * len(self.seeds)
            # what stock diffusers did, whatever a version of it takes `steps` for
            made = {"calls": round(calls / (self.blocks * len(self.seeds)), 2), "seconds": round(seconds, 3)}
            rows[model.name] = {**model.row(), **made, "pictures_made": pictures}
        return Scores.build(rows, arrays, self.prompts, self.seeds, facts=facts, focus=focus, world=self.world)

    def laws(self, real: str) -> dict[str, dict[str, float]]:
        """How far the pictures of every other model, of all prompts and seeds, are from those of ``real`` as a set, in :attr:`features`:
        see :mod:`didr_core.evaluate.features`."""
        sets = {model.name: self._features(place) for place, model in enumerate(self.models)}
        given = sets.pop(real)
        return {
            name: {"fid": fid(given, made), "kid": kid(given, made), "cmmd": cmmd(given, made)}
            | neighbours(given, made, NEAREST)
            for name, made in sets.items()
        }

    def _features(self, place: int) -> NDArray[Any]:
        """``[M, D]`` of a model's M pictures."""
        columns = [pq.read_table(file, columns=["features"]).column(0) for file in self._scores_of(place)]
        return np.concatenate([np.stack(column.to_numpy(zero_copy_only=False)) for column in columns])

    def rows(self, place: int, told: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        """A model's pictures, prompt by prompt, for :func:`didr_core.evaluate.layouts.write_pictures`.

        Args:
            told: ``id`` and ``metadata`` of every prompt.
        """
        for block in range(self.blocks):
            pictures = pq.read_table(self.pictures((place, block)), columns=["picture"]).column(0).to_pylist()
            width = len(self.places(block))
            for i, number in enumerate(self.places(block)):
                drawn = [Image.open(io.BytesIO(png)) for png in pictures[i::width]]
                yield Row(number, told[number]["id"], self.prompts[number], told[number]["metadata"], drawn)

    def _scores_of(self, place: int) -> list[Path]:
        return [self.scores_of((place, block)) for block in range(self.blocks)]

    def shown(self, places: Sequence[int]) -> dict[str, dict[int, bytes]]:
        """Pictures (PNG) of some prompts with the first seed, by model and place."""
        found: dict[str, dict[int, bytes]] = {model.name: {} for model in self.models}
        for number, model in enumerate(self.models):
            for block in sorted({place // self.batch for place in places}):
                table = pq.read_table(self.pictures((number, block)), columns=["index", "picture"])
                kept = table.slice(0, len(self.places(block))).to_pylist()
                found[model.name] |= {row["index"]: row["picture"] for row in kept if row["index"] in places}
        return found


class Hand:
    """One process at work on a contest: it holds one model and the judges at a time, loaded when they are first needed."""

    def __init__(self, contest: Contest, device: torch.device) -> None:
        self.contest, self.device = contest, device
        self._loaded: tuple[int, Pictures] | None = None
        self._judges: Judges | None = None

    def draw(self, item: Item) -> None:
        """A block's pictures, unless they are there (of a kill, or of another reward's evaluation)."""
        contest, (number, block) = self.contest, item
        if contest.pictures(item).is_file():
            return
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None  # two would not fit
            self._loaded = (number, contest.models[number].load(self.device, contest.prompts, contest.seeds))
        model, places = self._loaded[1], contest.places(block)
        prompts, calls, began = [contest.prompts[i] for i in places], model.calls, time.perf_counter()
        columns: dict[str, list[Any]] = {name: [] for name in KEYS}
        for seed in contest.seeds:
            images, latents = model.draw(prompts, places, seed)
            columns["index"] += places
            columns["prompt"] += prompts
            columns["seed"] += [seed] * len(prompts)
            columns["picture"] += [png(image) for image in images]
            for name, value in of_latents(latents).items() if latents is not None else ():
                columns.setdefault(name, []).extend(value.tolist())
        told = {"seconds": time.perf_counter() - began, "calls": model.calls - calls}
        _write(contest.pictures(item), columns, told)

    def judge(self, item: Item) -> None:
        """A block's scores, of its pictures."""
        contest, places = self.contest, self.contest.places(item[1])
        if contest.scores_of(item).is_file():
            return
        self._judges = self._judges or Judges.load(
            contest.judges(), contest.world, self.device, features=contest.features, lpips=contest.lpips
        )
        prompts = [contest.prompts[i] for i in places]
        table = pq.read_table(contest.pictures(item))
        found = self._judges.look(prompts, self._judges.prepare(prompts), self._seeds(table, len(places)))
        columns = {name: table.column(name).to_pylist() for name in KEYS if name != "picture"}
        features = found.pop("features", None)
        whole = {name: np.broadcast_to(value, (len(contest.seeds), len(places))) for name, value in found.items()}
        told = _told(table) | {"once": [name for name, value in found.items() if len(value) < len(contest.seeds)]}
        columns |= {name: value.reshape(-1) for name, value in whole.items()}
        if features is not None:
            columns["features"] = list(features.reshape(-1, features.shape[-1]))
        _write(contest.scores_of(item), columns, told)

    def _seeds(self, table: pa.Table, count: int) -> Iterator[Drawn]:
        """What a file of pictures holds, seed by seed."""
        beside = [name for name in table.column_names if name not in KEYS]
        for first in range(0, len(table), count):
            rows = table.slice(first, count)
            images = torch.stack([_image(png) for png in rows.column("picture").to_pylist()])
            yield images.to(self.device), {name: rows.column(name).to_numpy().astype(np.float32) for name in beside}


def run(contest: Contest, device: torch.device) -> Iterator[Item]:
    """All that is missing, in this process; yields what is done."""
    hand = Hand(contest, device)
    for item in contest.todo():
        hand.draw(item)
        hand.judge(item)
        yield item


def _write(path: Path, columns: Mapping[str, Iterable[Any]], told: Mapping[str, Any]) -> None:
    table = pa.table({name: pa.array(value) for name, value in columns.items()})
    with replaced(path) as partial:
        pq.write_table(table.replace_schema_metadata({"didr": json.dumps(told)}), partial, write_page_checksum=True)


def _told(table: pa.Table) -> dict[str, Any]:
    return dict(json.loads(table.schema.metadata[b"didr"]))


def _read_scores(path: Path, seeds: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """``{measure: [S, b]}`` of a file, ``[1, b]`` of what is one of all seeds together, and what it was told beside."""
    table = pq.read_table(path)
    told, found = _told(table), {}
    for name in (n for n in table.column_names if n not in (*KEYS, "features")):
        value = table.column(name).to_numpy().reshape(seeds, -1)
        found[name] = value[:1] if name in told["once"] else value
    return found, told


def png(image: Tensor) -> bytes:
    """``[3, H, W]`` in [0, 1] as a PNG, rounded to 8 bits as diffusers does."""
    file = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def _image(png: bytes) -> Tensor:
    with Image.open(io.BytesIO(png)) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
