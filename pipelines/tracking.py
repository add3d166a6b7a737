"""Where a run's numbers go: MLflow, a metrics.jsonl in the run folder (always), or nowhere.

Only rank 0 tracks. The MLflow run id is kept by the caller (run.json, checkpoints): a restarted or resumed worker hands it back and
stays in the same run, and steps that the run already has are not logged twice. A tracking server that cannot be reached fails
:func:`preflight`, before anything starts; one that goes away later never stops a training: metrics wait in memory, one warning is
printed, and metrics.jsonl has them all.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit

from didr_core.config import Config, Tracking
from didr_core.contracts import DIDRError

Status = Literal["FINISHED", "FAILED", "KILLED"]
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "uc")


class Tracker(Protocol):
    """What a training loop says to its trackers. No method raises because a server is away."""

    run_id: str | None

    def params(self, tree: Mapping[str, Any]) -> None:
        """The resolved config, once; nested keys become ``a.b``."""
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One step's numbers."""
        ...

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """Alarms that ring at this step."""
        ...

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run."""
        ...

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a folder to keep with the run."""
        ...

    def flush(self) -> None:
        """Hand over what is buffered."""
        ...

    def close(self, status: Status = "FINISHED") -> None:
        """End the run; further calls do nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullTracker:
    """Tracks nothing; base of the others, with the context manager."""

    run_id: str | None = None

    def params(self, tree: Mapping[str, Any]) -> None:
        """See :class:`Tracker`."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """See :class:`Tracker`."""

    def tags(self, values: Mapping[str, str]) -> None:
        """See :class:`Tracker`."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """See :class:`Tracker`."""

    def flush(self) -> None:
        """See :class:`Tracker`."""

    def close(self, status: Status = "FINISHED") -> None:
        """See :class:`Tracker`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("KILLED" if killed else "FAILED" if kind else "FINISHED")


class FileTracker(NullTracker):
    """``metrics.jsonl`` and ``alarms.jsonl`` in the run folder, a line a step; what the report draws its curves from.

    ``step`` is the last step of the checkpoint that a run goes on from: later lines, of an interrupted attempt, are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "alarms.jsonl"):
            _keep_until(self.folder / name, step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; NaN and infinities become null, so that every line is JSON."""
        row = {"step": step, "time": round(time.time(), 3)} | {
            k: v if math.isfinite(v) else None for k, v in values.items()
        }
        self._append("metrics.jsonl", row)

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """Append one line an alarm."""
        for name in names:
            self._append("alarms.jsonl", {"step": step, "alarm": name})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _keep_until(path: Path, step: int) -> None:
    if path.is_file():
        kept = [row for row in read_lines(path) if row["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(part, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl; a last line cut short by a crash is left out. Empty when there is no file."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Trackers(NullTracker):
    """Several trackers as one; ``run_id`` is the first that there is."""

    def __init__(self, members: Iterable[Tracker]) -> None:
        self.members = tuple(members)
        self.run_id = next((m.run_id for m in self.members if m.run_id), None)

    def params(self, tree: Mapping[str, Any]) -> None:
        """To all."""
        for member in self.members:
            member.params(tree)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for member in self.members:
            member.metrics(step, values)

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """To all."""
        for member in self.members:
            member.alarms(step, names)

    def tags(self, values: Mapping[str, str]) -> None:
        """To all."""
        for member in self.members:
            member.tags(values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """To all."""
        for member in self.members:
            member.artifact(path, folder)

    def flush(self) -> None:
        """To all."""
        for member in self.members:
            member.flush()

    def close(self, status: Status = "FINISHED") -> None:
        """To all."""
        for member in self.members:
            member.close(status)


def resolve(tracking: Tracking, runs: Path) -> str:
    """The tracking URI: as configured, "none", or sqlite beside the runs when nothing is configured.

    Raises:
        DIDRError: a scheme that MLflow does not speak.
    """
    if tracking.uri == "none":
        return "none"
    if not tracking.uri:
        return f"sqlite:///{Path(runs).expanduser().absolute() / 'mlflow.db'}"
    scheme = urlsplit(tracking.uri).scheme.partition("+")[0]
    if scheme not in SCHEMES:
        hint = " MLflow 3 no longer writes file stores." if scheme in ("file", "") else ""
        raise DIDRError(
            f"tracking.uri={tracking.uri!r}: expected none, an http(s) address of a tracking server, or a database such as "
            f"sqlite:///mlflow.db.{hint}"
        )
    return tracking.uri


def preflight(tracking: Tracking, runs: Path) -> str:
    """The resolved URI, after asking it one question.

    Raises:
        DIDRError: wrong scheme, unreachable server, folder that cannot be written, deleted experiment.
    """
    uri = resolve(tracking, runs)
    if uri != "none":
        from pipelines import mlflow_tracking  # importing mlflow takes seconds

        client = mlflow_tracking.client(uri)
        try:
            mlflow_tracking.experiment(client, tracking.experiment, uri, runs)
        except DIDRError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise DIDRError(
                f"tracking.uri={uri!r}: cannot be used ({reason}). Start the server, correct the address, "
                "or track nothing with --set tracking.uri=none."
            ) from error
    return uri


def open_tracker(
    config: Config,
    run_folder: Path,
    *,
    rank: int = 0,
    run_id: str | None = None,
    step: int = 0,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    uri: str | None = None,
) -> Tracker:
    """The trackers of one process of a run.

    Args:
        run_folder: gets metrics.jsonl; the default MLflow database lies beside it.
        rank: only rank 0 tracks.
        run_id: the MLflow run to go on with; None starts one.
        step: last step of the checkpoint that training goes on from.
        tags: more tags. parent: MLflow run id of a sweep.
        uri: what :func:`preflight` returned on the driver; resolved from the config otherwise.
    """
    if rank != 0:
        return NullTracker()
    run_folder = Path(run_folder)
    members: list[Tracker] = [FileTracker(run_folder, step)]
    runs = run_folder.parent
    uri = uri or resolve(config.tracking, runs)
    if uri != "none":
        from pipelines import mlflow_tracking

        client = mlflow_tracking.client(uri)
        if run_id:
            members.append(mlflow_tracking.attach(client, run_id))
        else:
            members.append(mlflow_tracking.start(client, config, run_folder, runs, uri, tags or {}, parent))
    tracker = Trackers(members)
    if run_id and tags:
        tracker.tags(tags)
    return tracker
