"""The folder of one sweep: the truth about it, so that a kill at any moment loses nothing and nothing is done twice.

runs/<name>/
  sweep.json       its options, MLflow run ids, status
  config.yaml      what all trials share
  points.jsonl     a line a trial: its number and its settings, written before the trial starts
  trials/0003/     a run folder, as of `didr align`: metrics.jsonl, checkpoints/, grid.png, scores.json; result.json ends it
                   (with a scheduler also glances.jsonl: what it saw at each checkpoint)
  shared/          batches, the start's and the reference's scores: made once
  tune/            Ray Tune's own logs; never read
  trials.parquet, front.json, front.png, heat.png, export/    made at the end
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.files import expanded, mapping, replace_text
from didr_core.config.provenance import provenance
from didr_core.data.storage import disk, local_folder
from didr_core.train.run_folder import LATEST, RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines.sweeps.space import Point, Space, read

FINAL = ("finished", "failed", "stopped")
"""How a trial may end. "lost" (its process or node died too often) is tried again by a resume."""


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep is asked to do, as sweep.json keeps it; 0 or "" where the choice is left to :func:`pipelines.sweep.sweep`."""

    recipe: str = "tiny"
    overrides: Sequence[str] = ()  # of the recipe, for all trials
    space: str = "tilt_by_drp"  # of `tune_spaces/`, or a file
    trials: int = 0  # 12, or the whole grid
    search: str = ""  # grid, random, optuna; left open: grid for spaces of grids, else random
    scheduler: str = "none"  # or asha
    concurrent: int = 0  # trials at once; left open: as many as fit
    workers: int = 1  # processes that train one trial: 1 = its own
    name: str = ""  # of the sweep's folder
    seed: int = 0  # of the points
    patience: float = 30.0  # minutes without any news after which the sweep gives up
    command: str = ""  # what was typed
    about: str = ""  # the space in words
    tree: Mapping[str, Any] = field(default_factory=dict)  # the space, as plain data
    facts: Mapping[str, Any] = field(default_factory=dict)


def trial_name(number: int) -> str:
    """A trial for people: by the number that its folder has."""
    return f"trial {number:04d}"


