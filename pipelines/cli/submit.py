"""`didr submit`: a command of `didr` as a job of a Ray cluster, sent from this machine and followed to its end.

    didr submit --address http://HEAD:8265 -- align --recipe sdxl_8gpu --output /mnt/didr/runs/first
    didr submit --stop didr-align-1a2b3c          # lets the step end, with a checkpoint
    didr submit --resume first -- align --output /mnt/didr/runs

A thin layer over Ray's job SDK, for what `ray job submit` leaves to the user: what is sent and what is not, a stop that has time for its
checkpoint, a run folder that outlives the job, the exit code with its reason last.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

COMMANDS = ("align", "sweep", "evaluate")
DASHBOARD = "http://127.0.0.1:8265"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's client looks first, whatever address it is given."""
STOP_WAIT_S = 600
"""Between SIGTERM and SIGKILL of `--stop`; Ray's own 3 s are shorter than a step."""
LEFT_OUT = (
    *("/runs/", "/mlruns/", "/mlartifacts/", "mlflow.db*", ".*_cache/", ".venv*/", "*.egg-info/"),
    *(".env", ".env.*", ".netrc", ".ssh/", ".aws/", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*"),
    *("*auth_token", "credentials", "*credentials*.json", "*secret*.json", "*secret*.y*ml"),
)
"""Beside what `.gitignore` names: outputs, environments, secrets. Patterns as there."""
MADE, BESIDE = ("run.json", "sweep.json", "scores.json"), ("cache", "mlartifacts")
"""Files that tell a run, a sweep and a contest of any name, one folder down; what lies beside them of all together."""


def submit(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND ...", help="align, sweep or evaluate, with its options")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help=f"the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, {DASHBOARD})"),
    ] = None,
    job_id: Annotated[str | None, typer.Option(metavar="NAME", help="of the new job")] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="KEY=VALUE", help="the job's environment; repeatable")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="do not follow the job")] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="go on with a run (or, with `-- sweep`, a sweep) on the cluster's storage"),
    ] = None,
    stop: Annotated[
        str | None, typer.Option(metavar="ID", help="end a job, with a checkpoint, and wait for it")
    ] = None,
) -> None:
    """Send `align`, `sweep` or `evaluate` to a Ray cluster as a job, and follow it: its output, its exit code.

    Example: didr submit --address http://HEAD:8265 -- align --recipe tiny --output /mnt/didr/runs/first
    """
    from didr_core.types import DIDRError

    if stop and (words or resume):
        raise DIDRError("--stop: takes a job's id alone; leave out --resume and the command.")
    if resume:
        words = [*(words or ["align"]), "--resume", resume]
    command = "" if stop else _command(context, words or [])
    with _cluster(address) as client:
        if stop:
            code = _stop(client, stop)
        else:
            name = job_id or f"didr-{(words or [''])[0]}-{secrets.token_hex(3)}"
            job = client.submit_job(entrypoint=command, submission_id=name, runtime_env=_sent(Path.cwd(), env or []))
            _say(f"job {job}; `didr submit --stop {job}` ends it with a checkpoint")
            code = 0 if no_wait else _follow(client, job)
    raise typer.Exit(code)


def _command(context: typer.Context, words: list[str]) -> str:
    """The job's entrypoint, after the checks that need no cluster."""
    from didr_core import config as configs
    from didr_core.config import registry
    from didr_core.train.run_folder import AUTO
    from didr_core.types import DIDRError

    if not words or words[0] not in COMMANDS:
        raise DIDRError(
            f"submit: {words[0] if words else 'nothing'} cannot be sent; expected one of {', '.join(COMMANDS)} after `--`, e.g."
            " `didr submit -- align --recipe tiny --output /mnt/didr/runs/first`."
        )
    name, given = words[0], words[1:]
    group: Any = context.parent.command if context.parent else None
    said = group.commands[name].make_context(name, list(given)).params
    run, folder = said.get("resume"), said.get("out") or said.get("output")
    if not run or not Path(run).is_absolute():
        if run in (None, AUTO) and not (
            folder and Path(said["recipe"]).is_absolute()
        ):  # a path of the cluster's, maybe
            with registry.code_unread():
                config = configs.load(said["recipe"], said["overrides"] or ())
            folder = folder or config.output
        if not Path(folder or "runs").is_absolute() and "://" not in (folder or ""):
            raise DIDRError(
                f"--{'out' if name == 'evaluate' else 'output'} {folder or 'runs'}: a job's working folder is a copy that is thrown away."
                " Give an absolute path on storage that every node sees, e.g. --output /mnt/didr/runs/first."
            )
    return shlex.join(["python", "-m", f"pipelines.{name}", *given])


