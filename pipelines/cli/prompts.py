"""`didr prompts`: prompt files of any kind into Parquet shards, with what was found on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from didr_core import config as configs
from didr_core.data.convert import convert
from didr_core.networks.tokenizers import longer_than
from didr_core.plan.preflight import readers_of


def prompts(
    files: Sequence[str],
    out: Path,
    column: str,
    id_column: str,
    against: Sequence[str],
    drop: bool,
    recipe: str | None,
    overrides: Sequence[str],
) -> None:
    """Write the shards and print the counts.

    Args:
        recipe: whose encoder and reward may cut prompts off; see :func:`didr_core.data.convert.convert` for the rest.

    Raises:
        DIDRError: a file cannot be read, or the recipe's tokenizers are not there.
    """
    readers = readers_of(configs.load(recipe, overrides)) if recipe else {}
    tokenizers = {
        (name, folder): most for name, r in readers.items() for folder, most in (r.tokenizers() or {}).items()
    }
    long: Counter[tuple[str, Path]] = Counter()

    def watch(texts: list[str]) -> None:
        long.update({who: longer_than(who[1], most, texts) for who, most in tokenizers.items()})

    found = convert(files, out, column, id_column, others=against, drop=drop, watch=watch)
    say = Console(highlight=False, markup=False).print
    say(f"{found.written:,} prompts in {out} (of {found.rows:,} rows)", soft_wrap=True)
    say(f"{found.empty:,} empty, left out")
    say(f"{found.duplicates:,} duplicates, {'left out' if drop else 'kept (--drop leaves them out)'}")
    if against:
        example = f", e.g. {found.example!r}" if found.shared else ""
        say(f"{found.shared:,} are in {', '.join(against)} too{example}", soft_wrap=True, markup=False)
    for (name, folder), most in tokenizers.items():
        say(f"{long[name, folder]:,} longer than the {name} reads ({folder.name}: {most} tokens)")