@dataclass(frozen=True)
class SweepFolder:
    """An existing sweep folder; make one with :meth:`create`, find one with :meth:`find`."""

    path: Path

    @classmethod
    def create(cls, options: SweepOptions, config: Config, points: Sequence[Point]) -> SweepFolder:
        """A new folder ``<config.output>/<options.name>``.

        Raises:
            DIDRError: it exists.
        """
        path = local_folder("output", config.output) / options.name
        if (path / "sweep.json").is_file():
            raise DIDRError(
                f"--name {options.name}: that sweep exists. `didr sweep --resume {options.name}` goes on with it."
            )
        if path.exists() and any(path.iterdir()):
            raise DIDRError(f"--name {options.name}: {path} exists and is not empty. Choose another name.")
        folder = cls(path)
        folder.set_config(config)
        for number, point in enumerate(points):
            folder.give(number, point)
        folder.update(plan=asdict(options) | {"facts": provenance()}, status="interrupted", started=time.time())
        return folder

    @classmethod
    def find(cls, name: str, output: str = "runs") -> SweepFolder:
        """The folder ``name``, or the sweep of that name in ``output``; ``latest`` is the newest one there.

        Raises:
            DIDRError: there is none (names those that there are).
        """
        for path in (expanded(name), local_folder("output", output) / name):
            if (path / "sweep.json").is_file():
                return cls(path.resolve())
        if name == LATEST and (newest := cls.in_order(output)):
            return newest[0]
        there = sorted(p.parent.name for p in local_folder("output", output).glob("*/sweep.json"))
        raise DIDRError(
            f"--resume {name!r}: no sweep of that name or path. Sweeps in {output}: {', '.join(there[-8:]) or 'none'}."
        )

    @classmethod
    def in_order(cls, output: str) -> list[SweepFolder]:
        """The sweeps in ``output``, the newest first."""
        found = [cls(path.parent) for path in local_folder("output", output).glob("*/sweep.json")]
        return sorted(found, key=lambda folder: float(folder.info()["started"]), reverse=True)

    @classmethod
    def unfinished(cls, options: SweepOptions, output: str) -> SweepFolder | None:
        """The newest sweep in ``output`` that has not finished, began as ``options`` ask, and that no living driver holds."""
        for folder in cls.in_order(output):
            if folder.info()["status"] != "finished" and _asked(folder.options(), options) == _asked(options, options):
                with suppress(DIDRError), folder.lock():
                    return folder
        return None

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name

    @property
    def shared(self) -> Path:
        """What is made once and read by every trial."""
        return self.path / "shared"

    def options(self) -> SweepOptions:
        """What it was asked to do."""
        return SweepOptions(**self.info()["plan"])

    def space(self) -> Space:
        """What is swept."""
        options = self.options()
        return read(options.space, options.tree, options.about)

    def info(self) -> dict[str, Any]:
        """What sweep.json says."""
        return _json(self.path / "sweep.json", "Start a new sweep.") or {}

    def update(self, **values: Any) -> None:
        """Set keys of sweep.json. Only the driver does."""
        self.write("sweep.json", self.info() | values)

    def lock(self) -> AbstractContextManager[None]:
        """One driver a sweep.

        Raises:
            DIDRError: another one is at work.
        """
        return RunFolder(self.path).lock()

    def config(self) -> Config:
        """What trials share (and the first trial's own point)."""
        return configs.recorded(self.path / "config.yaml")

    def set_config(self, config: Config) -> None:
        """Write config.yaml."""
        with disk("output", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        RunFolder(self.path).write_config(config)

    def config_of(self, number: int, workers: int = 1) -> Config:
        """The whole configuration of one trial."""
        return self.config_at(self.points()[number], workers)

    def config_at(self, point: Point, workers: int = 1) -> Config:
        """The whole configuration of a trial with these settings."""
        own = {"workers.train": workers, "train.keep_checkpoints": 1, "evaluation.every": 0}
        if drives_group(self.config(), workers):
            own["evaluation.prompts"] = 0  # the group's rank 0 does not judge: the sweep does
        config = configs.recorded(self.path / "config.yaml", values=point | own)
        made = self.path.parent / "cache" if config.precomputed else self.shared / "feed"
        return config.model_copy(
            update={"data": config.data.model_copy(update={"cache": config.data.cache or str(made)})}
        )

    def points(self) -> dict[int, Point]:
        """Number to settings of the trials that are known so far."""
        return {int(row["number"]): row["set"] for row in read_lines(self.path / "points.jsonl", "number")}

    def give(self, number: int, point: Point) -> None:
        """Write down a trial, before it starts."""
        self._append("points.jsonl", {"number": number, "set": point})

    def glances(self, number: int) -> list[dict[str, Any]]:
        """What a scheduler saw of the trial on its way, in order."""
        return read_lines(self.trial(number).path / "glances.jsonl")

    def add_glance(self, number: int, **values: Any) -> None:
        """Write down what a scheduler sees, before it decides."""
        self._append(f"trials/{number:04d}/glances.jsonl", values)

    def trial(self, number: int) -> RunFolder:
        """The run folder of a trial, whether or not it is there yet."""
        return RunFolder(self.path / "trials" / f"{number:04d}")

    def result(self, number: int) -> dict[str, Any] | None:
        """How the trial ended; None while it has not."""
        return _json(self.trial(number).path / "result.json", "Remove it: the trial is then judged again.")

    def end(self, number: int, **values: Any) -> dict[str, Any]:
        """Write result.json: from now on the trial is over. ``status`` is one of :data:`FINAL`, or "lost"."""
        tree = {"number": number, "set": self.points().get(number, {}), **values}
        self.write(f"trials/{number:04d}/result.json", tree)
        return tree

    def missing(self) -> list[int]:
        """Numbers of the trials that are not over."""
        return [number for number in range(self.options().trials) if self.result(number) is None]

    def forget_lost(self) -> None:
        """Trials whose process died too often may try again."""
        for result in self.results():
            if result["status"] == "lost":
                (self.trial(result["number"]).path / "result.json").unlink()

    def results(self) -> list[dict[str, Any]]:
        """All results so far, by number."""
        return [r for number in sorted(self.points()) if (r := self.result(number))]

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """A file of JSON, whole or not at all."""
        with disk("output", self.path):
            replace_text(self.path / name, json.dumps(tree, indent=1, ensure_ascii=False, default=str) + "\n")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        before = path.read_bytes() if path.is_file() else b""
        with disk("output", self.path), path.open("ab") as file:
            if not before.endswith(b"\n"):  # half a line, of a machine that went down
                file.truncate(before.rfind(b"\n") + 1)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _asked(options: SweepOptions, by: SweepOptions) -> dict[str, Any]:
    """What two sweeps must have in common to be one: all but how it runs, and the name if ``by`` has none."""
    free = {"command", "facts", "patience", "concurrent", *(() if by.name else ("name",))}
    return json.loads(json.dumps({key: value for key, value in asdict(options).items() if key not in free}))


def _json(path: Path, fix: str) -> dict[str, Any] | None:
    """None where there is no such file."""
    return mapping(path.read_bytes(), str(path), fix) if path.is_file() else None


def drives_group(config: Config, workers: int) -> bool:
    """Whether a trial's process drives a worker group, or trains itself: of several workers, or of one with a reward in actors."""
    return workers > 1 or bool(config.in_actors)
