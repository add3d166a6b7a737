"""What `benchmarks.scaling` writes for people: the tables of `results/scaling.md` and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling_formulas import KINDS, MODELS, READ, SIZES
from pipelines.report.figures import BLUE, GREY, INK, ORANGE, VERMILION

Row = Mapping[str, Any]
RATE_NAMES = {"measured": "as measured", "goal": "40 % of peak"}
COLUMNS = ("GPUs", "batch", "s an iteration", "pictures/s", "of perfect", "waits: others, averaging, checkpoint")
COLUMNS += ("actors: encoders, rewards, GPUs", "nearest to its limit (1: paces training)")


def markdown(report: Row) -> str:
    """The whole file."""
    out = ["# Clusters of 1 to 1,024 H100s, by calculation and simulation", ""]
    out += [
        "`python -m benchmarks.scaling`: nothing here was measured on more than one GPU. What goes in is at the end; what to make of it:"
    ]
    out += ["[docs/scaling.md](../../docs/scaling.md).", "", "![pictures a second, and a pool of rewards](scaling.png)"]
    for name, model in MODELS.items():
        for kind, title in KINDS.items():
            out += ["", f"## {model['title']}: {title}", "", *_cases(report, name, kind)]
    for section in (_money, _ethernet, _remote, _pool, _calibration, _inputs):
        out += ["", *section(report)]
    return "\n".join([*out, ""])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """In markdown."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cases(report: Row, name: str, kind: str) -> list[str]:
    rows = []
    for case in report["cases"]:
        if (case["model"], case["kind"]) == (name, kind):
            mark = " *" if name == "sdxl" and case["step_s"] < report["host_floor_s"] else ""
            waits = ", ".join(f"{case['shares'][part]:.1%}" for part in ("others", "averaging", "checkpoint"))
            first = max(case["loads"], key=lambda part: case["loads"][part])
            actors = (
                ", ".join(f"{gpus:.2g}" if gpus >= 0.01 else "< 0.01" for gpus in case["actor_gpus"])
                if case["workers"] > 1
                else "before training"
            )
            cells = [f"{case['gpus']:,}" + (f", {case['workers']} used" if case["workers"] < case["gpus"] else "")]
            cells += [
                f"{case['batch']:,}",
                number(case["step_s"]) + mark,
                number(case["pictures_a_s"]),
                f"{case['efficiency']:.0%}",
            ]
            cells += [waits, actors, f"{first}, {case['loads'][first]:.2g}"]
            rows.append([RATE_NAMES[case["rate"]], *cells])
    return table(("rate", *COLUMNS), rows)


def _money(report: Row) -> Iterator[str]:
    inputs = report["inputs"]
    yield f"""## Rent

{inputs["iterations"]:,.0f} iterations at a batch of {inputs["batch"]:.0f}: the recipes of 8 GPUs. The paper publishes neither, so
this stands for its run; rent is linear in both. {inputs["gpu_dollars"]:g} US dollars an hour of a GPU, actors' GPUs
rounded up. GPUs beyond one a picture are paid for and idle.
"""
    columns = ["", *(f"{n:,} GPU{'s' * (n > 1)}: hours, dollars" for n in SIZES), "1,000 pictures at 64 GPUs, dollars"]
    rows = []
    for name in MODELS:
        for rate, told in RATE_NAMES.items():
            found = [c for c in report["cases"] if (c["model"], c["rate"], c["kind"]) == (name, rate, "batch")]
            each = next(c["dollars_a_1000"] for c in found if c["gpus"] == 64)
            costs = (f"{number(c['hours'])}, {c['dollars']:,.0f}" for c in found)
            rows.append([f"{name}, {told}", *costs, f"{each:.2f}"])
    yield from table(columns, rows)


def _ethernet(report: Row) -> Iterator[str]:
    yield f"""## The same 64 GPUs over Ethernet

{report["inputs"]["ethernet_gbs"]:g} GB/s a machine of eight in place of InfiniBand, at the goal's rate:
s an iteration (share spent averaging).
"""
    rows = []
    for row in report["ethernet"]:
        cells = [f"{row[way]['step_s']:.2f} ({row[way]['averaging']:.0%})" for way in ("infiniband", "ethernet")]
        rows.append([f"{row['model']}, {row['share']} pictures a GPU", *cells])
    yield from table(("", "InfiniBand", "Ethernet"), rows)


def _remote(report: Row) -> Iterator[str]:
    yield """## Rewards in actors

64 trainers at the goal's rate, ms a picture. Faster: an iteration with the reward beside the trainer, over one with it in idle actors.
Actors: so many, and nobody waits though all trainers ask at once, several to a call where one is too slow; * no number is enough, one a
trainer. Breaks even: what an actor's GPU may cost, as a part of a trainer's, before the time saved is not worth it (memory saved is not
counted).
"""
    columns = ("", "reward, ms", "its share, beside the trainer", "transfer, ms", "window, ms")
    rows = []
    for row in report["remote"]:
        cells = [f"{row['model']}, {row['reward']} ({row['gb']:g} GB)", f"{1e3 * row['reward_s']:.3g}"]
        cells += [f"{row['local_share']:.1%}", *(f"{1e3 * row[part]:.3g}" for part in ("transfer_s", "window_s"))]
        cells += [f"{row['faster'][way]:.3f}x" for way in ("overlapped", "in turn")]
        rows.append([*cells, f"{row['actors']}{'' if row['nobody_waits'] else ' *'}", f"{row['break_even']:.0%}"])
    yield from table((*columns, "faster, overlapped", "in turn", "actors", "breaks even"), rows)


