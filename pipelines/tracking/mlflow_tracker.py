"""MLflow as a tracker: buffered, quiet, through the client API alone (no global active run, safe beside other runs in the process)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from didr_core.config import Config, dump, flatten
from didr_core.config.provenance import commit
from didr_core.train.alarms import explain
from didr_core.types import DIDRError
from pipelines.tracking.tracker import NullTracker, Status

FLUSH_SECONDS = 10.0
LONGEST_VALUE = 500  # characters of a param; MLflow itself stops at 6,000
BATCH = 900  # metrics a log_batch; MLflow stops at 1,000
PARAMS = 100
WAITING = 100_000  # metrics kept in memory while a server is away


class MlflowTracker(NullTracker):
    """One MLflow run. A server that goes away never stops a training: metrics wait, and are tried again."""

    def __init__(self, client: Any, run_id: str, last_step: int = 0, params: Mapping[str, str] | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._last_step = last_step
        self._known_params = dict(params or {})
        self._waiting: list[tuple[str, float, int, int]] = []  # key, value, milliseconds, step
        self._ringing: tuple[str, ...] = ()
        self._dropped = 0
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._pause = FLUSH_SECONDS
        self._warned = False
        self._closed = False

    def params(self, tree: Mapping[str, Any]) -> None:
        """Log what the run does not have yet; a resumed run keeps the params it began with and is tagged when they differ."""
        from mlflow.entities import Param

        flat = {key: shorten(value) for key, value in flatten(tree).items()}
        changed = sorted(k for k, v in flat.items() if k in self._known_params and self._known_params[k] != v)
        fresh = [Param(key, value) for key, value in flat.items() if key not in self._known_params]
        for start in range(0, len(fresh), PARAMS):
            part = fresh[start : start + PARAMS]
            self._try(lambda part=part: self._client.log_batch(self.run_id, params=part))
        self._known_params |= {k: v for k, v in flat.items() if k not in self._known_params}
        if changed:
            self.tags({"didr.changed_params": shorten(", ".join(changed))})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Buffer one step; a step that the run already has (before a crash) is skipped."""
        if step <= self._last_step or self._closed:
            return
        now = int(time.time() * 1000)
        self._waiting += [(key, float(value), now, step) for key, value in values.items()]
        if len(self._waiting) > WAITING:
            self._dropped += len(self._waiting) - WAITING
            self._waiting = self._waiting[-WAITING:]
        if time.monotonic() >= self._next_flush or (len(self._waiting) >= BATCH and not self._warned):
            self.flush()

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """A 0/1 metric for every alarm that ever rang, and a tag with its sentence the first time."""
        fresh = [name for name in names if name not in self._ringing]
        if fresh:
            self.tags({f"alarm.{name}": f"from step {step}: {explain(name)}" for name in fresh})
            self._ringing = (*self._ringing, *fresh)
        self.metrics(step, {f"alarm/{name}": float(name in names) for name in self._ringing})

    def final(self, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(key, float(value), now, 0) for key, value in values.items()]
        self._try(lambda: self._client.log_batch(self.run_id, metrics=rows))

    def tags(self, values: Mapping[str, str]) -> None:
        """See :class:`Tracker`."""
        if not values:
            return
        from mlflow.entities import RunTag

        self._try(lambda: self._client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in values.items()]))

    def artifact(self, path: Path, folder: str = "") -> None:
        """See :class:`Tracker`."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        self._try(lambda: log(self.run_id, str(path), folder or None))

    def flush(self) -> None:
        """Hand over the buffer; what a server does not take stays, and is tried again later, ever less often."""
        from mlflow.entities import Metric

        self._next_flush = time.monotonic() + FLUSH_SECONDS
        while self._waiting:
            part = self._waiting[:BATCH]
            rows = [Metric(*row) for row in part]
            if not self._try(lambda rows=rows: self._client.log_batch(self.run_id, metrics=rows)):
                self._pause = min(self._pause * 2, 300.0)
                self._next_flush = time.monotonic() + self._pause
                return
            self._waiting = self._waiting[len(part) :]
            self._pause = FLUSH_SECONDS

    def close(self, status: Status = "FINISHED") -> None:
        """Flush (three tries) and end the run."""
        if self._closed:
            return
        for pause in (0.0, 1.0, 3.0):
            time.sleep(pause if self._waiting else 0.0)
            self.flush()
            if not self._waiting:
                break
        self._try(lambda: self._client.set_terminated(self.run_id, status=status))
        lost = len(self._waiting) + self._dropped
        if lost:
            warnings.warn(
                f"MLflow did not take {lost} metrics of run {self.run_id}; metrics.jsonl in the run folder has them",
                stacklevel=2,
            )
        self._closed = True

    def _try(self, call: Any) -> bool:
        """Whether the call went through. The first failure is warned of; a training never stops because of its log book."""
        try:
            call()
        except Exception as error:
            if not self._warned:
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                warnings.warn(
                    f"MLflow is not answering ({reason}); training goes on, metrics are kept and tried again",
                    stacklevel=2,
                )
            self._warned = True
            return False
        self._warned = False
        return True


def shorten(value: Any, longest: int = LONGEST_VALUE) -> str:
    """A param's value as text: JSON for lists, the middle left out where it is too long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} … {text[-(longest // 4) :]}"