def _sent(folder: Path, env: list[str]) -> dict[str, Any]:
    """The job's runtime environment: the folder, and our packages where it does not hold them."""
    from didr_core.types import DIDRError
    from pipelines.cluster.session import package_folders

    if folder in (Path.home(), Path("/")):
        raise DIDRError(
            f"submit: the folder {folder} would be sent to the cluster. Go to the folder of your recipes first."
        )
    if wrong := next((item for item in env if "=" not in item), None):
        raise DIDRError(f"--env {wrong}: expected KEY=VALUE")
    made = {path.parent.relative_to(folder) for name in MADE for path in folder.glob(f"*/*/{name}")}
    outputs = {f"/{path}/" for one in made for path in (one, *(one.parent / name for name in BESIDE))}
    variables = dict(item.split("=", 1) for item in env)
    sent: dict[str, Any] = {
        "working_dir": str(folder),
        "excludes": [*LEFT_OUT, *sorted(outputs)],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **variables},
    }
    own = (folder / "pipelines" / "align.py").is_file()
    if not own:
        sent["py_modules"] = [str(path) for path in package_folders()]
    code = "with the code in it" if own else f"and this installation's code ({package_folders()[0].parent})"
    _say(f"sending {folder} {code}, without outputs, environments, secrets and what .gitignore names")
    return sent


@contextmanager
def _cluster(address: str | None) -> Iterator[JobSubmissionClient]:
    """Ray's client, with the token there is; what it raises in words."""
    from didr_core.types import DIDRError
    from pipelines.cluster.session import TOKEN, prepare_environment

    prepare_environment()
    if TOKEN.is_file() or os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    found = address or next((os.environ[key] for key in ADDRESSES if os.environ.get(key)), DASHBOARD)
    for key in ADDRESSES:
        os.environ.pop(key, None)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        yield JobSubmissionClient(found)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise DIDRError(f"the cluster at {found}: {error}") from error


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's output until it ends; returns its exit code, and says last why it is not 0."""
    from aiohttp import ClientError

    shown = 0

    async def tail() -> None:
        nonlocal shown
        at = 0
        async for text in client.tail_job_logs(job):  # from the beginning, each time
            print(text[max(0, shown - at) :], end="", flush=True)
            at += len(text)
            shown = max(shown, at)

    try:
        while True:
            with suppress(RuntimeError, OSError, ClientError):  # a connection that broke
                asyncio.run(tail())
            if (info := client.get_job_info(job)).status.is_terminal():
                break
            time.sleep(0.5)
    except KeyboardInterrupt:
        _say(f"job {job} goes on. `didr submit --stop {job}` ends it, `ray job logs --follow {job}` shows it")
        return 130
    if info.status == "SUCCEEDED":
        return 0
    code = 143 if info.status == "STOPPED" else info.driver_exit_code or 1
    code = code if code > 0 else 128 - code  # a signal ended it
    reason = (info.message or "").strip().splitlines()[-1:] or ["see its log"]
    _say(f"job {job} {info.status.lower()} with exit code {code}: {reason[0]}")
    return code


def _stop(client: JobSubmissionClient, job: str) -> int:
    if not client.stop_job(job):
        _say(f"job {job} had ended before: {client.get_job_status(job).lower()}")
        return 0
    _say(f"stopping job {job}: it ends its step and keeps a checkpoint, for {STOP_WAIT_S} s at most")
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    print("\n".join(client.get_job_logs(job).strip().splitlines()[-3:]))
    _say(f"job {job}: {status.lower()}")
    return 0 if status == "STOPPED" else 1


def _say(text: str) -> None:
    typer.echo(text, err=True)
