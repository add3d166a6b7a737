"""TensorBoard and Weights & Biases beside MLflow: what they were told is read back from their files; nothing needs a network."""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from didr_core import config as configs
from didr_core.config import Config, Tracking
from didr_core.types import DIDRError
from pipelines.tracking.address import look, look_beside
from pipelines.tracking.others import _own_id
from pipelines.tracking.tracker import open_tracker, preflight


def settings(*also: str) -> Config:
    return configs.load("tiny", ["tracking.uri=none", f"tracking.also={json.dumps(also)}"])


def told(config: Config, folder: Path, steps: range, error: BaseException | None = None) -> None:
    """A run's words, from its first to its last."""
    Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "grid.png")
    (folder / "report.html").write_text("<p>hello")
    try:
        with open_tracker(config, folder) as tracker:
            for step in steps:
                tracker.metrics(step, {"reward/gain": step / 10})
            tracker.alarms(steps[-1], ["drs-silent"])
            tracker.final({"score/aligned/reward": 1.5})
            tracker.tags({"note": "mine"})
            for name in ("grid.png", "report.html"):
                tracker.artifact(folder / name)
            tracker.model(folder, True)
            if error:
                raise error
    except KeyboardInterrupt:
        pass


def test_tensorboard_has_the_numbers_the_picture_and_no_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings("tensorboard")
    told(config, tmp_path, range(1, 9), KeyboardInterrupt())
    kept = tmp_path / "checkpoints" / "step-00000004"
    kept.mkdir(parents=True)
    (kept / "complete").touch()
    told(config, tmp_path, range(5, 7))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    gains = events.Scalars("reward/gain")
    assert [point.step for point in gains] == [1, 2, 3, 4, 5, 6]
    assert gains[-1].value == pytest.approx(0.6) and events.Scalars("score/aligned/reward")[-1].value == 1.5
    assert events.Scalars("alarm/drs-silent")[-1].step == 6 and events.Images("grid")
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"| drp.beta | {config.drp.beta} |" in text


def records(folder: Path) -> list[Any]:
    """Of the transaction logs: blocks of 32 KiB, in them pieces (checksum, length, kind) of records; seven bytes come first."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while len(data) - at > 7:
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last piece
                found.append(Record.FromString(parts))
                parts = b""
    return found


def test_wandb_offline_has_the_numbers_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "tiny-1"
    folder.mkdir()
    told(settings("wandb"), folder, range(1, 4), KeyboardInterrupt())
    found: list[Any] = []
    while not any(r.HasField("exit") for r in found):  # their own process writes, and goes on after `finish`
        time.sleep(0.05)
        found = records(folder)
    run = next(r.run for r in found if r.HasField("run"))
    (tmp_path / "elsewhere" / "tiny-1").mkdir(parents=True)
    assert _own_id(folder) == run.run_id != _own_id(tmp_path / "elsewhere" / "tiny-1")
    assert run.run_id.startswith("tiny-1-") and run.project == "didr" and "tiny" in run.tags
    history = [
        {i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.HasField("history")
    ]
    assert [row["reward/gain"] for row in history if "reward/gain" in row] == [0.1, 0.2, 0.3]
    assert any("grid" in row or "grid" in str(row) for row in history)
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [130]
    summary = {i.key or i.nested_key[0]: i.value_json for r in found if r.HasField("summary") for i in r.summary.update}
    assert summary["score/aligned/reward"] == "1.5"


def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    both = Tracking(uri="none", also=("wandb",))
    for asked in (lambda: look_beside(both), lambda: look(both, tmp_path), lambda: preflight(both, tmp_path)):
        with pytest.raises(DIDRError, match=r"tracking.also=\['wandb'\]: no key .* WANDB_MODE=offline"):
            asked()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    look_beside(both)
    monkeypatch.setattr("wandb.init", lambda **_: 1 / 0)
    with pytest.raises(DIDRError, match=r"tracking.also=\['wandb'\]: wandb cannot begin \(division by zero\)"):
        open_tracker(settings("wandb"), tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(DIDRError, match="'tensorboard' is not installed; pip install tensorboard"):
        look_beside(Tracking(also=("tensorboard",)))
    with pytest.raises(DIDRError, match="tracking.also"):
        configs.load("tiny", ["tracking.also=[comet]"])
