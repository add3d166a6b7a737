"""What the loop and Ray cost: the same updates by a plain PyTorch loop, `align --local`, and Ray Train with one worker and with two.

    python -m benchmarks.overhead                              # on idle cores; 12 minutes at most; called again, it goes on
    python -m benchmarks.overhead --rounds 1 --steps 6         # a first look
    python -m benchmarks.overhead --prepared                   # the prompts made before training (workers.precompute)

Each case is a process of its own, the cases take turns, and a round is one turn of all. All of them make the updates of recipe `tiny` (five
of the TA, one of the generator) at a smaller batch, on one CPU thread a worker: a worker of Ray has one core here, so the plain loop gets
one, too.

- `plain`: `Learner.step` in a bare loop over batches that were made before.
- `local`: `didr align --local`: it makes its batches, follows the run (console, MLflow, alarms), and leaves a run folder.
- `ray1`: `didr align` with one worker. Encoder and reward actors, driver and Ray share the machine with it; with `--prepared` the actors
  have ended before the first step, as on a GPU that all share, and what is left is the loop and Ray alone.
- `plain2`, `ray2`: two processes at half the batch each. Two trainings side by side slow each other down on any machine, and averaging
  gradients costs what it costs: two workers of Ray stand beside two plain processes that average over gloo, and these beside `plain`.
- `idle2`: `plain2` again, beside a Ray whose actors, as many as Train and Data keep, have nothing to do: the part of `ray2` that is Ray's.

A step is the median of the steps after the first (the wall clock of rank 0), a ratio that of cases of one round; the tables have medians
over rounds. CPU seconds of a step stand beside wall seconds: other programs change them less. A checkpoint is written once, at the last
step, and is told apart. Before each case the benchmark waits for idle cores, `--patience` seconds at most; `others` is how many cores other
programs kept busy all the same while it ran: above 0.1, do it again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Tree, busy_seconds, wait_until_idle
from didr_core.config.provenance import provenance
from didr_core.train.run_folder import RunFolder, read_lines

BASE = {"plain": "plain", "local": "plain", "ray1": "plain", "plain2": "plain", "idle2": "plain2", "ray2": "plain2"}
"""What a case is compared with."""
TOLD = {
    "plain": "plain loop over prepared tensors",
    "local": "`align --local`",
    "ray1": "Ray, one worker",
    "plain2": "two plain processes, half the batch each",
    "idle2": "`plain2`, beside a Ray that has nothing to do",
    "ray2": "Ray, two workers, half the batch each",
}
RESULTS = Path("benchmarks/results")
LEAST_CPU_S = 0.002
CHECKPOINT_EVERY = 100  # the schema's default: what a checkpoint costs is spread over so many steps


def run_case(case: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own, and watch it from outside."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    waited = wait_until_idle(options.patience)
    command = [
        sys.executable,
        "-m",
        "benchmarks.overhead_case",
        case,
        str(folder),
        str(options.steps),
        str(options.batch),
        str(int(options.prepared)),
    ]
    run, looks = RunFolder(folder / "run"), []
    busy, began = busy_seconds(), time.time()
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as child:
        tree = Tree(child.pid)
        while child.poll() is None:
            tree.look()
            looks.append((len(read_lines(run.metrics_path)), tree.cpu()))
            time.sleep(0.5)
    seconds = time.time() - began
    if child.returncode:
        raise SystemExit(f"{case} failed:\n" + (folder / "log").read_text()[-3000:])
    told = json.loads((folder / "case.json").read_text())
    shutil.rmtree(run.path, ignore_errors=True)
    return {
        "case": case,
        "busy_before": waited,
        "others": max(0.0, busy_seconds() - busy - sum(tree.cpu().values())) / seconds,
        "seconds": seconds,
        "start": told.pop("first_at") - began,
        "cpu_by_process": cpu_of_a_step(looks, options.steps),
        **told,
    }


def cpu_of_a_step(looks: Sequence[tuple[int, Mapping[str, float]]], steps: int) -> dict[str, float]:
    """CPU seconds a step by name of process, from looks at (steps done, CPU seconds until then) while steps were made."""
    inside = [look for look in looks if 0 < look[0] < steps]
    if not inside or inside[-1][0] == inside[0][0]:
        return {}
    (first, before), (last, after) = inside[0], inside[-1]
    return {name: (used - before.get(name, 0.0)) / (last - first) for name, used in after.items()}


def report_of(rounds: Sequence[Mapping[str, Mapping[str, Any]]], batch: int) -> dict[str, Any]:
    """Medians over ``rounds`` of rows by case, with the lowest and the highest of what is compared."""
    cases: dict[str, Any] = {}
    for case, base in BASE.items():
        rows = [r[case] for r in rounds]
        step = [statistics.median(row["profile"]["steps"]) for row in rows]
        beside = [statistics.median(r[base]["profile"]["steps"]) for r in rounds]
        cpu, cpu_beside = ([r[name]["profile"]["cpu"] for r in rounds] for name in (case, base))
        parts = [row["profile"]["rows"] for row in rows]
        # the one checkpoint, at the last step, would weigh too much in a short run
        checkpoint = [p["checkpoint"] * len(row["profile"]["steps"]) for p, row in zip(parts, rows, strict=True)]
        shares = {
            name: statistics.median(p[name] / (sum(p.values()) - p["checkpoint"]) for p in parts) for name in parts[0]
        }
        shares["checkpoint"] = statistics.median(
            c / CHECKPOINT_EVERY / s for c, s in zip(checkpoint, step, strict=True)
        )
        cases[case] = {
            "step_s": _spread(step),
            "ratio": _spread([a / b for a, b in zip(step, beside, strict=True)]),
            "cpu_s": _spread(cpu),
            "cpu_ratio": _spread([a / b for a, b in zip(cpu, cpu_beside, strict=True)]),
            "start_s": _spread([row["start"] for row in rows]),
            "checkpoint_s": _spread(checkpoint),
            "others_cores": _spread([row["others"] for row in rows]),
            "busy_before_cores": _spread([row["busy_before"] for row in rows]),
            "bytes_a_step": statistics.median(sum(row.get("bytes_a_prompt", {}).values()) * batch for row in rows),
            "cpu_s_by_process": _medians([row["cpu_by_process"] for row in rows]),
            "shares": shares,
        }
    return {"cases": cases}


def _spread(values: Sequence[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    cases, n = report["cases"], report["rounds"]
    text = [
        "# What the loop and Ray cost\n",
        f"`{report['command']}`, {report['cores']} CPU cores ({report['machine']}), {report['date'][:10]}, commit {report['commit']}; "
        f"batch {report['batch']}, {report['steps']} steps a run, {n} round{'s' * (n != 1)}. Medians (lowest to highest); "
        "`benchmarks/overhead.py` says what is compared, and how.\n",
        "| case | s a step | wall clock, times its base | CPU s a step of the trainer | times its base's | start to the end of step 1, s "
        "| object store, KiB a step | cores others kept busy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, row in cases.items():
        base = "" if BASE[case] == case else f" (of `{BASE[case]}`)"
        stored = f"{row['bytes_a_step'] / 1024:.0f}" if row["bytes_a_step"] else ""
        cells = [
            f"`{case}`: {TOLD[case]}",
            _told(row["step_s"], 3),
            _told(row["ratio"], 3) + base,
            _told(row["cpu_s"], 3),
        ]
        cells += [_told(row["cpu_ratio"], 3), _told(row["start_s"], 1), stored, _told(row["others_cores"], 2)]
        text.append(f"| {' | '.join(cells)} |")
    names = list(next(iter(cases.values()))["shares"])
    text += [
        f"\nShare of a step, % (a checkpoint, in s, is spread over {CHECKPOINT_EVERY} steps):\n",
        f"| case | {' | '.join(names)} | a checkpoint, s |",
        "|---" * (len(names) + 2) + "|",
    ]
    for case, row in cases.items():
        shares = " | ".join(f"{100 * row['shares'][name]:.1f}" for name in names)
        text.append(f"| `{case}` | {shares} | {row['checkpoint_s'][0]:.2f} |")
    used = {case: row["cpu_s_by_process"] for case, row in cases.items() if row["cpu_s_by_process"]}
    processes = sorted({name for row in used.values() for name, s in row.items() if s >= LEAST_CPU_S})
    text += [
        f"\nCPU seconds a step by process while steps are made, from {LEAST_CPU_S} s on:\n",
        f"| process | {' | '.join(f'`{case}`' for case in used)} |",
        "|---" * (len(used) + 1) + "|",
    ]
    for name in processes:
        text.append(f"| {name} | {' | '.join(f'{row.get(name, 0.0):.3f}' for row in used.values())} |")
    return "\n".join(text) + "\n"


def _told(spread: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in spread)
    return middle if low == high else f"{middle} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the report after every whole round; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=12.0, help="no round begins that would not end within these")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="prompts a step; even")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for idle cores before a case")
    parser.add_argument(
        "--prepared", action="store_true", help="workers.precompute=true: the loop and Ray without actors"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/overhead"), help="what is finished lies here")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    given = parser.parse_args(arguments)
    made, began, longest = provenance(), time.monotonic(), 0.0
    kind = "overhead_prepared" if given.prepared else "overhead"
    work = given.work / f"{kind}-{made['commit']}-{given.steps}x{given.batch}"
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds):
        if rounds and time.monotonic() - began + longest > 60 * given.minutes:
            break
        since, rows = time.monotonic(), {}
        for case in BASE:
            kept = work / f"round-{number}" / f"{case}.json"
            if not kept.is_file():
                row = run_case(case, kept.with_suffix(""), given)
                kept.write_text(json.dumps(row) + "\n")
            rows[case] = json.loads(kept.read_text())
            step = statistics.median(rows[case]["profile"]["steps"])
            print(f"round {number} {case:<7} {step:.3f} s a step, others {rows[case]['others']:.2f} cores", flush=True)
        rounds.append(rows)
        longest = max(longest, time.monotonic() - since)
        report = {
            "command": "python -m benchmarks.overhead" + given.prepared * " --prepared",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            **made,
            **{"batch": given.batch, "steps": given.steps, "rounds": len(rounds)},
            **report_of(rounds, given.batch),
        }
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / f"{kind}.json").write_text(json.dumps(report, indent=1) + "\n")
        (given.output / f"{kind}.md").write_text(markdown(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
