"""docs/sdxl.md, line by line: an empty folder, stand-ins of every file on a hub of our own, then what the page says, to the export."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import Hub
from published_files import LICENCES, NEVER, sdxl_hub

from pipelines.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "sdxl.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
INSTALL = [line for line in LINES if line.startswith(("make TORCH_INDEX_URL=<index> install", "source .venv"))]
DOWNLOADS = [line for line in LINES if line.startswith("hf download ")]
SMALL = {
    "train.steps": 3,
    "train.batch": 2,
    "train.assistant_updates": 1,
    "train.assistant_warmup": 1,
    "train.checkpoint_every": 3,
    "evaluation.prompts": 4,
    "evaluation.grid": 2,
    "tracking.uri": "none",
    "device": "cpu",
}
"""What makes a line short: a page of 1,000 steps at batch 32, on a CPU and without Ray."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    served = Hub(sdxl_hub(tmp_path_factory.mktemp("hub")))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()


def download(hub: Hub, command: list[str], cwd: Path) -> None:
    env = os.environ | {"HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "NO_COLOR": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
def test_the_page_is_followed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        len(INSTALL) == 2
        and len(DOWNLOADS) == 6
        and LINES.index(DOWNLOADS[-1]) < LINES.index("didr doctor --recipe sdxl_1gpu")
    )
    download(hub, ["bash", "-ec", "\n".join(DOWNLOADS)], tmp_path)
    fetched = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert len(fetched) > 25 and not [path for path in fetched if path.read_bytes() == NEVER]

    (tmp_path / "train.txt").write_text("\n".join(f"a picture of {n} red circles" for n in range(20)))
    (tmp_path / "heldout.jsonl").write_text("".join(f'{{"prompt": "two squares on {n}"}}\n' for n in range(5)))
    for line in LINES:
        if line in INSTALL or line in DOWNLOADS or not line:
            continue
        program, *words = shlex.split(line)
        assert program == "didr", f"docs/sdxl.md: who follows {line!r}?"
        more = ["--local"] if words[0] == "align" else []
        if more and "--resume" not in words:
            more += [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *more])
        assert stop.value.code == 0, f"{line}: {capsys.readouterr().err}"
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "runs" / "sdxl" / "export" / "model_index.json").is_file()
    card = (tmp_path / "runs" / "sdxl" / "export" / "README.md").read_text()
    assert all(f"`: {terms}\n" in f"{card}\n" for terms in LICENCES.values()) and "not stated" not in card
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["a-lighthouse-in-a-storm-oil-painting-seed1.png"]


def test_make_fetch_sdxl_downloads_what_the_page_does(tmp_path: Path) -> None:
    """With an `hf` that says what it was told."""
    hf = tmp_path / "bin" / "hf"
    hf.parent.mkdir()
    hf.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\necho .\n')
    hf.chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "-s", "-C", ROOT, "fetch-sdxl", f"VENV={tmp_path}", f"-o{tmp_path}/.installed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n.\n")[:-1] == ["\n".join(shlex.split(line)[1:]) for line in DOWNLOADS]
