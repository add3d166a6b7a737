"""One voyage of `benchmarks.chaos`: a run folder, the processes of `didr align` that sail it, the faults they suffer, and its end."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from benchmarks.chaos_faults import KINDS, Door, restore_prompts
from benchmarks.sweep_soak import Soaked
from didr_core.train.run_folder import RunFolder, read_lines

EVERY, PATIENCE_S = 10, {"ray": 300, "local": 30, "mlflow": 120}
STEPS = {"ray": 80, "local": 120, "mlflow": 120}
PACE_S = {"ray": 0.0, "local": 0.03, "mlflow": 0.03}  # a call of the reward: runs outlast what happens to them
WRITING = 2  # steps that may be taken while a checkpoint is written: until it is on the disk the one before it counts
GRACE_S = 120.0  # beyond patience, until something counts as hung


@dataclass
class Fault:
    """What happens, and when: after the step ``moment``, or ``seconds`` after the start of the first process."""

    number: int
    kind: str
    moment: int = 0
    seconds: float | None = None


class Sailing:
    """One voyage under way: a :class:`benchmarks.chaos_faults.Scene`."""

    def __init__(self, folder: Path, job: str, seed: int, door: Door | None = None) -> None:
        self.folder, self.job, self.door, self.rng = folder, job, door, random.Random(seed)
        self.run = RunFolder(folder / "disk" / "run")
        self.driver: Soaked | None = None
        self.told = 0
        self.found: dict[str, Any] = {}  # run.json, when the process began

    def prepare(self, full_disk: bool) -> None:
        """Prompts, a recipe, and a disk of its own where it is to be filled."""
        (self.folder / "disk").mkdir(parents=True)
        for shard in range(2):
            (self.folder / "kept").mkdir(exist_ok=True)
            table = pa.table({"id": [f"{shard}-{n}" for n in range(32)], "prompt": [f"point {n}" for n in range(32)]})
            pq.write_table(table, self.folder / "kept" / f"{shard}.parquet")
        (self.folder / "prompts").mkdir()
        restore_prompts(self)
        if full_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", str(self.folder / "disk")], check=True)
        black = self.job == "ray"
        uri = f"http://127.0.0.1:{self.door.port}" if self.door else "none"
        if self.job == "mlflow" and not self.door:
            uri = f"sqlite:///{self.folder}/mlflow.db"
        tree = {
            "base": "exact_2d",
            "reward": {"name": f"benchmarks.chaos_reward:{'MoodyBlackBox' if black else 'Moody'}", "slope": [1.0, 0.6]}
            | {"centre": [0.5, 1.0], "curvature": 0.25, "orders": str(self.folder), "pace": PACE_S[self.job]},
            "drp": {"estimator": "importance", "steps": 2, "particles": 4} if black else {},
            "train": {"steps": STEPS[self.job], "batch": 16, "checkpoint_every": EVERY},
            "data": {"prompts": str(self.folder / "prompts")},
            "workers": {"train": 2 if black else 1, "local_cpus": 6, "max_failures": 20}
            | {"patience_s": PATIENCE_S[self.job]},
            "evaluation": {"grid": 4, "prompts": 8},
            "tracking": {"uri": uri},
        }
        (self.folder / "recipe.yaml").write_text(json.dumps(tree))

    def start(self) -> None:
        """The run, from where it is."""
        words = [sys.executable, "-m", "pipelines.align"]
        begun = (self.run.path / "run.json").is_file()
        self.found = self.run.info() if begun else {}
        new = ["--recipe", str(self.folder / "recipe.yaml"), "--output", str(self.run.path)]
        words += ["--resume", str(self.run.path)] if begun else new
        words += [] if self.job == "ray" else ["--local"]
        mark = self.driver.mark if self.driver else None
        self.driver = Soaked(words, self.folder / "log", *([mark] if mark else []))
        self.told = self.driver.log.stat().st_size if self.driver.log.is_file() else 0
        self.began = time.monotonic()
        self.driver.__enter__()
        self.process = self.driver.process

    def said(self) -> str:
        """What this process has said so far."""
        with (self.folder / "log").open("rb") as file:
            file.seek(self.told)
            return file.read().decode(errors="replace")

    def step(self) -> int:
        """The last one that was logged."""
        with contextlib.suppress(OSError, ValueError):
            rows = self.run.metrics_path.read_bytes().splitlines(keepends=True)
            return int(next((json.loads(row)["step"] for row in reversed(rows) if row.endswith(b"\n")), 0))
        return 0

    def until(self, ready: Any, seconds: float) -> str:
        """ "ready", "ended", or "hung"."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if ready():
                return "ready"
            if self.process.poll() is not None:
                return "ready" if ready() else "ended"
            time.sleep(0.02)
        return "hung"

    @property
    def limit(self) -> float:
        """Seconds after which something counts as hung."""
        return PATIENCE_S[self.job] + GRACE_S

    def suffer(self, fault: Fault) -> dict[str, Any]:
        """Sail to the moment of ``fault``, let it happen, and go on. Returns its row."""
        kind = KINDS[fault.kind]
        row: dict[str, Any] = {"n": fault.number, "kind": fault.kind, "at": fault.moment}
        if self.driver is None or self.process.poll() is not None:
            self.start()
        if fault.seconds is not None and not kind.refused and self.step() < 1:
            row["at"] = f"{fault.seconds:.1f} s"
            came = self.until(lambda: time.monotonic() - self.began > fault.seconds, self.limit)
        else:
            came = self.until(lambda: self.step() >= fault.moment, self.limit)
            if fault.moment == STEPS[self.job]:
                time.sleep(self.rng.uniform(0, 2))
        if came == "hung" or (came == "ended" and self.process.returncode):
            return row | {"outcome": "hung" if came == "hung" else "unclean", "why": "before the fault: " + self.last()}
        if self.process.poll() is not None:
            return row | {"outcome": "moot", "why": "the run was over"}
        before = self.step()
        try:
            kind.inject(self)
        except LookupError as error:
            return row | {"outcome": "moot", "why": str(error)}
        at = time.monotonic()
        if not kind.code:
            low = [before]
            came = self.until(lambda: low.append(self.step()) or low[-1] > before or self.over(), self.limit)
            row |= {"outcome": "survived" if came == "ready" else "hung" if came == "hung" else "unclean"}
            if came == "ready":
                return row | {"recovery_s": time.monotonic() - at, "lost": before - min(low)}
            self.process.kill()
            return row | {"why": self.last()}
        if self.until(lambda: False, self.limit) == "hung":
            self.process.kill()
            self.process.wait()
            kind.repair(self)
            return row | {"outcome": "hung", "why": self.last()}
        if self.process.returncode == 0:
            kind.repair(self)
            return row | {"outcome": "moot", "why": "the run was over before it met the fault"}
        before = max(before, self.step())
        why = self.unclean(kind.code, kind.says, kind.status, kind.traceback)
        if kind.refused:
            self.start()
            self.until(lambda: False, self.limit)
            why = why or self.unclean((1,), kind.refused, ("failed",))
        kind.repair(self)
        lost = max(0, before - self.run.last_step())
        self.start()
        went_on = self.until(lambda: self.step() > before or self.over(), self.limit)
        row |= {"outcome": "unclean" if why else "failed cleanly", "why": why, "lost": lost}
        if went_on != "ready":
            return row | {"outcome": "hung" if went_on == "hung" else "lost", "why": self.last()}
        allowed = 0 if kind.keeps_step else EVERY * (2 if kind.refused else 1) + WRITING
        if lost > allowed:
            row |= {"outcome": "lost", "why": f"{lost} steps"}
        return row | {"recovery_s": time.monotonic() - at}

    def over(self) -> bool:
        return self.process.poll() == 0

    def last(self) -> str:
        """The last line."""
        return (self.said().strip().splitlines() or ["nothing was said"])[-1][:300]

    def unclean(self, codes: Sequence[int], says: str, status: Sequence[str | None], traceback: bool = False) -> str:
        """What is wrong with an end; empty where nothing is."""
        said, code = self.said(), self.process.returncode
        info = self.run.info() if (self.run.path / "run.json").is_file() else {}
        known = info.get("since") != self.found.get("since")
        if not known and (code in (-15, -2) or (code in codes and code > 1)):
            return ""  # too early for a run to know of it: a program's own end
        if code not in codes:
            return f"exit code {code}: {self.last()}"
        if code > 0 and "Traceback" in said and not traceback:
            return "a traceback: " + self.last()
        if not re.search(says, said[-3000:].replace("\n", " ")):
            return f"no such sentence: {self.last()}"
        if not known:  # refused, or killed, before it touched the run
            status = ((self.found or info).get("status"),)
        return "" if info.get("status") in status else f"status {info.get('status')}"

    def arrive(self) -> str:
        """Let the run end. Returns what is wrong with that; empty where nothing is."""
        if self.driver is None or self.process.poll() is not None:
            self.start()
        if self.until(self.over, self.limit) != "ready":
            return f"did not end: {self.process.poll()} {self.last()}"
        rows = [row["step"] for row in read_lines(self.run.metrics_path)]
        faults = [] if rows == list(range(1, STEPS[self.job] + 1)) else [f"steps {rows[:3]}...{rows[-3:]}"]
        faults += [] if self.run.info()["status"] == "finished" else [self.run.info()["status"]]
        faults += [] if (self.run.path / "export" / "model_index.json").is_file() else ["no export"]
        faults += [f"left over: {part.name}" for part in self.run.path.rglob(".*.part")]
        if self.job == "mlflow":
            faults += self.mlflow_faults()
        return "; ".join(faults)

    def mlflow_faults(self) -> list[str]:
        """MLflow has every step once (but where it never came back), and how the run ended."""
        kinds = (self.folder / "kinds").read_text()
        if self.door and "gone for good" in kinds:
            return [] if "MLflow is not answering" in self.said() else ["nobody was told that MLflow is away"]
        if self.door and not self.door.opened.wait(PATIENCE_S[self.job]):
            return ["MLflow never came back"]
        if "did not take" in self.said():  # it was away until after the end, and the run said so
            return []
        from pipelines.tracking import tracker as tracking

        client = tracking.connect(json.loads((self.folder / "recipe.yaml").read_text())["tracking"]["uri"])
        known = self.run.info()["mlflow_run_id"]
        curve = sorted(point.step for point in client.get_metric_history(known, "time/step"))
        status = client.get_run(known).info.status
        faults = [] if curve == list(range(1, STEPS["mlflow"] + 1)) else [f"MLflow has {len(curve)} steps"]
        return faults + ([] if status == "FINISHED" else [f"MLflow says {status}"])

    def end(self) -> list[str]:
        """End what is left. Returns the names of processes that outlived a run that ended by itself."""
        orphans: list[str] = []
        if self.driver is not None:
            orphans = self.driver.orphans() if self.process.poll() == 0 else []
            self.driver.__exit__()
        if (self.folder / "disk").is_mount():
            kept = self.folder / "run"
            shutil.copytree(self.run.path, kept, dirs_exist_ok=True)
            subprocess.run(["umount", "--lazy", str(self.folder / "disk")], check=True)
        return orphans

    def result(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The last checkpoint's tensors, and the metrics but for times."""
        files = self.run.checkpoint(STEPS[self.job]).glob("*.safetensors")
        rows = read_lines(self.run.metrics_path)
        numbers = [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]
        return {f"{f.name}/{k}": v for f in files for k, v in load_file(f).items()}, numbers
