"""MLflow: one run whatever happens to workers, params once, hiccups survived, wrong addresses refused at once."""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from didr_core import config as configs
from didr_core.config import Config, Tracking
from didr_core.export.folder import public_config
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError
from pipelines.report.page import write_report
from pipelines.tracking import tracker as tracking
from pipelines.tracking.address import _schemas, look, resolve
from pipelines.tracking.tracker import MlflowTracker, Tracker, open_tracker, page_of, preflight, shorten

pytest.importorskip("mlflow")
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with its database made (the dear part)."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    preflight(Tracking(), folder)
    return folder


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def config() -> Config:
    return configs.load("tiny")


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    return tracking.connect(resolve(Tracking(), runs))


def steps_of(client: MlflowClient, run_id: str, key: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, key)]


def test_a_run_holds_params_metrics_artifacts_tags_and_its_end(
    runs: Path, config: Config, client: MlflowClient
) -> None:
    (runs / "a").mkdir()
    (runs / "a" / "report.html").write_text("<p>hello")
    (runs / "a" / "grids").mkdir()
    (runs / "a" / "grids" / "one.png").write_bytes(b"png")
    with open_tracker(config, runs / "a", tags={"note": "mine"}, parent="f" * 32) as tracker:
        assert tracker.run_id
        for step in range(1, 31):
            tracker.metrics(step, {"reward/gain": step / 10, "loss/generator": 1.0, "time/step": 0.1})
        tracker.alarms(30, ["drs-silent"])
        tracker.artifact(runs / "a" / "report.html")
        tracker.artifact(runs / "a" / "grids", "grids")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "a"
    assert run.data.params["drp.beta"] == str(config.drp.beta) and run.data.params["backbone.name"] == "sdxl"
    assert len(run.data.params) == len(configs.flatten(configs.dump(config)))
    assert run.data.metrics["reward/gain"] == 3.0 and run.data.metrics["alarm/drs-silent"] == 1.0
    assert steps_of(client, tracker.run_id, "reward/gain") == list(range(1, 31))
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == "f" * 32 and tags["note"] == "mine" and tags["didr.recipe"] == "tiny"
    assert "from step 30" in tags["alarm.drs-silent"]
    page = f"#/experiments/{run.info.experiment_id}/runs/{tracker.run_id}/model-metrics?workflowType=machine_learning"
    assert (
        tracker.page
        == f"http://127.0.0.1:5000/{page} after `mlflow ui --backend-store-uri sqlite:///{runs / 'mlflow.db'}`"
    )
    where = page_of("https://me:secret@host:5000/track/", run.info.experiment_id, tracker.run_id)
    assert where == f"https://host:5000/track/{page}"
    kept = {
        p.relative_to(runs / "mlartifacts" / tracker.run_id / "artifacts") for p in (runs / "mlartifacts").rglob("*.*")
    }
    assert {Path("report.html"), Path("grids/one.png")} <= kept, "artifacts lie beside the database"


def test_a_restarted_worker_stays_in_the_run_and_repeats_nothing(
    runs: Path, config: Config, client: MlflowClient
) -> None:
    first = open_tracker(config, runs / "b")
    assert first.run_id
    for step in range(1, 21):
        first.metrics(step, {"loss/generator": float(step), "time/step": 0.1})
    first.close("FAILED")
    assert client.get_run(first.run_id).info.status == "FAILED"
    longer = configs.load("tiny", ["train.steps=999"])
    second = open_tracker(longer, runs / "b", run_id=first.run_id)
    assert (second.run_id, second.page) == (first.run_id, first.page) and client.get_run(
        first.run_id
    ).info.status == "RUNNING"
    for step in range(11, 31):  # goes on from the checkpoint of step 10
        second.metrics(step, {"loss/generator": float(step), "time/step": 0.1})
    second.close()
    run = client.get_run(first.run_id)
    assert steps_of(client, first.run_id, "loss/generator") == list(range(1, 31))
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == str(config.train.steps), "params stay what the run began with"
    assert run.data.tags["didr.changed_params"] == "train.steps"
    with pytest.raises(DIDRError, match=r"'0{32}' is not there"):
        open_tracker(config, runs / "b", run_id="0" * 32)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "KILLED"), (ValueError("x"), "FAILED")])
def test_how_a_run_ends_is_told(
    runs: Path, config: Config, client: MlflowClient, error: BaseException, status: str
) -> None:
    tracker = open_tracker(config, runs / f"c-{status}")
    with pytest.raises(type(error)), tracker:
        raise error
    assert tracker.run_id and client.get_run(tracker.run_id).info.status == status


class Flaky:
    """A server that is away for a while."""

    def __init__(self) -> None:
        self.away, self.reason = False, "server away\nlong traceback"
        self.batches: list[list[Any]] = []
        self.ended = ""

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        if self.away:
            raise ConnectionError(self.reason)
        self.batches.append([(m.key, m.step) for m in metrics])

    def log_artifact(self, *_: Any) -> None:
        self.log_batch("")

    log_artifacts = log_artifact

    def set_terminated(self, run_id: str, status: str) -> None:
        self.log_batch("")
        self.ended = status


