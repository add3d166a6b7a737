"""What to expect of 1 to 1,024 GPUs: step time, averaging, reward and encoder pools, checkpoints, prompts, rent; SDXL and Z-Image.

    python -m benchmarks.scaling                               # tables and figure, a minute, no GPU
    python -m benchmarks.scaling --set gpu_dollars=2 network_gbs=9.4   # with your prices and network
    python -m benchmarks.scaling --calibrate                   # first hold the simulation to two measured workers; idle cores, a minute

Three kinds of numbers go in, and `scaling.yaml` says of each which it is: measured on an H100 (seconds of a micro-batch, from
`results/gpu_step.json`), planned (TFLOP and bytes of every network, from its layers), assumed (networks, prices, the goal).
`scaling_formulas.py` says what one worker's iteration is made of, `scaling_simulation.py` what many make of it. Nothing here was measured
on more than one GPU.

- Two rates: as measured, 2026-11-27, when the host bound SDXL; and the goal of 40 % of the peak.
- The same batch on more GPUs: 128 pictures an iteration, the paper's kind of run. The same share on each: 16 pictures a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import scaling_calibration, scaling_tables
from benchmarks.scaling_formulas import (
    ASSISTANT_UPDATES,
    CHECKPOINT_EVERY,
    KINDS,
    MODELS,
    RATES,
    READ,
    SIZES,
    Inputs,
    actors_needed,
    actors_to_hide,
    averaging,
    checkpoint_s,
    driver_s,
    exposed_s,
    host_floor_s,
    measured_passes,
    passes,
    prompt_s,
    usual_inputs,
)
from benchmarks.scaling_simulation import Cluster, Outcome, simulate

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    rate: str
    kind: str
    gpus: int
    workers: int
    batch: int
    step_s: float
    pictures_a_s: float
    efficiency: float
    actor_gpus: tuple[float, float]
    shares: dict[str, float]
    loads: dict[str, float]
    hours: float
    dollars: float
    dollars_a_1000: float


def cluster_of(model: Mapping[str, Any], rate: str, workers: int, batch: int, inputs: Inputs, measured: Any) -> Cluster:
    """The simulation's picture of training with ``workers`` GPUs. One GPU makes its prompts before it trains."""
    seconds = passes(model, rate, batch // workers, inputs, measured)
    one, other = averaging(model, workers, seconds, inputs)
    alone = ASSISTANT_UPDATES * (seconds[0] + one) + seconds[1] + other
    steps, warm_up = 12, 3
    copied, written = (s * (steps - warm_up) / CHECKPOINT_EVERY for s in checkpoint_s(model, workers, inputs))
    gpus = [actors_needed(batch / alone, s, inputs["busy"]) for s in prompt_s(model, inputs)]
    made = [batch * s / g for s, g in zip(prompt_s(model, inputs), gpus, strict=True)]
    stages = (driver_s(workers, inputs), *made) if workers > 1 else ()
    return Cluster(
        *seconds[:2],
        workers=workers,
        assistant_updates=ASSISTANT_UPDATES,
        assistant_averaging_s=one,
        generator_averaging_s=other,
        stages_s=stages,
        checkpoint_every=steps - warm_up,  # one in the time that is simulated, at its share of the cost
        copy_s=copied,
        write_s=written,
        jitter=inputs["jitter"],
        steps=steps,
        warm_up=warm_up,
    )


def loads(
    cluster: Cluster, out: Outcome, gpus: int, batch: int, model: Mapping[str, Any], inputs: Inputs
) -> dict[str, float]:
    """How near each part is to pacing training: 1 is where it does. Of averaging and stragglers: their time beside that of the passes."""
    written = checkpoint_s(model, cluster.workers, inputs)[1]
    found = {
        "averaging": out.shares["averaging"] / out.shares["passes"],
        "stragglers": out.shares["others"] / out.shares["passes"],
        "checkpoint writing": written / (CHECKPOINT_EVERY * out.step_s),
        "Ray Data's driver": driver_s(cluster.workers, inputs) / out.step_s,
        "reward actors of the recipe": prompt_s(model, inputs)[1]
        * batch
        / out.step_s
        / (cluster.workers * model["actor_share"]),
        "prompts' bytes": batch * model["prompt_kb"] * 1e3 / out.step_s / (1e9 * inputs["ethernet_gbs"]),
    }
    return found | ({"the batch": gpus / batch} if gpus > batch else {})


def case_of(name: str, rate: str, kind: str, gpus: int, inputs: Inputs, rows: Sequence[Mapping[str, Any]]) -> Case:
    """Simulate one line of the table and price it."""
    model, measured = MODELS[name], measured_passes(rows, name)
    batch = int(inputs["batch"] if kind == "batch" else inputs["share"] * gpus)
    workers = min(gpus, batch)
    cluster = cluster_of(model, rate, workers, batch, inputs, measured)
    out = simulate(cluster)
    done, whole = batch / out.step_s, int(inputs[kind])
    one, other, _ = passes(model, rate, whole, inputs, measured)
    perfect = whole / (ASSISTANT_UPDATES * one + other) * gpus
    costs = prompt_s(model, inputs)
    actors = tuple(actors_needed(done, s, inputs["busy"]) for s in costs) if workers > 1 else (0.0, 0.0)
    before = batch * sum(costs) if workers == 1 else 0.0
    hours = inputs["iterations"] * (out.step_s + before) / 3600
    dollars = hours * (gpus + math.ceil(sum(actors))) * inputs["gpu_dollars"]
    return Case(
        model=name,
        rate=rate,
        kind=kind,
        gpus=gpus,
        workers=workers,
        batch=batch,
        step_s=out.step_s,
        pictures_a_s=done,
        efficiency=done / perfect,
        actor_gpus=(actors[0], actors[1]),
        shares=out.shares,
        loads=loads(cluster, out, gpus, batch, model, inputs),
        hours=hours,
        dollars=dollars,
        dollars_a_1000=1000 * dollars / inputs["iterations"] / batch,
    )


def ethernet_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """64 GPUs at the goal's rate, over InfiniBand and over `ethernet_gbs`."""
    found: list[dict[str, Any]] = []
    ways = {"infiniband": inputs, "ethernet": {**inputs, "network_gbs": inputs["ethernet_gbs"]}}
    for name, model in MODELS.items():
        for share in (2, int(inputs["share"])):
            outs = {way: simulate(cluster_of(model, "goal", 64, 64 * share, given, {})) for way, given in ways.items()}
            seconds = {way: {"step_s": out.step_s, "averaging": out.shares["averaging"]} for way, out in outs.items()}
            found.append({"model": name, "share": share, **seconds})
    return found


def remote_rows(inputs: Inputs, workers: int = 64) -> list[dict[str, Any]]:
    """When rewards in actors pay, at the goal's rate: seconds a picture, actors so that nobody waits, and what an actor's GPU may cost."""
    found = []
    a_second = inputs["peak_tflops"] * inputs["goal_share"]
    for name, model in MODELS.items():
        generator = sum(model["generator"].values())
        trained = (ASSISTANT_UPDATES * sum(model["assistant"].values()) + generator) / a_second
        window = (model["generator"]["reference"] + model["generator"]["TA's answer"]) / a_second
        for reward, known in READ["rewards"].items():
            seconds = known["tflop"] / (a_second if known["rate"] == "goal" else inputs[known["rate"]])
            transfer = inputs["call_ms"] / 1e3
            trained_s = trained - (model["generator"]["reward"] / a_second)
            actors = actors_to_hide(workers, seconds, transfer, window, model["micro"])
            count = actors or workers
            call = seconds / max(1, count // workers)
            waited = {way: exposed_s(call, transfer, window, way == "overlapped") for way in ("overlapped", "in turn")}
            local, remote = trained_s + seconds, trained_s + waited["overlapped"]
            found.append(
                {
                    "model": name,
                    "reward": reward,
                    "gb": known["gb"],
                    "local_share": seconds / local,
                    "reward_s": seconds,
                    "transfer_s": transfer,
                    "window_s": window,
                    "faster": {way: local / (trained_s + s) for way, s in waited.items()},
                    "actors": count,
                    "nobody_waits": actors is not None,
                    "break_even": (local / remote - 1) * workers / count,
                }
            )
    return found


def pool_curve(
    inputs: Inputs, counts: Sequence[int], workers: int = 64, reward: str = "a judge of 7B parameters"
) -> dict[str, list[float]]:
    """Simulated step of SDXL at the goal's rate with ``reward`` by number of its actors, overlapped and in turn, and beside the trainer."""
    model, share, a_second = MODELS["sdxl"], 2, inputs["peak_tflops"] * inputs["goal_share"]
    base = cluster_of(model, "goal", workers, share * workers, inputs, {})
    parts, whole = model["generator"], sum(model["generator"].values())
    settings = asdict(base) | {
        "pictures": share,
        "before": (parts["forward"] + parts["proxy"] / 3)
        / whole,  # the proxy's forward pass; the rest goes back through it
        "window": (parts["reference"] + parts["TA's answer"]) / whole,
        "reward_s": share * READ["rewards"][reward]["tflop"] / a_second,
        "transfer_s": share * inputs["call_ms"] / 1e3,
    }
    found: dict[str, list[float]] = {"actors": [float(n) for n in counts]}
    for way in (True, False):
        name = "overlapped" if way else "in turn"
        found[name] = [simulate(Cluster(**settings | {"reward_actors": n, "overlap": way})).step_s for n in counts]
    found["beside each trainer"] = [simulate(Cluster(**settings)).step_s] * len(counts)
    return found


def report_of(inputs: Inputs, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that is written, but the calibration."""
    cases = [
        asdict(case_of(name, rate, kind, gpus, inputs, rows))
        for name in MODELS
        for rate in RATES
        for kind in KINDS
        for gpus in SIZES
    ]
    return {
        "inputs": dict(inputs),
        "cases": cases,
        "ethernet": ethernet_rows(inputs),
        "host_floor_s": host_floor_s(rows),
        "remote": remote_rows(inputs),
        "pool": pool_curve(inputs, (8, 16, 32, 64, 128)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate where asked, write the tables and the figure; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calibrate", action="store_true", help="measure two workers on this machine first")
    parser.add_argument("--rounds", type=int, default=6, help="of the calibration")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"inputs: {', '.join(usual_inputs())}"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of scaling.json, .md and .png")
    given = parser.parse_args(arguments)
    inputs = usual_inputs()
    for text in given.set:
        name, _, value = text.partition("=")
        if name not in inputs:
            parser.error(f"--set {text}: no input of that name; there are: {', '.join(inputs)}")
        inputs[name] = float(value)
    file = given.output / "scaling.json"
    kept = json.loads(file.read_text()).get("calibration") if file.is_file() else None
    made = scaling_calibration.measure(given.rounds) if given.calibrate else kept
    rows = json.loads((RESULTS / "gpu_step.json").read_text())["rows"]
    report = report_of(inputs, rows) | {"calibration": made}
    given.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    file.with_suffix(".md").write_text(scaling_tables.markdown(report))
    scaling_tables.figure(report, file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
