"""What `benchmarks.gpu_step` prints and writes for people: a line a row, the tables of `results/gpu_step.md`, hours and rent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from didr_core import config as configs
from didr_core.config import Config

Row = Mapping[str, Any]
ABOUT = """
Made by `python -m benchmarks.gpu_step` (its docstring says how to run it). TFLOP are those planned on the meta device, or counted where a
row was measured with older code. Passes are the forward and backward passes of an update: all but the optimizer, which waits for the
device; where the host's seconds are as many as the device's, the device waits for the host. Peak GiB is torch's own count, the planned
one that of training alone, with the CUDA context and the margin in it.
"""
RECIPES = ("sdxl_1gpu", "sdxl_8gpu", "zimage_1gpu", "zimage_8gpu")
COLUMNS = ("row", "batch / micro", "s an update", "pictures/s", "TFLOP", "TFLOP/s", "peak GiB (planned)")
COLUMNS += ("TA, generator, s", "passes: device, host, s", "device idle")
ITERATIONS = 1000
TITLES = {
    "full": "Full size",
    "tiny": "Rehearsal at toy sizes, which shows that the command runs; its seconds say nothing of a GPU",
}


def line(row: Row) -> str:
    """What is printed when a row is done."""
    if "s_per_update" not in row:
        return f"{row['name']}: {row.get('error') or 'does not fit'}"
    peak = f", {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
    error = f"; then {row['error']}" if "error" in row else ""
    return f"{row['name']}: {row['s_per_update']:.3g} s an update, {row['images_per_s']:.3g} pictures/s{peak}{error}"


def markdown(rows: Sequence[Row], plans: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """The whole file; of the rows ``wanted``, those that are not measured are named."""
    out = ["# One update on a GPU", "", *ABOUT.strip().split("\n")]
    for size, title in TITLES.items():
        of_size = sorted((r for r in rows if r["size"] == size), key=_origin)
        for (date, commit, device, versions), made in groupby(of_size, _origin):
            group = list(made)
            rate = max(r.get("hardware", {}).get("matmul_tflops", 0) for r in group)
            out += [
                "",
                f"## {title}: {device}, {date}",
                "",
                f"Code: {commit or 'unknown'}. {versions}; a large matrix product: {rate:.3g} TFLOP/s.",
                "",
            ]
            out += _table(group, plans)
        done = {r["name"] for r in of_size if "fits" in r}
        if missing := [name for name in wanted if name not in done]:
            out += ["", f"Not measured yet ({size} size): {', '.join(missing)}."]
    for row in rows:
        if "kernels" in row and row["size"] == "full":
            out += ["", *_kernels(row)]
    return "\n".join([*out, "", "## Hours and rent", "", *cost(rows), ""])


def _origin(row: Row) -> tuple[str, str, str, str]:
    made, hardware = row.get("versions", {}), row.get("hardware", {})
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "diffusers") if name in made)
    return row.get("date", ""), row.get("commit") or "", hardware.get("device", "unknown"), versions


def _table(rows: Sequence[Row], plans: Mapping[str, Any]) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        if "s_per_update" not in row:
            yield f"| {row['name']} | | {row.get('error') or 'does not fit'}" + " |" * 8
            continue
        case, plan, seconds = row["case"], plans.get(f"{row['size']}: {row['name']}", {}), row["s_per_update"]
        flops, room = row.get("tflop", plan.get("tflop")), row.get("planned_gib", plan.get("peak_gib"))
        phases = row.get("phases", {})
        parts = [_number(phases.get(name, {}).get("s")) for name in ("TA update", "generator update")]
        passes = [_number(phases.get("passes", {}).get(key)) for key in ("s", "host_s")]
        cells = [
            row["name"],
            f"{case['batch']} / {case['micro']}",
            _number(seconds),
            _number(row.get("images_per_s")),
            _number(flops),
            _number(flops / seconds if flops else None),
            _number(row.get("peak_gib")) + (f" ({_number(room)})" if room else ""),
            ", ".join(parts),
            ", ".join(passes),
            f"{row['idle_share']:.0%}" if "idle_share" in row else "-",
        ]
        yield "| " + " | ".join(cells) + " |"
    for row in rows:
        if note := row.get("note"):
            yield ""
            yield f"{row['name']}: {note}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _kernels(row: Row) -> Iterator[str]:
    yield f"## Heaviest kernels of one update: {row['name']}"
    yield ""
    yield f"{row['launches']:,} launches in {row['traced_s']:.3g} s, the device idle for {row['idle_share']:.0%} of it."
    yield ""
    yield "| kernel | calls | s | share of the time in kernels |"
    yield "|---|---|---|---|"
    for kernel in row["kernels"]:
        name = kernel["name"].replace("|", "\\|")
        yield f"| `{name}` | {kernel['calls']:,} | {kernel['s']:.3g} | {kernel['s'] / row['busy_s']:.1%} |"


def cost(rows: Sequence[Row], price: float = 2.5) -> Iterator[str]:
    """Hours and rent of 1,000 iterations of each recipe that needs a GPU, from measured rows, at ``price`` US dollars an hour of a GPU."""
    yield "1,000 iterations of each recipe, training alone, from measured seconds a picture of TA and generator updates;"
    yield f"{price:g} US dollars an hour of a GPU is an assumption (`python -m benchmarks.gpu_step --cost PRICE`). The optimizer's time is"
    yield "scaled with the batch, too, so a larger batch than the row's takes a little less. Other recipes: on a CPU."
    yield ""
    yield "| recipe | from the row | s an iteration | hours | rent, US dollars |"
    yield "|---|---|---|---|---|"
    for recipe in RECIPES:
        config = configs.load(recipe)
        split, gpus = config.roles.fsdp and config.workers.train > 1, config.workers.train
        row = None if split else _row_for(config, rows)
        if row is None:
            why = f"networks split over {gpus} GPUs" if split else "its roles and micro-batch"
            yield f"| {recipe} | missing: no measured row with {why} | | | |"
            continue
        updates = {"TA update": config.sizes.assistant_updates, "generator update": 1}
        passed = {
            name: row["phases"][name]["s"] / row["phases"][name]["calls"] / row["case"]["batch"] for name in updates
        }
        seconds = config.sizes.share * sum(times * passed[name] for name, times in updates.items())
        hours = seconds * ITERATIONS / 3600
        apart = ", without what its GPUs exchange" if gpus > 1 else ""
        yield f"| {recipe} | {row['name']} ({row['date']}){apart} | {seconds:.1f} | {hours:.1f} | {hours * gpus * price:,.0f} |"


def _row_for(config: Config, rows: Sequence[Row]) -> Row | None:
    """The fastest measured row of the recipe's family, roles, estimator and micro-batch, of the latest day."""
    wanted = {
        "loop": "ours",
        "family": config.backbone.name,
        "generator": config.roles.generator,
        "assistant": config.roles.assistant,
        "estimator": config.drp.estimator,
        "micro": config.train.micro_batch,
        "checkpointing": config.roles.gradient_checkpointing,
    }
    wanted = {key: value for key, value in wanted.items() if value != "auto"}
    fit = [r for r in rows if r["size"] == "full" and "phases" in r and wanted.items() <= r["case"].items()]
    return max(fit, key=lambda r: (r["date"], r["images_per_s"]), default=None)