def test_a_hiccup_never_stops_a_training_and_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.0)
    server = Flaky()
    tracker = MlflowTracker(server, "run")
    tracker.metrics(1, {"a": 1.0})
    server.away = True
    with pytest.warns(UserWarning, match="server away") as told:
        for step in range(2, 50):
            tracker.metrics(step, {"a": 1.0})
        tracker.artifact(tmp_path)
        tracker.tags({"x": "y"})
    assert len(told) == 1, "warned once, not at every step"
    server.away = False
    tracker.close()
    assert [step for batch in server.batches for _, step in batch] == list(range(1, 50)), "all of them, in order, once"
    assert server.ended == "FINISHED"


def test_a_server_that_never_comes_back_costs_seconds_and_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.time, "sleep", lambda _: None)
    server = Flaky()
    server.away = True
    tracker = MlflowTracker(server, "run")
    tracker.metrics(1, {"a": 1.0, "b": 2.0})
    with pytest.warns(UserWarning, match="did not take 2 metrics"), pytest.warns(UserWarning, match="server away"):
        tracker.close("FAILED")
    tracker.close()
    tracker.metrics(2, {"a": 1.0})


def test_steps_are_sent_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Flaky()
    tracker = MlflowTracker(server, "run")
    for step in range(1, 1001):
        tracker.metrics(step, {"a": 1.0, "b": 1.0})
    tracker.close()
    sizes = [len(b) for b in server.batches if b]
    assert sum(sizes) == 2000 and max(sizes) <= 1000 and len(sizes) <= 4


