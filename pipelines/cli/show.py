"""`didr config show` and `didr config list`: what a recipe comes to, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from didr_core import config as configs
from didr_core.config import RECIPES, WORLD, Config, locate, registry
from didr_core.data.prompts import PromptIndex
from didr_core.types import DIDRError
from pipelines.cluster.resources import ClusterView, demands_of


def show(recipe: str, overrides: Sequence[str]) -> None:
    """Print the resolved plan; reads the prompts' footers, loads no weights, runs no code that the recipe names."""
    out = Console(highlight=False, markup=False)
    with registry.code_unread() as unread:
        config = configs.load(recipe, overrides)
        text = yaml.safe_dump(configs.dump(config), sort_keys=False, allow_unicode=True)
        out.print(Syntax(text, "yaml", background_color="default") if out.is_terminal else text)
        for table in (_algorithm(config), _sizes(config), _components(config), _processes(config)):
            out.print(table)
    say_unread(out, unread)


def say_unread(out: Console, names: Sequence[str]) -> None:
    """Which code a command that trains would load and run."""
    for name in names:
        out.print(
            f"not loaded: {name}. `didr align` and `didr sweep` run this code: read it first. Its defaults and checks are not shown."
        )


def show_known() -> None:
    """Print what a recipe or a `--set` may name."""
    out = Console(highlight=False, markup=False)
    table = _table("recipes", "name", "what it is")
    for path in sorted(RECIPES.glob("*.yaml")):
        lines = path.read_text().splitlines()
        table.add_row(path.stem, lines[0].removeprefix("# ") if lines and lines[0].startswith("#") else "")
    out.print(table)
    table = _table("components", "kind", "names", "also")
    for kind in registry.KINDS:
        key = "drp.estimator" if kind == "drs" else kind
        table.add_row(key, ", ".join(registry.names(kind)), "package.module:Class, file.py:Class")
    out.print(table)


def _algorithm(config: Config) -> Table:
    """What the algorithm is, what it needs, and what its options mean."""
    method = registry.find("algorithms", config.algorithm.name)
    if method is registry.StandIn:
        return _table(f"algorithm {config.algorithm.name}: not loaded")
    source = (inspect.getdoc(inspect.getmodule(method)) or "").split("\n\n")[0].replace("\n", " ")
    table = _table(f"algorithm {config.algorithm.name}: {source}", "key", "value", "meaning")
    for name, info in type(config.algorithm).model_fields.items():
        if name != "name":
            table.add_row(f"algorithm.{name}", str(getattr(config.algorithm, name)), info.description or "")
    needs = {
        "reward": method.needs_reward,
        "its gradient": method.needs_reward_gradient,
        "teaching assistant": method.needs_assistant,
    }
    table.add_row("needs", ", ".join(what for what, needed in needs.items() if needed), "")
    return table


def _sizes(config: Config) -> Table:
    sizes, train = config.sizes, config.train
    table = _table("sizes that follow", "what", "how many", "from")
    workers = config.workers.train
    table.add_row("samples a worker and step", f"{sizes.share}", f"train.batch {train.batch} / workers.train {workers}")
    table.add_row(
        "forward passes an update",
        f"{sizes.accumulation}",
        f"share {sizes.share} / micro-batch {sizes.micro_batch}"
        if train.micro_batch != "auto"
        else "train.micro_batch=auto: when the run starts, or see `didr doctor`",
    )
    table.add_row(
        "updates a step", f"{sizes.updates_per_step}", f"{sizes.assistant_updates} of the TA, 1 of the generator"
    )
    table.add_row("samples in the run", f"{sizes.total_prompts:,}", f"{train.steps} steps x {train.batch}")
    table.add_row(
        "checkpoints",
        f"{-(-train.steps // train.checkpoint_every)}",
        f"every {train.checkpoint_every} steps, {train.keep_checkpoints} kept",
    )
    for key, path in (("prompts", config.data.prompts), ("heldout", config.data.heldout)):
        if path:
            table.add_row(f"data.{key}", *_corpus(config, key, path))
    return table


def _corpus(config: Config, key: str, path: str) -> tuple[str, str]:
    try:
        index = PromptIndex.open(path, config.data.column, config.data.id_column, f"data.{key}")
    except DIDRError as error:
        return "?", f"not readable: {error}"
    epochs = f", {config.sizes.total_prompts / len(index):.2f} epochs" if key == "prompts" else ""
    return f"{len(index):,} prompts", f"{len(index.shards)} shard(s) at {path}{epochs}"


def _components(config: Config) -> Table:
    table = _table("where each part comes from", "part", "name", "code", "weights")
    for part, kind in (
        ("backbone", "backbones"),
        ("algorithm", "algorithms"),
        ("reward", "rewards"),
        ("judge", "rewards"),
    ):
        component = getattr(config, part)
        if component is None:
            table.add_row(part, "none", "", "")
            continue
        table.add_row(part, component.name, _code(kind, component.name), _weights(component))
    table.add_row("drp", config.drp.estimator, _code("drs", config.drp.estimator), "")
    return table


def _code(kind: str, name: str) -> str:
    if (found := registry.find(kind, name)) is registry.StandIn:
        return "not loaded"
    code, root = Path(inspect.getfile(found)), WORLD.parents[2]
    return str(code.relative_to(root) if code.is_relative_to(root) else code)


def _weights(component: Any) -> str:
    found = []
    for key, value in _leaves(component.model_dump()):
        if isinstance(value, str) and key != "name" and ("/" in value or "://" in value):
            found.append(f"{key}: {value}" + ("" if locate(value).exists() else " (missing)"))
    return "\n".join(found)


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """``(a.0.b, value)`` of a nested component's options; the name of a part is not an option."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else name) if name != "name" else ()
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{key}.{number}")
    else:
        yield key, tree


def _processes(config: Config) -> Table:
    table = _table("processes on Ray", "what", "how many", "each reserves", "setting")
    for group in demands_of(config, ClusterView(())).groups:
        needs = ", ".join(f"{amount:g} {name}" for name, amount in group.need.amounts().items())
        table.add_row(group.name, str(group.count), needs, group.count_setting)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
