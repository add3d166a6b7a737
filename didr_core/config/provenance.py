"""Which code, and which libraries, made a run or a table."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import didr_core

PACKAGES = ("didr", "torch", "diffusers", "transformers", "peft", "numpy", "ray", "mlflow")


def provenance() -> dict[str, Any]:
    """``commit`` (None outside a repository), ``python`` and ``versions``. No host names, no paths: files with it are published."""
    return {"commit": commit() or None, "python": platform.python_version(), "versions": versions()}


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """The commit of the repository that this package lies in, with "+" when its tree has changes; empty where it lies in none."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    package = Path(didr_core.__file__).parent
    done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
