"""Where MLflow is: the address from config or environment, and a look at it that takes no time, before anything starts."""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import socket
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

from didr_core.config import Tracking, redacted
from didr_core.config.files import expanded
from didr_core.config.passwords import HIDDEN
from didr_core.types import DIDRError

WRITERS = {"tensorboard": "tensorboardX"}  # the package that writes, where it is another than the one that shows
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "uc")


def resolve(tracking: Tracking, runs: Path) -> str:
    """The tracking URI: as configured (or "none"), else MLFLOW_TRACKING_URI of the environment, else sqlite beside the runs.

    Raises:
        DIDRError: a scheme that MLflow does not speak, or a password that config.yaml does not keep and the environment does not have.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    uri = tracking.uri or given or f"sqlite:///{expanded(runs).absolute() / 'mlflow.db'}"
    if HIDDEN in uri and redacted(given) == uri:
        uri = given
    if HIDDEN in uri:
        raise DIDRError(
            f"tracking.uri={uri!r}: its password is not kept on disk. Put the whole address into the environment variable "
            "MLFLOW_TRACKING_URI, or give it again with --set tracking.uri=..."
        )
    if uri.startswith("sqlite:///~"):
        uri = f"sqlite:///{expanded(uri.removeprefix('sqlite:///'))}"
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if uri != "none" and scheme not in SCHEMES:
        hint = " MLflow 3 no longer writes file stores." if scheme in ("file", "") else ""
        raise DIDRError(
            f"tracking.uri={redacted(uri)!r}: expected none, an http(s) address of a tracking server, or a database such as "
            f"sqlite:///mlflow.db.{hint}"
        )
    return uri


def look(tracking: Tracking, runs: Path) -> str:
    """The resolved URI, after a look that takes no time: MLflow, which takes seconds to import, is asked by :func:`preflight`.

    Raises:
        DIDRError: see :func:`resolve`; nobody answers, or a sqlite database of another schema.
    """
    look_beside(tracking)
    uri = resolve(tracking, runs)
    if uri.startswith("http"):
        knock(uri)
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if uri.startswith("sqlite:///") and database.is_file() and database.stat().st_size:
        try:
            with closing(sqlite3.connect(database)) as tables:
                found = tables.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.Error as error:
            raise unusable(uri, f"cannot be used as MLflow's database ({error})") from error
        if found and found[0] not in (ours := _schemas()) and ours:
            raise unusable(uri, f"its schema is {found[0]}, the MLflow here writes {', '.join(ours)}")
    return uri


def look_beside(tracking: Tracking) -> None:
    """Whether the packages of `tracking.also` are there, and a key for Weights & Biases unless it is offline; imports nothing.

    Raises:
        DIDRError: one is missing.
    """
    for name in tracking.also:
        if importlib.util.find_spec(WRITERS.get(name, name)) is None:
            raise DIDRError(
                f"tracking.also={list(tracking.also)}: the package {name!r} is not installed; pip install {name}"
            )
    if "wandb" in tracking.also and not _key_or_offline():
        raise DIDRError(
            f"tracking.also={list(tracking.also)}: no key of Weights & Biases. Say `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline "
            "and `wandb sync` later."
        )


def _key_or_offline() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") != "online":
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(expanded(os.environ.get("NETRC", "~/.netrc"))).authenticators(host) is not None
    return False


def _schemas() -> set[str]:
    """The newest revision of the installed MLflow's tables, as its migrations say; empty where they lie elsewhere."""
    spec = importlib.util.find_spec("mlflow")
    folder = Path(spec.origin or "").parent / "store" / "db_migrations" / "versions" if spec else Path()
    texts = [path.read_text(errors="replace") for path in folder.glob("*.py")]
    named = {
        key: {m[1] for text in texts for m in re.finditer(rf"^{key} = \"(\w+)\"", text, re.MULTILINE)}
        for key in ("revision", "down_revision")
    }
    return named["revision"] - named["down_revision"]


def knock(uri: str) -> None:
    """Whether anybody listens: an answer in words, before an HTTP client's page of nested exceptions."""
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise unusable(uri, f"nobody answers at {parts.hostname}:{port} ({error.strerror or error})") from error


def unusable(uri: str, why: str) -> DIDRError:
    """The error of an address that is of no use, with its mending."""
    mend = "Start the server"
    if "schema" in why or "revision" in why:
        mend = f"Back it up and run `mlflow db upgrade {redacted(uri)}`, with the newest MLflow that wrote to it"
    return DIDRError(
        f"tracking.uri={redacted(uri)!r}: {why}. {mend}, correct the address, or track nothing with --set tracking.uri=none."
    )


def reason(error: Exception) -> str:
    """An error's first line: MLflow's go on for pages."""
    return redacted((str(error).strip() or type(error).__name__).splitlines()[0])[:200]
