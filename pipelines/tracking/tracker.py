"""Where a run's numbers go besides its own folder: MLflow, or nowhere.

Only the driver tracks. The MLflow run id is kept by the caller (run.json): a resumed run hands it back and stays in the same MLflow
run, and steps that this has already are not logged twice. A tracking server that cannot be reached fails :func:`preflight`, before
anything starts; one that goes away later never stops a training: metrics wait in memory, one warning is printed, and metrics.jsonl has
them all.

MLflow is spoken to through its client alone (no global active run), and imported where it is used: that takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from didr_core.config import Config, Tracking, dump, flatten, redacted
from didr_core.config.files import expanded
from didr_core.config.limits import Limits
from didr_core.config.passwords import HIDDEN
from didr_core.config.provenance import commit
from didr_core.train.alarms import explain
from didr_core.types import DIDRError
from pipelines.tracking.address import knock, look_beside, reason, resolve, unusable
from pipelines.tracking.base import Several, Status, Tracker
from pipelines.tracking.others import open_others

FLUSH_SECONDS, LONGEST_PAUSE = 10.0, 300.0
LONGEST_VALUE = 500  # characters of a param; MLflow itself stops at 6,000
BATCH = 900  # metrics a log_batch; MLflow stops at 1,000
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow opens on its view of trainings
WAITING = 100_000  # metrics kept in memory while a server is away
SETTINGS = {  # of MLflow: quiet, and giving up within seconds rather than minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
}


class MlflowTracker(Tracker):
    """One MLflow run. Metrics wait and go in batches; those that a server does not take stay, and are tried again: MLflow's own
    asynchronous logging drops a batch that fails."""

    title = "MLflow"

    def __init__(self, client: Any, run_id: str, last_step: int = 0, params: Mapping[str, str] | None = None) -> None:
        from mlflow import entities

        self._entities = entities
        self.run_id: str = run_id
        self._client = client
        self._last_step = last_step  # that the run had before
        self._newest = last_step
        self._params = params or {}
        self._waiting: list[tuple[str, float, int, int]] = []  # key, value, milliseconds, step
        self._untaken = 0  # those that waited too long among them
        self._pause = FLUSH_SECONDS
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._ringing: tuple[str, ...] = ()
        self.limits: Limits | None = None
        self._closed = False
        self._monitor: Any = None

    def params(self, tree: Mapping[str, Any]) -> None:
        """Log what the run does not have yet; a resumed run keeps the params it began with and is tagged when they differ."""
        flat = {key: shorten(value) for key, value in flatten(tree).items()}
        fresh = [self._entities.Param(key, value) for key, value in flat.items() if key not in self._params]
        changed = sorted(key for key, value in flat.items() if self._params.get(key, value) != value)
        if fresh:
            self._try(self._client.log_batch, self.run_id, params=fresh)
        if changed:
            self.tags({"didr.changed_params": shorten(", ".join(changed))})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One step's numbers; a step that the run already has (before a crash) is skipped."""
        self._newest = max(self._newest, step)
        if step > self._last_step and not self._closed:
            self._wait(step, values)
            if time.monotonic() >= self._next_flush:
                self.flush()

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """A 0/1 metric for every alarm that ever rang, and a tag with its sentence the first time."""
        fresh = [name for name in names if name not in self._ringing]
        self.tags({f"alarm.{name}": f"from step {step}: {explain(name, self.limits)}" for name in fresh})
        self._ringing = (*self._ringing, *fresh)
        self.metrics(step, {f"alarm/{name}": float(name in names) for name in self._ringing})

    def final(self, values: Mapping[str, float]) -> None:
        self._wait(0, values)
        self.flush()

    def tags(self, values: Mapping[str, str]) -> None:
        rows = [self._entities.RunTag(key, str(value)) for key, value in values.items()]
        if rows:
            self._try(self._client.log_batch, self.run_id, tags=rows)

    def artifact(self, path: Path, folder: str = "") -> None:
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        self._try(log, self.run_id, str(path), folder or None)

    def model(self, export: Path, weights: bool) -> None:
        """As a logged model of the run, once: its card and configs, and with ``weights`` all of it."""
        with tempfile.TemporaryDirectory() as folder:
            if not weights:
                for path in (p for p in export.rglob("*") if p.suffix in (".md", ".json", ".yaml", ".txt")):
                    kept = Path(folder) / path.relative_to(export)
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, kept)
            self._try(self._log_model, export if weights else Path(folder))

    def _log_model(self, files: Path) -> None:
        run = self._client.get_run(self.run_id)
        if run.outputs and run.outputs.model_outputs:
            return
        name, home = re.sub(r"[/:.%\"']", "-", run.info.run_name), run.info.experiment_id
        tags = {key: value for key, value in run.data.tags.items() if key.startswith("didr.")}
        model = self._client.create_logged_model(home, name, self.run_id, tags, model_type="text-to-image")
        self._client.log_model_artifacts(model.model_id, str(files))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [self._entities.LoggedModelOutput(model.model_id, step=self._newest)])

    def watch_machine(self, uri: str) -> None:
        """Log CPU, memory and GPU use of this machine every ten seconds, until the run ends."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
        self._monitor.start()

    def status(self, status: Status) -> None:
        self._try(self._client.set_terminated, self.run_id, status=status)

    def close(self, status: Status = "FINISHED") -> None:
        """What waits is tried three times."""
        if self._closed:
            return
        if self._monitor:
            self._monitor.finish()
        for pause in (0.0, 1.0, 3.0):
            time.sleep(pause)
            if self.flush():
                break
        self.status(status)
        if self._untaken:
            warnings.warn(
                f"MLflow did not take {self._untaken} metrics of run {self.run_id}; metrics.jsonl in the run folder has them",
                stacklevel=2,
            )
        self._closed = True

    def flush(self) -> bool:
        """Whether the server took all that waits. While it does not, it is asked ever less often."""
        taken = True
        while self._waiting and taken:
            rows = [self._entities.Metric(*row) for row in self._waiting[:BATCH]]
            taken = self._try(self._client.log_batch, self.run_id, metrics=rows)
            if taken:
                self._untaken -= len(rows)
                del self._waiting[: len(rows)]
        self._pause = FLUSH_SECONDS if taken else min(self._pause * 2, LONGEST_PAUSE)
        self._next_flush = time.monotonic() + self._pause
        return taken

    def _wait(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [(key, float(value), now, step) for key, value in values.items()]
        del self._waiting[:-WAITING]
        self._untaken += len(values)


def preflight(tracking: Tracking, runs: Path) -> str:
    """The resolved URI, after asking it one question.

    Raises:
        DIDRError: wrong scheme, unreachable server, folder that cannot be written, deleted experiment.
    """
    look_beside(tracking)
    uri = resolve(tracking, runs)
    if uri != "none":
        try:
            _experiment(connect(uri), tracking.experiment, uri, runs)
        except DIDRError:
            raise
        except Exception as error:
            raise unusable(uri, f"cannot be used ({reason(error)})") from error
    return uri


def find_run(tracking: Tracking, uri: str, tags: Mapping[str, str]) -> str | None:
    """Id of the oldest MLflow run with all ``tags`` and nothing else under ``didr.trial``; None where there is none.

    For those who may have died between starting a run and noting its id.
    """
    if uri == "none":
        return None
    client = connect(uri)
    home = client.get_experiment_by_name(tracking.experiment)
    if home is None:
        return None
    asked = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([home.experiment_id], asked, order_by=["attributes.start_time ASC"])
    same = (str(run.info.run_id) for run in runs if run.data.tags.get("didr.trial") == tags.get("didr.trial"))
    return next(same, None)


def open_tracker(
    config: Config,
    run_folder: Path,
    *,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    uri: str | None = None,
) -> Tracker:
    """The tracker of a run; metrics.jsonl is :class:`didr_core.train.run_folder.RunFolder`'s own.

    Args:
        run_folder: gives the run its name; the default MLflow database lies beside it.
        run_id: the MLflow run to go on with; None starts one.
        tags: more tags. parent: MLflow run id of a sweep.
        uri: what :func:`preflight` returned; resolved from the config otherwise.

    Raises:
        DIDRError: the server does not know ``run_id``.
    """
    first = _open_mlflow(config, run_folder, run_id, tags, parent, uri or resolve(config.tracking, run_folder.parent))
    others = open_others(config, run_folder, group=(tags or {}).get("didr.sweep", ""))
    return Several([first, *others]) if others else first


def _open_mlflow(
    config: Config, run_folder: Path, run_id: str | None, tags: Mapping[str, str] | None, parent: str | None, uri: str
) -> Tracker:
    if uri == "none":
        return Tracker()
    client = connect(uri)
    if run_id is not None:
        tracker = _attach(client, run_id)
        tracker.tags(tags or {})
    else:
        known = {
            "mlflow.user": os.environ.get("USER", "didr"),
            "mlflow.source.name": "didr",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": commit(),
            "didr.recipe": config.name,
            "didr.algorithm": config.algorithm.name,
            "didr.run_folder": run_folder.name,
            **({"mlflow.parentRunId": parent} if parent else {}),
            **(tags or {}),
        }
        home = _experiment(client, config.tracking.experiment, uri, run_folder.parent)
        run = client.create_run(home, run_name=run_folder.name, tags=known)
        tracker = MlflowTracker(client, run.info.run_id)
    tracker.params(dump(config))
    tracker.page = page_of(uri, client.get_run(tracker.run_id).info.experiment_id, tracker.run_id)
    tracker.limits = config.alarms
    if config.tracking.system and not parent:
        tracker.watch_machine(uri)
    return tracker


def page_of(uri: str, experiment: str, run_id: str) -> str:
    """Where a browser shows a run's metrics, in MLflow's view of trainings: an address without ``workflowType`` opens that of language
    models, whatever the experiment's kind."""
    page = f"#/experiments/{experiment}/runs/{run_id}/model-metrics?workflowType=machine_learning"
    address = redacted(uri)
    if address.startswith("http"):
        return f"{address.replace(f'{HIDDEN}@', '').rstrip('/')}/{page}"
    return f"http://127.0.0.1:5000/{page} after `mlflow ui --backend-store-uri {address}`"


