"""The folder of one run: what it is called, what lies in it, and how it is written so that a kill at any moment loses nothing.

    runs/<name>-<yyyymmdd-hhmmss>/
      config.yaml      the resolved configuration
      run.json         status, commit, versions, MLflow run id
      metrics.jsonl    one line a step; alarms.jsonl one line an alarm
      profile.json     where the time of the steps went, if asked for
      checkpoints/step-000100/    see checkpoint.py
      grids/*.png, curves.png, scores.json, report.html, export/    made at the end

Files that are replaced are written beside and renamed. On a cluster the folder must be on storage that every node sees, or at an address
(``s3://...``): then it is a copy of what lies there, kept alike by :mod:`didr_core.train.mirror`.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from didr_core import config as configs
from didr_core.config import Config, redacted
from didr_core.config.files import claimed, mapping, replace_text
from didr_core.config.fingerprint import digest
from didr_core.config.provenance import provenance, versions
from didr_core.data.storage import Store, below, disk, is_address, local_folder, reached
from didr_core.train import mirror
from didr_core.types import DIDRError, StepReport

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
    "train.micro_batch",
    "train.compile",
    "roles.gradient_checkpointing",
)
"""Keys that `--resume` may set anew: they change how a run runs, not what its next update is (but for the rounding of sums)."""

LATEST, AUTO = "latest", "auto"
"""For a run's name: the newest one; and, to resume, the newest unfinished one that was asked for alike, else a new one."""

NUMBERS = ("torch", "diffusers", "transformers")
"""Packages whose version may change what a run computes."""

_UPDATING = threading.RLock()


