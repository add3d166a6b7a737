"""What README and docs say exists: links and their anchors, commands with their options, recipes with their settings, modules."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from didr_core import config as configs
from pipelines.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
IN_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CALLED = re.compile(r"(didr|make) \w|python -m (benchmarks|didr_core|pipelines|examples)\.")
YOURS = re.compile(r"\.py:|=mine\b")  # a file that the page tells its reader to write
PLACEHOLDER = re.compile(r"[<>]|\bNAME\b|\bRUN\b|\.\.\.")


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings."""
    heads = re.findall(r"^#+ (.+)$", IN_CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> list[str]:
    """What the page's shell blocks call of this project, joined where a line goes on, without comments; and modules in its inline code."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python -m [^`\n]+)`", IN_CODE.sub("", text))
    called = (re.sub(r"\s#\s.*", "", line).strip() for line in lines)
    return [line for line in called if CALLED.match(line)]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(IN_CODE.sub("", page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            dead.append(target)
    assert not dead, f"{page.relative_to(ROOT)}: {dead}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    """`didr`'s parser takes them, the settings are ones of the recipe, modules and make's targets exist; nothing is run."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        words = shlex.split(PLACEHOLDER.sub("x", line.partition(" | ")[0].partition(" > ")[0]))
        if words[0] == "make":
            asked = {word for word in words[1:] if "=" not in word}
            assert asked <= targets, f"{line}: make knows no {asked - targets}"
        elif words[0] == "python":
            assert importlib.util.find_spec(words[2].rstrip(",")), f"{line}: no such module"
        else:
            understood(words[1:], line)


def test_every_metric_is_explained() -> None:
    names = r"\"((?:loss|grad|drs|reward|matching|latent|image|time|adam)/[a-z_]+)\""
    logged = {
        n
        for room in ("train", "algorithms")
        for p in (ROOT / "didr_core" / room).glob("*.py")
        for n in re.findall(names, p.read_text())
    }
    told = set(re.findall(r"`([a-z]+/[a-z_]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    assert len(logged) > 20 and logged <= told, logged - told


def understood(words: list[str], line: str) -> None:
    """Fails where `didr WORDS` would be refused for what it says."""
    group: typer.core.TyperGroup = typer.main.get_command(app)  # type: ignore[assignment]
    command: typer.core.TyperCommand | typer.core.TyperGroup = group
    while isinstance(command, typer.core.TyperGroup) and words and not words[0].startswith("-"):
        known = command.commands.get(words[0])
        assert known is not None, f"{line}: didr knows no {words[0]}"
        command, words = known, words[1:]  # type: ignore[assignment]
    if words in (["x"], []) or "--help" in words:
        return
    told = command.make_context("didr", words).params
    if told.get("recipe") and not str(told["recipe"]).endswith(".yaml") and not told.get("resume"):
        configs.load(str(told["recipe"]), [o for o in told.get("overrides") or [] if not YOURS.search(o)])