def connect(uri: str) -> Any:
    """A quiet MLflow client, with its database made or its server asked whether it is there.

    Raises:
        DIDRError: nobody answers at the address.
        OSError: the folder of the database cannot be made.
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    if uri.startswith("http"):
        knock(uri)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "alembic.runtime.migration", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///"):
        _make_whole(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    return MlflowClient(tracking_uri=uri)


def shorten(value: Any, longest: int = LONGEST_VALUE) -> str:
    """A param's value as text: JSON for lists, the middle left out where it is too long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} … {text[-(longest // 4) :]}"


def _attach(client: Any, run_id: str) -> MlflowTracker:
    """Go on with a run, from the last step that it has."""
    another = "or remove mlflow_run_id from run.json (a sweep's: mlflow from sweep.json) to start another."
    try:
        run = client.get_run(run_id)
    except Exception as error:
        raise DIDRError(
            f"tracking: MLflow run {run_id!r} is not there ({reason(error)}). Set tracking.uri to where it is, {another}"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise DIDRError(
            f"tracking: MLflow run {run_id!r} was deleted. Restore it with `mlflow runs restore --run-id {run_id}`, {another}"
        )
    client.update_run(run_id, status="RUNNING")
    key = next((key for key in ("time/step", "loss/generator", *run.data.metrics) if key in run.data.metrics), None)
    history = client.get_metric_history(run_id, key) if key else []
    return MlflowTracker(client, run_id, max((point.step for point in history), default=0), run.data.params)


def _experiment(client: Any, name: str, uri: str, runs: Path) -> str:
    """Id of the experiment, made when absent. A local database keeps artifacts beside itself, a server decides itself."""
    found = client.get_experiment_by_name(name)
    if found is None:
        where = (expanded(runs).absolute() / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        try:
            return str(client.create_experiment(name, artifact_location=where, tags=KIND))
        except Exception:
            found = client.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise DIDRError(f"tracking.experiment={name!r} was deleted in MLflow; restore it there or choose another name")
    if not KIND.keys() & found.tags.keys():
        for key, value in KIND.items():
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def _make_whole(database: Path) -> None:
    """MLflow's tables, made aside and moved into place: a process killed during its migrations leaves no half of a database behind."""
    if database.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    part = database.with_name(f".{database.name}.{uuid.uuid4().hex}.part")  # MLflow keeps a store open per name
    try:
        MlflowClient(tracking_uri=f"sqlite:///{part}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # somebody else was quicker: theirs is whole too
            os.link(part, database)
    except OSError:
        os.replace(part, database)  # no hard links here
    finally:
        part.unlink(missing_ok=True)
