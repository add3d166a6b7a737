"""What `benchmarks.chaos` plans and prints; the voyages themselves are its own affair."""

from __future__ import annotations

import itertools
import socket
import socketserver
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.chaos import FAULTS, plan, table
from benchmarks.chaos_faults import KINDS, Door
from benchmarks.chaos_reward import Moody
from benchmarks.chaos_voyage import STEPS
from tests.pipelines.ray_head import free_ports


def test_every_kind_comes_once_before_any_comes_again_and_a_seed_says_which() -> None:
    voyages = list(itertools.islice(plan(0), 40))
    assert voyages == list(itertools.islice(plan(0), 40)) != list(itertools.islice(plan(1), 40))
    faults = sorted((f for v in voyages for f in v.faults), key=lambda f: f.number)
    first = {f.kind for f in faults if f.number < len(KINDS)}
    assert first == {f.kind for f in faults} == KINDS.keys()
    for voyage in voyages:
        assert len(voyage.faults) == FAULTS[voyage.job] and {KINDS[f.kind].job for f in voyage.faults} == {voyage.job}
        moments = [f.moment for f in voyage.faults]
        assert moments == sorted(moments) and moments[0] >= 0 and moments[-1] <= STEPS[voyage.job]


def test_the_table_counts_by_kind() -> None:
    rows = [
        {"kind": "reward hangs", "outcome": "failed cleanly", "recovery_s": 40.0, "lost": 3},
        {"kind": "reward hangs", "outcome": "hung"},
        {"kind": "disk full", "outcome": "failed cleanly", "recovery_s": 10.0, "lost": 9},
    ]
    lines = table(rows).splitlines()
    assert "| reward hangs |  | 1 |  |  |  | 1 |  | 40.0 (40.0) | 3 |" in lines
    assert lines[-1] == "| **all** |  | 2 |  |  |  | 1 |  | 25.0 (40.0) | 9 |"


def test_a_door_can_be_shut_and_opened_again() -> None:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(self.request.recv(100))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        (port,) = free_ports(1)
        door = Door(port, server.server_address[1])
        for _ in range(2):
            door.open()
            with socket.create_connection(("127.0.0.1", port)) as call:
                call.sendall(b"hello")
                assert call.recv(100) == b"hello"
            door.shut()
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", port))
        server.shutdown()


def test_a_reward_obeys(tmp_path: Path) -> None:
    reward = Moody(Moody.Config(name="x", orders=str(tmp_path), slope=(1.0, 0.6)))
    images = torch.rand(4, 3, 1, 2)
    calm = reward.score(images, {})
    assert calm.shape == (4,) and calm.isfinite().all()
    (tmp_path / "mode").write_text("nan")
    assert reward.score(images, {}).isnan().all()
    (tmp_path / "mode").write_text("shape")
    assert reward.score(images, {}).shape == (1,)
    (tmp_path / "mode").write_text("throw")
    with pytest.raises(ValueError, match="broke"):
        reward.prepare(["a"])
