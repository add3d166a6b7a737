"""Where a run's numbers go besides its own folder: MLflow, or nowhere.

Only rank 0 tracks. The MLflow run id is kept by the caller (run.json, checkpoints): a restarted or resumed worker hands it back and
stays in the same run, and steps that the run already has are not logged twice. A tracking server that cannot be reached fails
:func:`preflight`, before anything starts; one that goes away later never stops a training: metrics wait in memory, one warning is
printed, and metrics.jsonl has them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit

from didr_core.config import Config, Tracking
from didr_core.types import DIDRError

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

    def final(self, values: Mapping[str, float]) -> None:
        """Numbers that a run has once, at its end; not tied to a step."""
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

    def final(self, values: Mapping[str, float]) -> None:
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
        from pipelines.tracking import mlflow_tracker as mlflow_tracking  # importing mlflow takes seconds

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


def find_run(tracking: Tracking, uri: str, tags: Mapping[str, str]) -> str | None:
    """The MLflow run that has all these tags: for those who may have died between starting a run and noting its id."""
    if uri == "none":
        return None
    from pipelines.tracking import mlflow_tracker as mlflow_tracking

    return mlflow_tracking.find(mlflow_tracking.client(uri), tracking.experiment, tags)


def open_tracker(
    config: Config,
    run_folder: Path,
    *,
    rank: int = 0,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    uri: str | None = None,
) -> Tracker:
    """The tracker of one process of a run; metrics.jsonl is :class:`didr_core.train.run_folder.RunFolder`'s own.

    Args:
        run_folder: gives the run its name; the default MLflow database lies beside it.
        rank: only rank 0 tracks.
        run_id: the MLflow run to go on with; None starts one.
        tags: more tags. parent: MLflow run id of a sweep.
        uri: what :func:`preflight` returned on the driver; resolved from the config otherwise.
    """
    if rank != 0:
        return NullTracker()
    run_folder = Path(run_folder)
    uri = uri or resolve(config.tracking, run_folder.parent)
    if uri == "none":
        return NullTracker()
    from pipelines.tracking import mlflow_tracker as mlflow_tracking

    client = mlflow_tracking.client(uri)
    if run_id is None:
        return mlflow_tracking.start(client, config, run_folder, uri, tags or {}, parent)
    tracker = mlflow_tracking.attach(client, run_id)
    tracker.tags(tags or {})
    return tracker