def test_a_wrong_address_is_refused_within_seconds(runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        port = taken.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(DIDRError, match=f"nobody answers at 127.0.0.1:{port}.*tracking.uri=none"):
            preflight(Tracking(uri=f"http://127.0.0.1:{port}"), runs)
        assert time.monotonic() - began < 10
    for uri in ("file:///somewhere", "runs/mlflow.db", "ftp://x"):
        with pytest.raises(DIDRError, match=r"tracking\.uri=.*sqlite:///"):
            preflight(Tracking(uri=uri), runs)


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/null")
def test_a_database_that_cannot_be_made_is_refused(runs: Path) -> None:
    with pytest.raises(DIDRError, match="tracking.uri"):
        preflight(Tracking(uri="sqlite:////dev/null/x/mlflow.db"), runs)


def test_a_deleted_experiment_is_named(runs: Path, client: MlflowClient) -> None:
    made = client.create_experiment("gone")
    client.delete_experiment(made)
    with pytest.raises(DIDRError, match="'gone' was deleted"):
        preflight(Tracking(experiment="gone"), runs)


def test_who_does_not_track_is_silent(config: Config, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = open_tracker(config.model_copy(update={"tracking": Tracking(uri="none")}), tmp_path / "x")
        assert type(tracker) is Tracker and tracker.run_id is None
        tracker.metrics(1, {"a": 1.0})
        tracker.close()
    assert list(tmp_path.iterdir()) == [], "not even a database"
    assert preflight(Tracking(uri="none"), tmp_path) == "none"


def test_long_values_keep_both_ends() -> None:
    text = shorten("a" * 400 + "b" * 400)
    assert len(text) <= 500 and text.startswith("aaa") and text.endswith("bbb") and "…" in text
    assert shorten([1, 2]) == "[1, 2]" and shorten("x") == "x" and shorten(None) == "null"


def test_mlflow_is_imported_only_when_it_is_used() -> None:
    """It takes seconds; `didr config show` and every worker import pipelines.tracking.tracker."""
    assert not re.search(r"^(import|from) .*mlflow", Path(tracking.__file__).read_text(), re.MULTILINE)


def test_a_database_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while MLflow makes its tables: the next process starts from nothing, not from half of them."""

    def killed(self: object, **_: object) -> None:
        raise KeyboardInterrupt

    database = tmp_path / "mlflow.db"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "search_experiments", killed)
        tracking.connect(f"sqlite:///{database}")
    assert list(tmp_path.iterdir()) == []
    assert tracking.connect(f"sqlite:///{database}").search_experiments()
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]


SECRET = "http://anna:s3cr3t/p@w@localhost"


def test_a_password_in_an_address_is_written_nowhere(
    runs: Path, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.load("tiny", [f"tracking.uri={SECRET}"])
    run = RunFolder.create(config, str(tmp_path / "run"), f"didr align --set tracking.uri={SECRET}")
    run.update(message=f"nobody at {SECRET}")
    write_report(run.path)
    with open_tracker(config, run.path, uri=resolve(Tracking(), runs)) as tracker:
        assert tracker.run_id
    shown = [p.read_text() for p in run.path.iterdir() if p.suffix in (".yaml", ".json", ".html")]
    shown += [str(client.get_run(tracker.run_id).data.params), str(public_config(config))]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://anna:s3cr3t@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(DIDRError, match=r"tracking.uri='http://\*\*\*@127") as refused:
            preflight(Tracking(uri=address), runs)
        shown.append(str(refused.value))
    server = Flaky()
    server.away, server.reason = True, f"cannot reach {SECRET}/api"
    with pytest.warns(UserWarning, match="not answering") as told:
        MlflowTracker(server, "run").tags({"a": "b"})
    shown.append(str(told[0].message))
    with pytest.raises(DIDRError) as mistyped:
        configs.load("tiny", [f"tracking.url={SECRET}"])
    shown.append(str(mistyped.value))
    assert len(shown) == 8 and not [text for text in shown if "s3cr3t" in text or "p@w" in text]
    assert "tracking" not in public_config(config)

    kept = run.config().tracking  # a resume: the password comes from outside, or is asked for
    with pytest.raises(DIDRError, match="MLFLOW_TRACKING_URI"):
        resolve(kept, runs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    assert resolve(kept, runs) == SECRET


def test_the_environment_names_the_server_where_the_config_does_not(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.internal:5000")
    assert resolve(Tracking(), runs) == "http://mlflow.internal:5000"
    assert resolve(Tracking(uri="none"), runs) == "none"
    assert resolve(Tracking(uri="sqlite:///mine.db"), runs) == "sqlite:///mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://x")
    with pytest.raises(DIDRError, match="'ftp://x': expected"):
        resolve(Tracking(), runs)


def test_a_deleted_run_is_named_with_its_mending(runs: Path, config: Config, client: MlflowClient) -> None:
    tracker = open_tracker(config, runs / "deleted")
    tracker.close()
    assert tracker.run_id
    client.delete_run(tracker.run_id)
    with pytest.raises(
        DIDRError, match=f"was deleted.*mlflow runs restore --run-id {tracker.run_id}.*run.json"
    ) as told:
        open_tracker(config, runs / "deleted", run_id=tracker.run_id)
    assert "\n" not in str(told.value)
    client.restore_run(tracker.run_id)
    assert open_tracker(config, runs / "deleted", run_id=tracker.run_id).run_id == tracker.run_id


@pytest.mark.parametrize("revision", ["451aebb31d03", "from_the_future"])
def test_a_database_of_another_schema_is_named_with_its_mending(runs: Path, tmp_path: Path, revision: str) -> None:
    database = tmp_path / f"{revision}.db"  # MLflow keeps a store open per name
    database.write_bytes((runs / "mlflow.db").read_bytes())
    with sqlite3.connect(database) as tables:
        tables.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(DIDRError, match=f"run `mlflow db upgrade sqlite:///{database}`") as told:
        preflight(Tracking(uri=f"sqlite:///{database}"), tmp_path)
    assert "\n" not in str(told.value)
    with pytest.raises(DIDRError, match=f"its schema is {revision}.*mlflow db upgrade sqlite:///{database}"):
        look(Tracking(uri=f"sqlite:///{database}"), tmp_path)


def test_a_look_takes_what_this_mlflow_wrote_and_no_other_file(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight(Tracking(), runs)
    assert look(Tracking(), runs) == f"sqlite:///{runs / 'mlflow.db'}" and len(_schemas()) == 1
    (tmp_path / "note.db").write_text("no database")
    with pytest.raises(DIDRError, match=r"note.db': cannot be used as MLflow's database \(file is not a database\)"):
        look(Tracking(uri=f"sqlite:///{tmp_path}/note.db"), runs)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert look(Tracking(uri="sqlite:///~/x.db"), runs) == f"sqlite:///{tmp_path}/x.db"


def test_a_fresh_database_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where MLflow was imported before, as talkative as it comes."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        preflight(Tracking(), tmp_path)
    assert capfd.readouterr() == ("", "") and caplog.text == ""


def test_runs_can_be_ranked_and_the_model_is_kept_once(
    runs: Path, config: Config, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    (tmp_path / "unet").mkdir()
    (tmp_path / "README.md").write_text("# card")
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"w")
    (runs / "ranked").mkdir()
    first = open_tracker(config, runs / "ranked")
    first.metrics(1, {"reward/gain": 1.0})
    first.final({"score/aligned/judge": 1.5})
    first.model(tmp_path, weights=False)
    while "system/cpu_utilization_percentage" not in client.get_run(str(first.run_id)).data.metrics:
        time.sleep(0.1)  # another thread's
    first.close()
    with open_tracker(config, runs / "ranked", run_id=first.run_id) as again:
        again.model(tmp_path, weights=True)
    run = client.get_run(str(first.run_id))
    assert run.data.metrics["score/aligned/judge"] == 1.5
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0 and steps_of(
        client, first.run_id, "reward/gain"
    ) == [1]
    home = client.get_experiment(run.info.experiment_id)
    assert home.tags["mlflow.experimentKind"] == "custom_model_development"
    (output,) = run.outputs.model_outputs
    assert output.step == 1
    model = client.get_logged_model(output.model_id)
    assert model.name == "ranked" and model.tags["didr.recipe"] == "tiny" and model.source_run_id == first.run_id
    kept = {path.name for path in Path(model.artifact_location.removeprefix("file://")).rglob("*.*")}
    assert kept == {"README.md", "config.json"}
