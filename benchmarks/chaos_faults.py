"""The faults of `benchmarks.chaos`: what each does to a run, and what the run must do then: go on, or end with the right words."""

from __future__ import annotations

import os
import random
import signal
import socket
import socketserver
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from benchmarks.machine import name_of
from didr_core.train.run_folder import RunFolder


class Scene(Protocol):
    """What a fault may touch: the run, the process of `didr align`, the files around it."""

    run: RunFolder
    folder: Path
    process: subprocess.Popen[bytes]
    rng: random.Random
    door: Door | None


@dataclass(frozen=True)
class Kind:
    """One kind of fault, in runs of ``job`` ("ray", "local", "mlflow")."""

    job: str
    inject: Callable[[Scene], object]
    code: tuple[int, ...] = ()  # exit codes that are right; none: the run must go on by itself
    says: str = ""  # what must be among the last lines of such an end
    status: tuple[str, ...] = ("failed",)  # of run.json then
    refused: str = ""  # what a resume must say first, before `repair`
    repair: Callable[[Scene], object] = lambda scene: None
    early: bool = False  # may also come before the first step
    keeps_step: bool = False  # no step may be lost
    traceback: bool = False  # of the user's own code: in one process it may be shown
    first: bool = False  # when what it hits is born: it is gone once all prompts are encoded


def _kill(name: str) -> Callable[[Scene], None]:
    """SIGKILL one of the run's processes of that name, as `benchmarks.machine.name_of` has it; waited for while Ray starts."""

    def kill(scene: Scene) -> None:
        deadline = time.monotonic() + (200 if not scene.run.metrics_path.exists() else 5)
        while scene.process.poll() is None and time.monotonic() < deadline:
            found = []
            for process in psutil.Process(scene.process.pid).children(recursive=True):
                with suppress(psutil.Error, IndexError):
                    if name_of(process.cmdline()) == name:
                        found.append(process)
            if found:
                scene.rng.choice(found).kill()
                return
            time.sleep(0.1)
        raise LookupError(f"no process {name}")

    return kill


def _signal(number: signal.Signals) -> Callable[[Scene], None]:
    return lambda scene: scene.process.send_signal(number)


def _damage(change: Callable[[random.Random, bytearray], bytes]) -> Callable[[Scene], None]:
    """SIGKILL, then ``change`` a file of the newest checkpoint."""

    def damage(scene: Scene) -> None:
        while scene.run.last_step() < 20:  # an older one to go on from
            time.sleep(0.01)
        scene.process.kill()
        scene.process.wait()
        file = scene.rng.choice(sorted(scene.run.checkpoint(scene.run.last_step()).iterdir()))
        file.write_bytes(change(scene.rng, bytearray(file.read_bytes())))

    return damage


def _flip(rng: random.Random, data: bytearray) -> bytes:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _move_away(scene: Scene) -> None:
    newest = scene.run.checkpoint(scene.run.last_step())
    newest.rename(newest.with_name(f"{newest.name}.damaged-{time.time_ns()}"))


def _resize(scene: Scene, size: str, check: bool = True) -> bool:
    """Whether the disk is of that size now."""
    command = ["mount", "-o", f"remount,size={size}", str(scene.folder / "disk")]
    return subprocess.run(command, check=check).returncode == 0


def _fill(scene: Scene) -> None:
    for _ in range(20):  # what is being written may outgrow the size before it holds
        disk = os.statvfs(scene.folder / "disk")
        if _resize(scene, str((disk.f_blocks - disk.f_bfree) * disk.f_frsize), check=False):
            return
    raise LookupError("the disk could not be filled")


def _shard(scene: Scene) -> Path:
    return scene.rng.choice(sorted((scene.folder / "prompts").glob("*.parquet")))


def _spoil(scene: Scene) -> None:
    shard = _shard(scene)
    shard.write_bytes(scene.rng.randbytes(shard.stat().st_size))


def restore_prompts(scene: Scene) -> None:
    """The shards as they were."""
    for shard in (scene.folder / "kept").glob("*.parquet"):
        (scene.folder / "prompts" / shard.name).write_bytes(shard.read_bytes())


def mode(text: str) -> Callable[[Scene], None]:
    """How the reward behaves from now on."""

    def order(scene: Scene) -> None:
        file = scene.folder / "mode"
        file.with_suffix(".new").write_text(text)
        os.replace(file.with_suffix(".new"), file)

    return order


def _shut(seconds: float) -> Callable[[Scene], None]:
    def shut(scene: Scene) -> None:
        mode("slow")(scene)  # the run outlives a minute
        assert scene.door is not None
        scene.door.shut()
        threading.Timer(seconds, scene.door.open).start() if seconds else None
        threading.Timer(seconds or 5, mode(""), [scene]).start()

    return shut


