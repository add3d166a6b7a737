"""`didr submit` without a cluster: what is sent and what is not, what is refused before anything is sent, how a job's end is told."""

from __future__ import annotations

import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.cli import main as cli
from pipelines.cli import submit

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """Ray's client, as far as it is used; its jobs end as the test says."""

    def __init__(self, status: str = "SUCCEEDED", code: int | None = 0, message: str = "") -> None:
        self.info = SimpleNamespace(status=Status(status), driver_exit_code=code, message=message)
        self.looks: list[Any] = [SimpleNamespace(status=Status("RUNNING")), self.info]
        self.sent: dict[str, Any] = {}
        self.address = ""

    def __call__(self, address: str) -> Client:
        self.address = address
        return self

    def submit_job(self, **sent: Any) -> str:
        self.sent = sent
        return str(sent["submission_id"])

    def get_job_info(self, job: str) -> Any:
        return self.looks.pop(0)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        yield "error: the reason\n"


class Status(str):
    def is_terminal(self) -> bool:
        return self != "RUNNING"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Client:
    made = Client()
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", made)
    monkeypatch.setattr("pipelines.cluster.session.TOKEN", tmp_path / "no-token")
    for key in (*submit.ADDRESSES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def didr(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", *words])
    return int(ended.value.code or 0)


ALIGN = ("--", "align", "--recipe", "tiny", "--output", "/mnt/didr/runs/it's mine")


def test_a_job_s_words_environment_and_output(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert didr("--job-id", "mine", "--env", "MLFLOW_TRACKING_URI=http://x", *ALIGN) == 0
    assert client.sent["entrypoint"] == (
        "python -m pipelines.align --recipe tiny --output '/mnt/didr/runs/it'\"'\"'s mine'"
    )
    sent = client.sent["runtime_env"]
    assert sent["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "MLFLOW_TRACKING_URI": "http://x"}
    assert [Path(path).name for path in sent["py_modules"]] == ["didr_core", "pipelines", "tune_spaces"]
    out = capsys.readouterr()
    assert out.out == "one\nerror: the reason\n" and "`didr submit --stop mine`" in out.err
    assert client.address == submit.DASHBOARD


@pytest.mark.parametrize(
    ("client_args", "code", "last"),
    [
        (
            ("FAILED", 3, "Job entrypoint command failed:\none\nerror: the reason\n"),
            3,
            "exit code 3: error: the reason",
        ),
        (("FAILED", -9, ""), 137, "exit code 137: see its log"),
        (("FAILED", None, "runtime_env setup failed"), 1, "exit code 1: runtime_env setup failed"),
        (("STOPPED", None, None), 143, "stopped with exit code 143: see its log"),
    ],
)
def test_the_exit_code_is_the_job_s_and_the_reason_comes_last(
    client: Client, capsys: pytest.CaptureFixture[str], client_args: tuple[Any, ...], code: int, last: str
) -> None:
    client.looks[1] = Client(*client_args).info
    assert didr(*ALIGN) == code
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(last)


def test_output_is_told_once_where_the_connection_breaks(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def breaks(job: str) -> AsyncIterator[str]:
        nonlocal calls
        calls += 1
        yield "one\n"
        if calls == 1:
            raise RuntimeError("closed")
        yield "two\n"

    monkeypatch.setattr(client, "tail_job_logs", breaks)
    assert didr(*ALIGN) == 0 and calls == 2
    assert capsys.readouterr().out == "one\ntwo\n"


def test_the_token_is_passed_on_and_the_address_given_counts(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert didr("--no-wait", *ALIGN) == 0
    assert client.address == "http://other:8265" and "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert didr("--no-wait", "--address", "http://mine:8265", *ALIGN) == 0
    assert client.address == "http://mine:8265" and "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.delenv("RAY_AUTH_MODE")


def test_a_run_on_the_cluster_s_storage_goes_on(client: Client) -> None:
    assert didr("--resume", "/mnt/didr/runs/first") == 0
    assert client.sent["entrypoint"] == "python -m pipelines.align --resume /mnt/didr/runs/first"
    client.looks = [client.info]  # one that has ended before it is looked at: its output is told all the same
    assert didr("--resume", "first", "--", "sweep", "--output", "/mnt/didr/runs") == 0
    assert client.sent["entrypoint"] == "python -m pipelines.sweep --output /mnt/didr/runs --resume first"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Usage"),
        (("--", "doctor"), "doctor cannot be sent; expected one of align, sweep, evaluate"),
        (("--", "align", "--recipe", "tiny"), "--output runs: a job's working folder is a copy that is thrown away"),
        (("--", "evaluate", "-m", "start", "--out", "here"), "--out here: a job's working folder is a copy"),
        (("--resume", "first"), "--output runs: a job's working folder"),
        (("--", "align", "--set", "drp.beta=-1", "--output", "/x"), "recipe 'tiny': drp.beta"),
        (("--", "align", "--stepz", "3"), "No such option: --stepz"),
        (("--env", "X", *ALIGN), "--env X: expected KEY=VALUE"),
        (("--stop", "id", *ALIGN), "--stop: takes a job's id alone"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    client: Client, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code = didr(*words)
    out = capsys.readouterr()
    assert said in out.out + out.err and not client.sent
    assert code in ((0, 2) if not words else (1, 2))


def test_the_home_folder_is_not_sent(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", Path.cwd)
    assert didr(*ALIGN) == 1 and "would be sent to the cluster" in capsys.readouterr().err and not client.sent


def test_outputs_environments_and_secrets_stay_here(client: Client, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    here = Path.cwd()
    stays = (
        "runs/a/run.json", "mine/b/run.json", "mine/s/sweep.json", "mine/s/trials/0/x", "mine/cache/x",
        "mlflow.db", ".venv/bin/python", ".env", ".env.local", "keys/id.pem", "host.key",
        "auth_token", "gcp-credentials.json", "ignored.txt", ".git/config", ".ssh/id_ed25519", ".aws/credentials", ".netrc",
    )  # fmt: skip
    goes = (
        "mine.yaml",
        "mine/recipe.yaml",
        "reward.py",
        "prompts/a.txt",
        "data/run.json",
        ".gitignore",
        "keyboard.py",
        "tokens.py",
    )
    for name in (*stays, *goes):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("ignored.txt\n")
    assert didr(*ALIGN) == 0
    sent = client.sent["runtime_env"]
    from ray._private.ray_constants import get_runtime_env_default_excludes

    excludes = [*get_runtime_env_default_excludes(), *sent["excludes"]]
    create_package(sent["working_dir"], tmp_path / "sent.zip", include_gitignore=True, excludes=excludes)
    names = {name for name in zipfile.ZipFile(tmp_path / "sent.zip").namelist() if not name.endswith("/")}
    assert names == set(goes)


def test_a_clone_brings_its_own_code(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert didr("--no-wait", *ALIGN) == 0
    sent = client.sent["runtime_env"]
    assert sent["working_dir"] == str(ROOT) and "py_modules" not in sent