def _pool(report: Row) -> Iterator[str]:
    pool = dict(report["pool"])
    counts = pool.pop("actors")
    yield "Simulated seconds an iteration, SDXL, 64 trainers, 2 pictures each, a judge of 7B parameters, by reward actors:"
    yield ""
    rows = [[way, *(f"{s:.2f}" for s in row)] for way, row in pool.items()]
    yield from table(("", *(f"{n:.0f}" for n in counts)), rows)


def _calibration(report: Row) -> Iterator[str]:
    made = report["calibration"]
    yield "## Held to two measured workers"
    yield ""
    if not made:
        yield "Not measured yet: `python -m benchmarks.scaling --calibrate`."
        return
    yield f"""`python -m benchmarks.scaling --calibrate`, {made["cores"]} CPU cores, {made["date"]}, commit {made["commit"]},
load average at the end {made["load"]:.1f}; recipe `tiny`, batch 4 over two processes of one thread, gloo, {made["rounds"]} rounds
in turns, medians.
"""
    rows = [[way, *(f"{s:.4f}" for s in made[way])] for way in ("alone", "side by side", "averaging")]
    yield from table(("", "TA update, s", "generator update, s"), rows)
    beside, alone = (made[f"predicted from {way}"] for way in ("side by side", "alone"))
    yield f"""
Measured step of two workers: {made["measured_s"]:.3f} s. Simulated from the passes side by side (jitter
{made["jitter"]:.1%}) and the averaging: {beside["step_s"]:.3f} s, **{beside["ratio"]:.2f} of the measured**. From the
passes of a process alone: {alone["ratio"]:.2f}; what is between them is what two programs on two cores take from each
other, which no simulation of a cluster could know. It is a check of barriers and averaging at two workers on CPUs,
and says nothing of networks, GPUs or 1,024 workers."""


def _inputs(report: Row) -> Iterator[str]:
    yield "## What goes in"
    yield ""
    rows = []
    for name, (usual, unit, source) in READ["inputs"].items():
        value = report["inputs"][name]
        rows.append([f"`{name}`", f"{value:g} {unit}", source if value == usual else f"given (usually {usual})"])
    yield from table(("input", "value", "from"), rows)
    yield f"""
Per model: [`scaling.yaml`](../scaling.yaml) (planned). Seconds of a micro-batch as measured: [`gpu_step.md`](gpu_step.md),
the rows "as first measured". The calls of SDXL's UNet that an iteration must make, bare and not compiled, keep the host
busy for {report["host_floor_s"]:.1f} s a micro-batch of up to four pictures (measured): faster rows than
that (*) need compiled networks, which no GPU has run yet."""


def figure(report: Row, path: Path) -> Path:
    """Pictures a second by GPUs for each model, and a step by reward actors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(14.0, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, 3)
    for plot, (name, title) in zip(axes, (("sdxl", "SDXL"), ("zimage", "Z-Image")), strict=False):
        for rate, colour in (("goal", BLUE), ("measured", ORANGE)):
            for kind, line in (("share", "-"), ("batch", "--")):
                found = [c for c in report["cases"] if (c["model"], c["rate"], c["kind"]) == (name, rate, kind)]
                label = f"{RATE_NAMES[rate]}, {'16 pictures a GPU' if kind == 'share' else '128 in all'}"
                plot.plot(
                    [c["gpus"] for c in found],
                    [c["pictures_a_s"] for c in found],
                    line,
                    marker="o",
                    color=colour,
                    label=label,
                )
        plot.set_xscale("log", base=2)
        plot.set_yscale("log")
        plot.set_xticks(SIZES, [f"{n:,}" for n in SIZES])
        plot.set_xlabel("GPUs", fontsize=11)
        plot.set_ylabel("pictures/s", fontsize=11)
        plot.set_title(title, loc="left", fontsize=13, color=INK)
        plot.legend(fontsize=9, frameon=False)
    pool = report["pool"]
    for way, colour in (("overlapped", BLUE), ("in turn", VERMILION), ("beside each trainer", GREY)):
        axes[2].plot(pool["actors"], pool[way], "--" if way.startswith("beside") else "o-", color=colour, label=way)
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(pool["actors"], [f"{n:.0f}" for n in pool["actors"]])
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel("reward actors", fontsize=11)
    axes[2].set_ylabel("s an iteration", fontsize=11)
    axes[2].set_title("SDXL, 64 trainers, a judge of 7B", loc="left", fontsize=13, color=INK)
    axes[2].legend(fontsize=9, frameon=False)
    for plot in axes:
        plot.grid(alpha=0.25)
        for side in ("top", "right"):
            plot.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, facecolor="white")
    return path