def start(
    client: Any, config: Config, run_folder: Path, uri: str, tags: Mapping[str, str], parent: str | None
) -> MlflowTracker:
    """A new run, with its params and tags."""
    known = {
        "mlflow.user": os.environ.get("USER", "didr"),
        "mlflow.source.name": "didr",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit(),
        "didr.recipe": config.name,
        "didr.algorithm": config.algorithm.name,
        "didr.run_folder": run_folder.name,
    }
    known |= {"mlflow.parentRunId": parent} if parent else {}
    home = experiment(client, config.tracking.experiment, uri, run_folder.parent)
    run = client.create_run(home, run_name=run_folder.name, tags=known | dict(tags))
    tracker = MlflowTracker(client, run.info.run_id)
    tracker.params(dump(config))
    return tracker


def attach(client: Any, run_id: str) -> MlflowTracker:
    """Go on with a run: what it has already is not logged twice.

    Raises:
        DIDRError: the server does not know the run.
    """
    try:
        run = client.get_run(run_id)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise DIDRError(
            f"tracking: MLflow run {run_id!r} is not there ({reason}). Remove mlflow_run_id from run.json to start another."
        ) from error
    client.update_run(run_id, status="RUNNING")
    last = 0
    for key in ("time/step", "loss/generator", next(iter(run.data.metrics), "")):
        if key in run.data.metrics:
            last = max((point.step for point in client.get_metric_history(run_id, key)), default=0)
            break
    return MlflowTracker(client, run_id, last, run.data.params)


def find(client: Any, experiment: str, tags: Mapping[str, str]) -> str | None:
    """Id of the oldest run of the experiment with all ``tags`` and nothing else under ``didr.trial``; None where there is none."""
    home = client.get_experiment_by_name(experiment)
    if home is None:
        return None
    asked = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([home.experiment_id], asked, order_by=["attributes.start_time ASC"])
    same = [run for run in runs if run.data.tags.get("didr.trial") == tags.get("didr.trial")]
    return str(same[0].info.run_id) if same else None


def experiment(client: Any, name: str, uri: str, runs: Path) -> str:
    """Id of the experiment, made when absent. A local database keeps artifacts beside itself, a server decides itself."""
    found = client.get_experiment_by_name(name)
    if found is None:
        where = (Path(runs).expanduser().absolute() / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        try:
            return str(client.create_experiment(name, artifact_location=where))
        except Exception:
            found = client.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise DIDRError(f"tracking.experiment={name!r} was deleted in MLflow; restore it there or choose another name")
    return str(found.experiment_id)


def client(uri: str) -> Any:
    """A quiet client that gives up within seconds rather than minutes."""
    for key, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(key, value)
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DIDRError(
                f"tracking.uri={uri!r}: cannot make the folder {str(database.parent)!r} ({error.strerror})"
            ) from error
        _make_whole(database)
    if uri.startswith("http"):
        _knock(uri)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "alembic.runtime.migration", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def _make_whole(database: Path) -> None:
    """MLflow's tables, made aside and moved into place: a process killed during its migrations leaves no half of a database behind."""
    if database.exists():
        return
    from mlflow import MlflowClient

    part = database.with_name(f".{database.name}.{uuid.uuid4().hex}.part")  # MLflow keeps a store open per name
    try:
        MlflowClient(tracking_uri=f"sqlite:///{part}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # somebody else was quicker: theirs is whole too
            os.link(part, database)
    except OSError:
        os.replace(part, database)  # no hard links here
    finally:
        part.unlink(missing_ok=True)


def _knock(uri: str) -> None:
    """Whether anybody listens: an answer in words, before an HTTP client's page of nested exceptions."""
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise DIDRError(
            f"tracking.uri={uri!r}: nobody answers at {parts.hostname}:{port} ({error.strerror or error}). Start the server, "
            "correct the address, or track nothing with --set tracking.uri=none."
        ) from error