def _lock(scene: Scene) -> None:
    """Another program keeps MLflow's SQLite file for half a minute."""

    def keep() -> None:
        with sqlite3.connect(scene.folder / "mlflow.db", isolation_level=None) as database:
            database.execute("BEGIN EXCLUSIVE")
            time.sleep(30)
            database.execute("ROLLBACK")
        mode("")(scene)

    mode("slow")(scene)
    threading.Thread(target=keep, daemon=True).start()


CALM = mode("")
GOES_ON = r"goes on from step \d+"
NOT_SAID = ("running", "interrupted")  # killed: nobody wrote how it ended; interrupted, before it trained
NO_RAY = r"no Ray cluster answers at|Ray did not start here|GCS|raylet"
KINDS: dict[str, Kind] = {
    "kill -9 of a trainer": Kind("ray", _kill("RayTrainWorker")),
    "kill -9 of an encoder": Kind("ray", _kill("EncoderActor"), first=True),
    "kill -9 of a reward actor": Kind("ray", _kill("RewardActor")),
    "kill -9 of a scoring actor": Kind("ray", _kill("Scorer")),
    "kill -9 of the driver": Kind("ray", _signal(signal.SIGKILL), (-9,), status=NOT_SAID, early=True),
    "kill -9 of the GCS": Kind("ray", _kill("gcs_server"), (1,), NO_RAY, early=True),
    "kill -9 of the raylet": Kind("ray", _kill("raylet"), (1,), NO_RAY, early=True),
    "SIGTERM under Ray": Kind(
        "ray", _signal(signal.SIGTERM), (143,), GOES_ON, ("interrupted",), early=True, keeps_step=True
    ),
    "SIGINT under Ray": Kind(
        "ray", _signal(signal.SIGINT), (130,), GOES_ON, ("interrupted",), early=True, keeps_step=True
    ),
    "kill -9 without Ray": Kind("local", _signal(signal.SIGKILL), (-9,), status=NOT_SAID, early=True),
    "SIGTERM without Ray": Kind(
        "local", _signal(signal.SIGTERM), (143,), GOES_ON, ("interrupted",), early=True, keeps_step=True
    ),
    "SIGINT without Ray": Kind(
        "local", _signal(signal.SIGINT), (130,), GOES_ON, ("interrupted",), early=True, keeps_step=True
    ),
    "newest checkpoint cut": Kind(
        "local",
        _damage(lambda rng, data: bytes(data[: rng.randrange(len(data))])),
        (-9,),
        status=NOT_SAID,
        refused=r"damaged: .*goes on from step-\d+, which is intact",
        repair=_move_away,
    ),
    "bit of the newest checkpoint flipped": Kind(
        "local",
        _damage(_flip),
        (-9,),
        status=NOT_SAID,
        refused=r"damaged: .*goes on from step-\d+, which is intact",
        repair=_move_away,
    ),
    "disk full": Kind(
        "local",
        _fill,
        (1,),
        r"the disk is full|free on its disk",
        ("failed", "running"),
        repair=lambda s: _resize(s, "4g"),
    ),
    "shard deleted": Kind("local", lambda s: _shard(s).unlink(), (1,), r"prompts.*\.parquet", repair=restore_prompts),
    "shard corrupt": Kind("local", _spoil, (1,), r"prompts.*\.parquet", repair=restore_prompts),
    "reward hangs": Kind("local", mode("hang"), (1,), "has not answered for", repair=CALM),
    "reward throws": Kind(
        "local", mode("throw"), (1,), "ValueError: the chaos reward broke", repair=CALM, traceback=True
    ),
    "reward is NaN": Kind("local", mode("nan"), (1,), r"non-finite|not finite", repair=CALM),
    "reward of a wrong shape": Kind("local", mode("shape"), (1,), r"expected a float tensor of shape", repair=CALM),
    "MLflow gone for a minute": Kind("mlflow", _shut(60)),
    "MLflow gone for good": Kind("mlflow", _shut(0)),
    "MLflow's database locked": Kind("mlflow", _lock),
}


class Door:
    """A local address in front of another one, which can be shut: nobody answers then."""

    def __init__(self, port: int, behind: int) -> None:
        self.port, self.behind = port, behind
        self._server: socketserver.ThreadingTCPServer | None = None
        self._through: list[socket.socket] = []
        self.opened = threading.Event()

    def open(self) -> None:
        """Let calls through."""
        self.opened.set()
        if self._server:
            return
        door = self

        class Through(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", door.behind)) as there:
                    door._through += [self.request, there]
                    back = threading.Thread(target=_pour, args=(there, self.request), daemon=True)
                    back.start()
                    _pour(self.request, there)
                    back.join()

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

        self._server = Server(("127.0.0.1", self.port), Through)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def shut(self) -> None:
        """Cut all calls, take no more."""
        self.opened.clear()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        for end in self._through:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._server, self._through = None, []


def _pour(source: Any, sink: Any) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
