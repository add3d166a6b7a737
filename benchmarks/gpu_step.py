"""What one update of full-size SDXL and Z-Image costs on a GPU: seconds, TFLOP/s, memory, the host's share; beside a plain loop.

    python -m benchmarks.gpu_step --plan                       # anywhere: FLOPs and memory of every row, kept on disk
    python -m benchmarks.gpu_step                              # on a GPU, 28 minutes at most: every row that is not there yet
    python -m benchmarks.gpu_step --rows 'sdxl micro*' --again # some of them, once more
    python -m benchmarks.gpu_step --size tiny                  # a rehearsal of all of it on a CPU, a few minutes
    python -m benchmarks.gpu_step --cost 2.5                   # hours and rent (US dollars an hour of a GPU) of 1,000 iterations a recipe

Needs didr_core alone (torch, diffusers, transformers, peft, pydantic): no Ray, no weights; networks are random. Rows are data
(`gpu_step.yaml`). Each is measured in a process of its own (`gpu_row.py`) that is ended at its time limit, and written to the JSON and
its table when it is done: a second start goes on where the first ended. Traces lie beside the JSON, in the folder traces.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import gpu_row, gpu_tables
from benchmarks.plain_loop import Plain
from didr_core import config as configs
from didr_core.config import Config
from didr_core.config.files import replace_text
from didr_core.config.provenance import commit
from didr_core.diffusion.noise import Noise
from didr_core.plan import memory
from didr_core.plan.trace import Counter, flash_attention

RESULTS = Path("benchmarks/results")
ROWS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def plan_of(row: Mapping[str, Any], config: Config, folder: Path) -> dict[str, float | None]:
    """TFLOP and peak GiB of an update, from the meta device: what `didr doctor` says of training alone, without the run's end."""
    if row.get("loop") == "plain":
        return {"tflop": _plain_flops(config, folder) / 1e12, "peak_gib": None}
    plan = memory.plan(config)
    assert plan is not None
    trainer = plan.processes[0]
    held = sum(line.bytes for line in trainer.held)
    most = max(line.bytes for line in trainer.phases if line.owner != "end of the run")
    return {
        "tflop": plan.total_flops * plan.samples / 1e12,
        "peak_gib": (held + most) * (1 + memory.MARGIN) / memory.GIB,
    }


