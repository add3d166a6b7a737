"""What one worker's iteration is made of, on paper: passes, averaging, prompts, checkpoints, calls to a pool of rewards.

For `benchmarks.scaling`. Pure functions of `scaling.yaml`'s numbers (`Inputs`: by name, in its units) and of the rows of
`results/gpu_step.json`. Seconds, unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

READ: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("scaling.yaml").read_text())
MODELS: dict[str, dict[str, Any]] = READ["models"]
SIZES = (1, 8, 64, 128, 1024)  # GPUs
RATES = ("measured", "goal")
MEASURED = "as first measured"
"""End of the names of the rows of `gpu_step` that the rate "measured" is of: one H100, 2026-11-27."""
KINDS = {"batch": "the same batch", "share": "the same share of each GPU"}
ASSISTANT_UPDATES = 5  # of both recipes
CHECKPOINT_EVERY = 50  # of both recipes

Inputs = Mapping[str, float]


def usual_inputs() -> dict[str, float]:
    """The values of `scaling.yaml`, in its units."""
    return {name: float(value) for name, (value, _, _) in READ["inputs"].items()}


def ring_bytes(size: float, workers: int, passes: int = 2) -> float:
    """Bytes that each worker sends to average ``size`` bytes around a ring: to add up, and to hand out; one of them gathers or scatters."""
    return passes * size * (workers - 1) / workers


def collective_s(size: float, workers: int, inputs: Inputs, passes: int = 2) -> float:
    """Seconds of averaging ``size`` bytes over ``workers``, in calls of `bucket_mib`: the slowest link's bandwidth, and latency by hops."""
    if workers == 1 or not size:
        return 0.0
    inside = workers <= inputs["machine_gpus"]
    bandwidth = 1e9 * (inputs["nvlink_gbs"] if inside else min(inputs["nvlink_gbs"], inputs["network_gbs"]))
    calls = math.ceil(size / (inputs["bucket_mib"] * 2**20))
    return ring_bytes(size, workers, passes) / bandwidth + calls * 2 * math.log2(workers) * inputs["hop_us"] * 1e-6


def actors_needed(pictures_a_s: float, seconds_a_picture: float, busy: float) -> float:
    """GPUs of a pool that is ``busy`` (a share of its time) at that demand."""
    return pictures_a_s * seconds_a_picture / busy


def exposed_s(reward_s: float, transfer_s: float, window_s: float, overlap: bool) -> float:
    """Seconds that a worker waits for an idle actor: the call, less what passes meanwhile."""
    return max(0.0, reward_s + transfer_s - (window_s if overlap else 0.0))


def actors_to_hide(workers: int, reward_s: float, transfer_s: float, window_s: float, pictures: int) -> int | None:
    """Reward actors with which nobody waits though all ``workers`` ask at once, as they do after an averaging; None: no number is enough.

    An actor serves several workers in a row where it can; where it cannot, several share the ``pictures`` of a call.
    """
    spare = window_s - transfer_s
    if spare <= 0:
        return None
    if reward_s <= spare:
        return math.ceil(workers / math.floor(spare / reward_s))
    parts = math.ceil(reward_s / spare)
    return workers * parts if parts <= pictures else None


def checkpoint_s(model: Mapping[str, Any], workers: int, inputs: Inputs) -> tuple[float, float]:
    """Seconds of a checkpoint's copy to the host, which training waits for, and of its writing, which it does not."""
    whole, split = model["checkpoint_gb"]
    most = whole + split / workers  # of rank 0
    return most / inputs["pcie_gbs"], max(most / inputs["writer_gbs"], (whole + split) / inputs["storage_gbs"])


def measured_passes(rows: Sequence[Mapping[str, Any]], family: str) -> dict[int, tuple[float, float]]:
    """Measured seconds of one micro-batch of a TA and of a generator update, by its pictures (SDXL's hardly depend on them: host bound).

    Of :data:`MEASURED` alone: rows of other days are of other code, other GPUs and larger micro-batches than a large cluster's shares.
    """
    found = {}
    for row in rows:
        case = row["case"]
        if row["name"].endswith(MEASURED) and case["family"] == family and case["loop"] == "ours" and "phases" in row:
            times = case["batch"] / case["micro"]
            phases = (row["phases"][name] for name in ("TA update", "generator update"))
            one, other = (phase["s"] / phase["calls"] / times for phase in phases)
            found[case["micro"]] = one, other
    return found


def passes(
    model: Mapping[str, Any], rate: str, share: int, inputs: Inputs, measured: Mapping[int, tuple[float, float]]
) -> tuple[float, float, int]:
    """Seconds of a TA and of a generator update's passes over ``share`` pictures, and in how many micro-batches."""
    if rate == "measured":
        micro = max(m for m in measured if m <= share)
        times = math.ceil(share / micro)
        return times * measured[micro][0], times * measured[micro][1], times
    a_second = inputs["peak_tflops"] * inputs["goal_share"]
    one, other = (share * sum(model[which].values()) / a_second for which in ("assistant", "generator"))
    return one, other, math.ceil(share / model["micro"])


def averaging(
    model: Mapping[str, Any], workers: int, seconds: tuple[float, float, int], inputs: Inputs
) -> tuple[float, float]:
    """Seconds of a TA and of a generator update in which a GPU sends and does not compute.

    Adapters are averaged after an update. Split networks are gathered a block ahead of their use and gradients scattered behind it, so of
    that only what takes longer than the passes counts.
    """
    one, other, times = seconds
    own = [collective_s(4 * p, workers, inputs) for p in model["adapter_parameters"]]
    gather = collective_s(2 * model["split_parameters"], workers, inputs, passes=1)
    scatter = collective_s(4 * model["split_parameters"], workers, inputs, passes=1)
    return own[0] + max(0.0, times * gather - one), own[1] + max(0.0, times * (2 * gather + scatter) - other)


def driver_s(workers: int, inputs: Inputs) -> float:
    """Seconds of Ray Data's driver for one batch: every worker's share is cut, encoded and scored, a task each."""
    return 3 * workers / inputs["tasks_a_s"]


def prompt_s(model: Mapping[str, Any], inputs: Inputs) -> tuple[float, float]:
    """Seconds a prompt of an encoder's GPU (77 tokens), and of a reward actor's, which draws and scores two pictures of the start."""
    encoded = 2 * model["encoder_parameters"] * 77 / 1e12
    return encoded / inputs["forward_tflops"], 2 * model["start_tflop"] / inputs["forward_tflops"]


def host_floor_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the bare calls of SDXL's UNet keep the host busy, an iteration of one micro-batch.

    Five TA updates (a sample; forward and backward), one of the generator (forward and backward, the proxy's too; the reference; the TA).
    """
    host = {
        row["name"].partition(", ")[2]: row["phases"]["passes"]["host_s"]
        for row in rows
        if row["case"]["loop"] == "bare"
    }
    forward, both = host["forward, 1"], host["forward and backward, 1"]
    return float(ASSISTANT_UPDATES * (forward + both) + 2 * both + 2 * forward)
