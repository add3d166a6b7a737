"""A Ray head of our own for tests: free ports, its own token and temporary folder, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 240.0
PORTS = range(20_000, 30_000)  # above Ray's own worker ports, below the ports the system hands out


@dataclass(frozen=True)
class Head:
    """A running head: what a client needs to talk to it."""

    address: str
    dashboard: str
    env: dict[str, str]

    def submit(self, folder: Path, *command: str, timeout: float = 1200.0) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir FOLDER -- COMMAND`, as docs/cluster.md says it."""
        line = ["ray", "job", "submit", "--address", self.dashboard, "--working-dir", str(folder), "--", *command]
        return subprocess.run(line, env=self.env, capture_output=True, text=True, timeout=timeout)

    def didr(self, folder: Path, code: Path, *words: str, timeout: float = 1200.0) -> subprocess.CompletedProcess[str]:
        """`didr WORDS` in ``folder`` by the packages in ``code``."""
        line = [sys.executable, "-m", "pipelines.cli.main", *words]
        env = self.env | {"PYTHONPATH": str(code)}
        return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now. All are held open until the last is found, so that they differ."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = secrets.choice(PORTS)
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                found.append(port)
        return found


@contextlib.contextmanager
def ray_head(*options: str) -> Iterator[Head]:
    """`ray start --head --block` in a process group of its own, until the block ends."""
    with tempfile.TemporaryDirectory(
        prefix="didr-", ignore_cleanup_errors=True
    ) as folder:  # short: Ray puts Unix sockets in it
        gcs, dashboard, client, listen, grpc, metrics, environment = free_ports(7)
        bin_folder = str(Path(sys.executable).parent)
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",  # the job's `python` is this one
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # not the user's ~/.ray/auth_token
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(START_S)),
            "RAY_raylet_start_wait_time_s": str(int(START_S)),
        }
        # The agents' ports are given because Ray waits only 15 s for those it has to find out, too little on a busy machine.
        command = f"""ray start --head --block --port={gcs} --dashboard-port={dashboard} --ray-client-server-port={client}
            --dashboard-agent-listen-port={listen} --dashboard-agent-grpc-port={grpc} --metrics-export-port={metrics}
            --runtime-env-agent-port={environment} --min-worker-port=0 --max-worker-port=0 --temp-dir={folder}""".split()
        with open(Path(folder) / "head.log", "w+") as log:
            process = subprocess.Popen(
                [*command, *options], env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                _wait(process, f"http://127.0.0.1:{dashboard}", Path(log.name))
                yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", env)
            finally:
                _stop(process, env["RAY_AUTH_TOKEN"])


def _wait(process: subprocess.Popen[bytes], dashboard: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{dashboard}/api/version", timeout=5):
                pass
        except urllib.error.HTTPError:  # it answers, and wants the token
            pass
        except OSError:
            time.sleep(0.5)
            continue
        if "runtime started" in log.read_text():
            return
        time.sleep(0.5)
    raise RuntimeError(f"the head did not start:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen[bytes], token: str) -> None:
    """End the head and all it started: those of its processes that outlive it are known by the token in their environment."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    family = [p for p in psutil.process_iter() if _token_of(p) == token]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=15)
    process.wait()


def _token_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RAY_AUTH_TOKEN")
    except (psutil.Error, OSError):
        return None