class _Shapes(Noise):
    """Random numbers without the numbers."""

    def normal(self, index: Any, shape: Sequence[int], tag: str) -> torch.Tensor:
        return torch.empty(len(index), *shape, device="meta")

    def uniform(self, index: Any, tag: str, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.empty(len(index), device="meta")


def _plain_flops(config: Config, folder: Path) -> float:
    """Of the plain loop's update: one micro-batch of each kind is counted."""
    with Counter():  # for its short cuts on meta: weights are not drawn
        loop = Plain(config, folder, torch.device("meta"), noise=_Shapes(0))
    part = gpu_row.prompts(loop.backbone, config.sizes.micro_batch, "meta")
    with flash_attention(), Counter() as assistant:
        loop.backward(part, lambda p: loop.assistant_loss(p, "ta0"))
    with flash_attention(), Counter() as generator:
        loop.backward(part, loop.generator_loss)
    return (config.sizes.assistant_updates * assistant.flops + generator.flops) * config.sizes.accumulation


def add_plans(plans: dict[str, Any], rows: Sequence[Mapping[str, Any]], size: str, file: Path) -> None:
    """Plan what is not planned yet, or was planned for other settings, and write ``file`` after each row. Compiled or not is one plan."""
    for row in rows:
        with tempfile.TemporaryDirectory() as name:
            folder, key = Path(name), f"{size}: {row['name']}"
            config = gpu_row.config_of({**row, "compile": "none"}, size, folder)
            tree = configs.dump(config)
            tree["train"].pop("compile", None)
            text = json.dumps([row.get("loop"), tree], sort_keys=True).replace(name, "")
            settings = hashlib.sha256(text.encode()).hexdigest()[:16]
            if plans.get(key, {}).get("settings") == settings:
                continue
            same = next((p for p in plans.values() if p["settings"] == settings), None)
            plans[key] = same or {
                "settings": settings,
                "commit": commit() or None,
                **plan_of(row, config, folder / "published"),
            }
            print(f"{key}: {plans[key]['tflop']:,.4g} TFLOP an update", flush=True)
            _write(file, plans)


def measured(row: Mapping[str, Any], size: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The row from a process of its own, ended after ``seconds``; what it had written by then counts. ``error``: why not all."""
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', row['name'])}-{size}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_row", json.dumps(row), "--size", size, "--output", str(file)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = child.communicate(timeout=seconds)[1]
        error = (said.strip().splitlines() or ["no message"])[-1][:500] if child.returncode else None
        print(said[-3000:] if error else "", end="", file=sys.stderr, flush=True)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        error = f"not done in {seconds:.0f} s"
    out: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"name": row["name"], "size": size}
    file.unlink(missing_ok=True)
    return out | ({"error": error} if error else {})


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(content, indent=1) + "\n")


def _read(file: Path, otherwise: Any) -> Any:
    return json.loads(file.read_text()) if file.is_file() else otherwise


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, plan or tell the cost; returns the exit code: 1 where a row failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or patterns; in the file's order")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--minutes", type=float, default=28, help="no row is begun after, none runs longer")
    parser.add_argument(
        "--row-seconds", type=float, default=150, help="time limit of a row; twice it where blocks are compiled"
    )
    parser.add_argument(
        "--plan", action="store_true", help="FLOPs and memory of the rows on the meta device, and nothing else"
    )
    parser.add_argument(
        "--cost", type=float, nargs="?", const=2.5, metavar="PRICE", help="print hours and rent, and nothing else"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_step.json")
    parser.add_argument("--plans", type=Path, default=RESULTS / "gpu_step_plans.json")
    given = parser.parse_args(arguments)
    rows = [row for row in ROWS if any(fnmatch.fnmatchcase(row["name"], pattern) for pattern in given.rows)]
    if not rows:
        parser.error(f"--rows {' '.join(given.rows)}: no such row; there are: {', '.join(row['name'] for row in ROWS)}")
    report, plans = _read(given.output, {"rows": []}), _read(given.plans, {})
    if given.cost:
        print("\n".join(gpu_tables.cost(report["rows"], given.cost)))
        return 0
    failed = False
    if given.plan:
        add_plans(plans, rows, given.size, given.plans)
    else:
        failed = _measure_all(report, rows, given, time.monotonic() + 60 * given.minutes)
    if given.output.is_file():
        replace_text(
            given.output.with_suffix(".md"),
            gpu_tables.markdown(_read(given.output, None)["rows"], plans, [r["name"] for r in ROWS]),
        )
    return int(failed)


def _measure_all(report: dict[str, Any], rows: Sequence[Mapping[str, Any]], given: Any, until: float) -> bool:
    """Add each row to ``report`` and write it; whether one failed."""
    failed = False
    for row in rows:
        before = next((r for r in report["rows"] if (r["name"], r["size"]) == (row["name"], given.size)), None)
        if before and "fits" in before and not given.again:
            print(f"{row['name']}: there already", flush=True)
            continue
        compiled = row.get("compile", "none") != "none"
        seconds = min(given.row_seconds * (1 + compiled), until - time.monotonic())
        if seconds <= 0:
            print(f"{row['name']}: not begun, {given.minutes:g} minutes are over", flush=True)
            continue
        made = measured(row, given.size, given.output.parent / "traces", seconds)
        failed |= "error" in made
        report["rows"] = [r for r in report["rows"] if r is not before] + [made]
        print(gpu_tables.line(made), flush=True)
        _write(given.output, report)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
