"""`didr doctor`: what is installed here, what GPUs and cluster there are, and whether a recipe fits, with the arithmetic."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table
from rich.text import Text

from didr_core import config as configs
from didr_core.config import Config, registry
from didr_core.plan import advice, fit, memory
from didr_core.plan.memory import Line, Plan
from didr_core.plan.preflight import opened
from didr_core.types import DIDRError
from pipelines.cli.show import say_unread
from pipelines.cluster.resources import check, demands_of, taken

PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "mlflow")
OPTIONAL = {"bitsandbytes": "for generator.optimizer=adamw8bit"}


def doctor(
    recipe: str | None, overrides: Sequence[str], gigabytes: float | None, address: str | None, load_code: bool = False
) -> bool:
    """Print everything; with a recipe, its plan too.

    Args:
        gigabytes: of the GPU to plan for; None = the smallest one here, or 80 where there is none.
        load_code: run the Python code that the recipe names, too; without it, such a recipe is not planned.

    Returns:
        Whether the recipe fits (True without one).
    """
    out = Console(highlight=False, markup=False)
    out.print(_installed())
    cards = _gpus()
    out.print(_gpu_table(cards))
    with ExitStack() as stack:
        unread = [] if load_code else stack.enter_context(registry.code_unread())
        config = configs.load(recipe, overrides) if recipe else None
        fits = True
        if unread:
            say_unread(out, unread)
            out.print("memory and FLOPs are not planned without it: --load-code runs it")
        elif config is not None:
            size = gigabytes or min((size for _, size in cards), default=80.0)
            fits = _report(out, config, size, measured=bool(cards) and not gigabytes)
            for wrong in opened(config, fetch=False)[1]:
                out.print(f"not ready: {wrong}", soft_wrap=True)
        return _cluster(out, address, config) and fits


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("GB", "TFLOP/sample") else "left", overflow="fold")
    return table


def _installed() -> Table:
    table = _table("installed", "what", "version", "")
    table.add_row("python", platform.python_version(), sys.platform)
    for name in PACKAGES:
        table.add_row(name, _version(name) or "absent", "" if _version(name) else "install it: see requirements.lock")
    for name, why in OPTIONAL.items():
        table.add_row(name, _version(name) or "absent", f"optional, {why}")
    return table


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[tuple[str, float]]:
    """Name and memory in GB (1e9 bytes) of each."""
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(p.name, p.total_memory / 1e9) for p in found]


def _gpu_table(cards: Sequence[tuple[str, float]]) -> Table:
    table = _table("GPUs", "name", "memory")
    for name, size in cards:
        table.add_row(name, f"{size:.0f} GB")
    if not cards:
        table.add_row("none that torch sees", "plans are for --gpu-gb")
    return table


def _report(out: Console, config: Config, gigabytes: float, measured: bool) -> bool:
    config, told = fit.decided(config, gigabytes * 1e9)
    made = memory.plan(config)
    if made is None:
        out.print(
            f"{config.name}: backbone {config.backbone.name!r} is no diffusers pipeline, so small; nothing to plan."
        )
        return True
    for table in _processes(made):
        out.print(table)
    out.print(_flops(made))
    hours = made.total_flops * made.samples * config.train.steps / 1e14 / 3600
    out.print(f"time: all {config.train.steps:,} iterations, {hours:.2g} h at 100 TFLOP/s (measured: docs/results.md)")
    if told:
        out.print(f"auto: {told}")
    for note in made.notes:
        out.print(f"assumed: {note}")
    where = "the smallest GPU here" if measured else "a GPU"
    names, used = made.gpu_bytes()
    if names:
        verdict = "fits" if used <= gigabytes * 1e9 else "does not fit"
        out.print(Text(verdict, "bold"), f": {used / 1e9:.1f} GB on {where} of {gigabytes:.0f} GB ({names})", sep="")
    else:
        out.print("no process asks for a GPU (workers.train_gpus=0): nothing to fit")
    if made.fits(gigabytes):
        return True
    changes = advice.advice(config, gigabytes)
    fix = " ".join(f"--set {c}" for c in changes)
    out.print(
        f"change this: {fix}" if fix else "no settings are enough: a smaller backbone.resolution, or a larger GPU"
    )
    return False


def _processes(made: Plan) -> list[Table]:
    tables = []
    for process in made.processes:
        title = f"{process.name} x {process.count}: {process.total / 1e9:.1f} GB at its worst moment"
        title += f", {process.gpus:g} GPU" if process.gpus else ", on the CPU"
        table = _table(title, "whose", "what", "how", "GB")
        for line in process.held:
            table.add_row(*_cells(line))
        worst = max(process.phases, key=lambda p: p.bytes, default=None)
        for line in process.phases:
            table.add_row(*_cells(line), style="bold" if line is worst else "")
        tables.append(table)
    return tables


def _cells(line: Line) -> tuple[str, str, str, str]:
    return line.owner, line.what, line.how, f"{line.bytes / 1e9:.2f}"


def _flops(made: Plan) -> Table:
    table = _table(f"one iteration of {made.samples} samples", "phase", "TFLOP/sample")
    for phase, value in made.flops:
        table.add_row(phase, f"{value / 1e12:.1f}")
    table.add_row(
        f"together: {made.total_flops * made.samples / 1e15:.2f} PFLOP an iteration", f"{made.total_flops / 1e12:.1f}"
    )
    return table


def _cluster(out: Console, address: str | None, config: Config | None) -> bool:
    """Nodes of the cluster at ``address`` (or RAY_ADDRESS), and whether the recipe's processes find room on them."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        out.print("cluster: none named; --address auto (or RAY_ADDRESS) looks at one")
        return True
    from pipelines.cluster.session import ray_session

    try:
        with ray_session(address) as cluster:
            out.print(cluster.table())
            if config is not None:
                room = check(demands_of(config, cluster), cluster)
                out.print(room.table())
                held = taken(room.demands, cluster)
                out.print(Text(f"{config.name} fits the cluster", "bold"), f", but {held}" if held else "", sep="")
    except DIDRError as error:
        out.print(f"cluster at {address}: {error}")
        return False
    return True
