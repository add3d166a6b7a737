"""The folder of one run: what it is called, what lies in it, and how it is written so that a kill at any moment loses nothing.

    runs/<name>-<yyyymmdd-hhmmss>/
      config.yaml      the resolved configuration
      run.json         status, commit, versions, MLflow run id
      metrics.jsonl    one line a step; alarms.jsonl one line an alarm
      profile.json     where the time of the steps went, if asked for
      checkpoints/step-000100/    see checkpoint.py
      grids/*.png, curves.png, scores.json, report.html, export/    made at the end

Files that are replaced are written beside and renamed. On a cluster the folder must be on storage that every node sees.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.files import expanded, mapping, replace_text
from didr_core.config.provenance import provenance, versions
from didr_core.types import DIDRError, StepReport

LEAST_FREE = 64 * 2**20
Status = Literal["running", "finished", "failed", "interrupted"]
FREE_TO_CHANGE = (
    "workers",
    "reward.placement",
    "reward.actors",
    "data.cache",
    "data.allow_overlap",
    "tracking",
    "evaluation",
    "alarms",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.threads",
)
"""Keys that `--resume` may set anew: they change how a run runs, not what its next update is."""

NUMBERS = ("torch", "diffusers", "transformers")
"""Packages whose version may change what a run computes."""


@dataclass(frozen=True)
class RunFolder:
    """An existing run folder; make one with :meth:`create`, find one with :meth:`find`."""

    path: Path

    @classmethod
    def create(cls, config: Config, folder: str | None = None, command: str = "") -> RunFolder:
        """A new folder: ``folder`` itself, or ``<config.output>/<name>-<time>``.

        Raises:
            DIDRError: ``folder`` holds another run or anything else, cannot be made, or is no path.
        """
        path = local_folder("--output" if folder else "output", folder or config.output)
        if not folder:
            stamp = path / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            path = next(p for n in range(100) if not (p := Path(f"{stamp}-{n}" if n else stamp)).exists())
        if (path / "run.json").is_file():
            raise DIDRError(
                f"--output {path}: belongs to run {cls(path).info().get('name')!r} (status {cls(path).info().get('status')!r}). "
                f"Give another folder, or continue that run with `didr align --resume {path}`."
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DIDRError(f"--output {path}: exists and is not empty. Give a new or empty folder.")
        with disk("output", path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run.write_config(config)
        run.update(
            name=path.name, recipe=config.name, command=command, status="running", started=time.time(), **provenance()
        )
        return run

    @classmethod
    def find(cls, run: str, output: str = "runs") -> RunFolder:
        """The folder ``run``, or the run of that name in ``output``.

        Raises:
            DIDRError: there is none (names the runs that there are).
        """
        for path in (expanded(run), local_folder("output", output) / run):
            if (path / "run.json").is_file():
                return cls(path.resolve())
        there = sorted(p.parent.name for p in local_folder("output", output).glob("*/run.json"))
        raise DIDRError(
            f"run {run!r}: no run folder of that name or path (one with run.json in it). "
            f"Runs in {output}: {', '.join(there[-8:]) or 'none'}."
        )

    @contextmanager
    def lock(self, doing: str = "training") -> Iterator[None]:
        """One process at a time trains (or what else it is ``doing``) in a folder; the system frees the lock when that process dies.

        Raises:
            DIDRError: another process holds it.
        """
        with disk("output", self.path):
            file = (self.path / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DIDRError(
                    f"run {self.path}: another process is {doing} in it. Wait for it, or stop it first."
                ) from error
            yield

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's configuration, with ``a.b=c`` overrides of keys in :data:`FREE_TO_CHANGE`.

        Raises:
            DIDRError: an override that would change what the run computes, or a damaged config.yaml.
        """
        for item in overrides:
            key = item.partition("=")[0].strip()
            if not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE):
                raise DIDRError(
                    f"--set {item!r}: a resumed run must go on as it began; only {', '.join(FREE_TO_CHANGE)} may change. "
                    "Start a new run for anything else."
                )
        return configs.recorded(self.path / "config.yaml", overrides)

    def write_config(self, config: Config) -> None:
        """Write ``config.yaml``."""
        self._replace("config.yaml", yaml.safe_dump(configs.dump(config), sort_keys=False, allow_unicode=True))

    def info(self) -> dict[str, Any]:
        """What ``run.json`` says; empty where it is missing."""
        path = self.path / "run.json"
        fix = "Write {} into it to go on: what it said of the run is lost, no more."
        return mapping(path.read_bytes(), str(path), fix) if path.is_file() else {}

    def update(self, **values: Any) -> None:
        """Set keys of ``run.json``."""
        self._replace("run.json", json.dumps(self.info() | values, indent=1, default=str) + "\n")

    def same_start(self, prompts: str) -> str:
        """Note ``prompts`` (the digest of their texts) once, and compare with it ever after; see :func:`compared`."""
        told = compared(self.info(), prompts, f"run {self.path}")
        self.update(prompts=prompts)
        return told

    def commands(self) -> list[str]:
        """What was typed to make this run: the first command, then those that went on with other settings."""
        info = self.info()
        return [c for c in (info.get("command"), *info.get("resumed", [])) if c]

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` steps."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, ascending. What is half-written, or was moved away, has another name."""
        names = (p.name.removeprefix("step-") for p in (self.path / "checkpoints").glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def last_step(self) -> int:
        """Step of the newest checkpoint; 0 where there is none: the run starts from the beginning."""
        return max(self.checkpoints(), default=0)

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints, and what a kill left half-written."""
        parts = (self.path / "checkpoints").glob(".step-*.part")
        for folder in (*parts, *map(self.checkpoint, self.checkpoints()[:-keep])):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``: a line a step; readers may tail it."""
        return self.path / "metrics.jsonl"

    @property
    def alarms_path(self) -> Path:
        """``alarms.jsonl``: a line an alarm and step."""
        return self.path / "alarms.jsonl"

    @property
    def profile_path(self) -> Path:
        """``profile.json``: a :meth:`didr_core.train.profile.Profile.summary` of rank 0, of the steps since the last start."""
        return self.path / "profile.json"

    @property
    def stage_path(self) -> Path:
        """``stage.json``: what is being done outside of steps, for those who watch from another process."""
        return self.path / "stage.json"

    @property
    def calls_path(self) -> Path:
        """``.calls``: what each actor is at; see :class:`didr_core.train.patience.Calls`."""
        return self.path / ".calls"

    @property
    def stop_path(self) -> Path:
        """``stop``: whoever makes this file ends the run after the step that it is at, with a checkpoint."""
        return self.path / "stop"

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done."""
        self._replace(self.stage_path.name, json.dumps([text, done, total]))

    def write_profile(self, summary: Mapping[str, Any]) -> None:
        """Write ``profile.json``."""
        self._replace(self.profile_path.name, json.dumps(summary))

    def log(self, report: StepReport) -> None:
        """Append one step: its metrics (null where not finite, so that every line is JSON) and its alarms."""
        values = {k: v if math.isfinite(v) else None for k, v in report.metrics.items()}
        for name in report.alarms:
            _append(self.alarms_path, {"step": report.step, "alarm": name})
        _append(self.metrics_path, {"step": report.step, "time": round(time.time(), 3), **values})

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps: a resumed run takes these steps again."""
        for path in (self.metrics_path, self.alarms_path):
            if path.is_file():
                kept = [row for row in read_lines(path) if row["step"] <= step]
                self._replace(path.name, "".join(json.dumps(row) + "\n" for row in kept))

    def _replace(self, name: str, text: str) -> None:
        path = self.path / name
        with disk("output", path):
            replace_text(path, text)


def compared(info: Mapping[str, Any], prompts: str, who: str) -> str:
    """``info``, which ``who`` noted when it began, beside what is here now. Returns a sentence where libraries are others.

    Raises:
        DIDRError: it began with other prompts.
    """
    if info.get("prompts", prompts) != prompts:
        raise DIDRError(
            f"{who}: data.prompts holds other texts than when it began (digest {prompts}, not {info['prompts']}). "
            "Put the prompts of then back, or start anew."
        )
    then, now = info.get("versions") or {}, versions()
    pairs = ((name, then.get(name, now.get(name)), now.get(name)) for name in NUMBERS)
    other = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    return f"{who}: began with other versions ({', '.join(other)}): its numbers may differ from here on." * bool(other)


def read_lines(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """Rows of a .jsonl, which have ``key``; a last line that a kill cut short is left out. Empty when there is no file.

    Raises:
        DIDRError: another line is damaged; names it.
    """
    text = path.read_bytes() if path.is_file() else b""
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    fix = "Remove that line: what it said is lost, no more."
    rows = [mapping(line, f"{path}, line {n}", fix) for n, line in enumerate(lines, 1)]
    if foreign := next((n for n, row in enumerate(rows, 1) if key not in row), 0):
        raise DIDRError(f"{path}, line {foreign}: has no {key!r}. {fix}")
    return rows


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with disk("metrics", path), path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def local_folder(key: str, path: str) -> Path:
    """``path`` as an absolute folder.

    Raises:
        DIDRError: an address like ``s3://``; run folders are read and renamed in place, which needs a (shared) file system.
    """
    if "://" in path:
        raise DIDRError(
            f"{key}={path!r}: expected a folder on a file system that all nodes share; mount the bucket and give that path."
        )
    return expanded(path).resolve()


@contextmanager
def disk(key: str, path: Path, needed: int = 0) -> Iterator[None]:
    """Turn errors of writing to ``path``, of ``needed`` bytes, into words."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        inner = re.search(r"os error (\d+)", str(error))  # of safetensors, whose error is no OSError
        if (int(inner[1]) if inner else getattr(error, "errno", 0)) in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
            room = f"about {needed:,} bytes needed, {free:,}" if needed else f"{free:,} bytes"
            raise DIDRError(
                f"{key} {path}: the disk is full: {room} free. Free some space; `--resume` continues the run."
            ) from error
        raise DIDRError(
            f"{key} {path}: cannot write ({getattr(error, 'strerror', '') or error}). Check the path and its permissions."
        ) from error


def room(key: str, path: Path, needed: int = LEAST_FREE) -> None:
    """Whether the disk where ``path`` is, or will be made, has ``needed`` bytes.

    Raises:
        DIDRError: it has not, or a file is in the way; names ``key``, path, needed and free.
    """
    folder = next(p for p in (path, *path.parents) if p.exists())
    if not folder.is_dir():
        raise DIDRError(f"{key}={str(path)!r}: {folder} is a file. Expected a folder.")
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DIDRError(
            f"{key}={str(path)!r}: {free:,} bytes free on its disk; a run needs at least {needed:,}. Free some, or choose another folder."
        )