@dataclass(frozen=True)
class RunFolder:
    """An existing run folder; make one with :meth:`create`, find one with :meth:`find`."""

    path: Path
    address: str = ""  # that ``path`` is this machine's copy of; none: the run lies in ``path`` alone
    apart: bool = False  # this process's copy is not the driver's

    @classmethod
    def at(cls, key: str, place: str) -> RunFolder:
        """The run folder at ``place``, a path or an address, whether it exists or not; ``key`` is what gave it."""
        return cls(mirror.local_copy(place, key), place) if is_address(place) else cls(local_folder(key, place))

    @property
    def place(self) -> str:
        """What users call it: its path, or its address without keys and options."""
        return redacted(self.address).partition("?")[0] or str(self.path)

    @classmethod
    def create(cls, config: Config, folder: str | None = None, command: str = "") -> RunFolder:
        """A new folder: ``folder`` itself, or ``<config.output>/<name>-<time>``.

        Raises:
            DIDRError: ``folder`` holds another run or anything else, cannot be made, or is no path.
        """
        run = cls.at("--output" if folder else "output", folder or config.output)
        if not folder:
            with disk("output", run.path):
                run = run.inside(claimed(run.path, config.name))
        path = run.path
        run._refresh()
        if (path / "run.json").is_file():
            raise DIDRError(
                f"--output {run.place}: belongs to run {run.info().get('name')!r} (status {run.info().get('status')!r}). "
                f"Give another folder, or continue that run with `didr align --resume {run.place}`."
            )
        own = {mirror.OWN, ".lock", "checkpoints"} if run.address else set()
        if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - own):
            raise DIDRError(f"--output {run.place}: exists and is not empty. Give a new or empty folder.")
        with disk("output", path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        begun = {"status": "interrupted", "started": time.time()}  # until it trains, see `loop.outcome`
        run.update(name=path.name, recipe=config.name, command=command, **begun, **provenance())
        return run

    @classmethod
    def find(cls, run: str, output: str = "runs") -> RunFolder:
        """The folder ``run``, or the run of that name in ``output``; ``latest`` is the newest one there.

        Raises:
            DIDRError: there is none (names the runs that there are).
        """
        runs = cls.at("output", output)
        for found in (cls.at("--resume", run), *([] if is_address(run) else [runs.inside(run)])):
            found._refresh()
            if (found.path / "run.json").is_file():
                return replace(found, path=found.path.resolve())
        if run == LATEST and (there := cls.in_order(output)):
            newest, _ = there[0]
            newest._refresh()
            return newest
        names = sorted(p.parent.name for p in runs.path.glob("*/run.json"))
        raise DIDRError(
            f"run {redacted(run)!r}: no run folder of that name or path (one with run.json in it). "
            f"Runs in {runs.place}: {', '.join(names[-8:]) or 'none'}."
        )

    @classmethod
    def in_order(cls, output: str) -> list[tuple[RunFolder, dict[str, Any]]]:
        """The runs in ``output`` with what their ``run.json`` says, the newest first. From an address nothing else is brought."""
        runs = cls.at("output", output)
        if runs.address:
            with reached("output", runs.address):
                store = Store(runs.address)
                said = {file: store.read(file) for file in store.files() if re.fullmatch("[^/]+/run.json", file)}
            infos = {file.partition("/")[0]: mapping(text, file) for file, text in said.items() if text}
        else:
            infos = {path.parent.name: RunFolder(path.parent).info() for path in runs.path.glob("*/run.json")}
        found = [(runs.inside(name), info) for name, info in infos.items()]
        return sorted(found, key=lambda pair: float(pair[1].get("started", 0.0)), reverse=True)

    @classmethod
    def unfinished(cls, config: Config) -> RunFolder | None:
        """The newest run in ``config.output`` that has not finished, began with the same settings, and that no living process trains in."""
        for run, info in cls.in_order(config.output):
            if info.get("settings") == settings(config) and info.get("status") != "finished":
                run._refresh()
                with suppress(DIDRError), run.lock():
                    return run
        return None

    def inside(self, name: str) -> RunFolder:
        """The folder ``name`` in this one."""
        return replace(self, path=self.path / name, address=self.address and below(self.address, name))

    def _refresh(self) -> None:
        """Bring what is new at the address; a process that works in the copy keeps it alike itself."""
        if not self.address:
            return
        with ExitStack() as stack:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(self.lock())
            except DIDRError:
                return
            mirror.refresh(self.address, self.path)

    def mirrored(self, keep: int = 0, say: Callable[[str], object] | None = None) -> mirror.Mirror:
        """Keeps the address alike while the block runs, where there is one; see :class:`didr_core.train.mirror.Mirror`.

        Raises:
            DIDRError: another process of this machine works in the copy.
        """
        if self.address:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock():  # whoever has it may be the owner that is asked for a sign of life
                pass
        return mirror.Mirror(self.path, self.address, keep, say)

    @property
    def owner(self) -> str:
        """The driver that last worked in this copy of an address; empty where there is none."""
        path = self.path / mirror.OWN
        return path.read_text() if path.is_file() else ""

    def here(self, owner: str) -> RunFolder:
        """The copy that this process's machine has of the address, beside the one that the driver ``owner`` works in."""
        if not self.address:
            return self
        copy = replace(self, path=mirror.local_copy(self.address))
        return replace(copy, apart=copy.owner != owner)

    def fetch(self, name: str) -> Path:
        """The folder ``name`` in this one, with all that the address has in it."""
        if self.address:
            mirror.fetch(self.address, self.path, name)
        return self.path / name

    @contextmanager
    def lock(self, doing: str = "training") -> Iterator[None]:
        """One process at a time trains (or what else it is ``doing``) in a folder; the system frees the lock when that process dies.

        Raises:
            DIDRError: another process holds it.
        """
        with disk("output", self.path):
            file = (self.path / ".lock").open("w")
        with file:
            for last in (False, True):  # who lists runs holds it for a moment
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if last:
                        raise DIDRError(
                            f"run {self.place}: another process is {doing} in it. Wait for it, or stop it first."
                        ) from error
                    time.sleep(0.1)
            yield

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's configuration, with ``a.b=c`` overrides of keys in :data:`FREE_TO_CHANGE`.

        Raises:
            DIDRError: an override that would change what the run computes, or a damaged config.yaml.
        """
        for item in overrides:
            if not may_change(item):
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
        """Set keys of ``run.json``; threads and a signal's handler may do so at once."""
        with _UPDATING:
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
        """Remove all but the newest ``keep`` checkpoints, and what a kill left half-written; a step yet to come is being written."""
        parts = {int(p.stem.rpartition("-")[2]): p for p in (self.path / "checkpoints").glob(".step-*.part")}
        half = [part for step, part in parts.items() if step <= self.last_step()]
        for folder in (*half, *map(self.checkpoint, self.checkpoints()[:-keep])):
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


def may_change(item: str) -> bool:
    """Whether ``a.b=c`` is the override of a key in :data:`FREE_TO_CHANGE`."""
    key = item.partition("=")[0].strip()
    return any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)


def settings(config: Config) -> str:
    """A digest of what a resume may not change; of the config as it was asked for, before ``auto`` is decided."""
    kept = {key: value for key, value in configs.flatten(configs.dump(config)).items() if not may_change(key)}
    return digest({**kept, "output": None})


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
