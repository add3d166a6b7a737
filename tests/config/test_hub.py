"""Models by their names on the hub, from one of our own on loopback: fetched once, safetensors only; what is said where there is none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_hub import COMMIT, Hub
from random_models import clip_folder, prompt_shards

from didr_core.config import hub
from didr_core.world import random_models

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
from didr_core import config as configs
from didr_core.config import build, locate
from didr_core.plan.preflight import preflight
from didr_core.types import DIDRError
for settings in json.loads(sys.argv[1]):
    config = configs.load("tiny_sdxl", settings)
    try:
        preflight(config)
    except DIDRError as error:
        print(f"error: {error}".splitlines()[0])  # then what else is missing
        continue
    build("backbones", config.backbone).load_network("generator")
    print(json.dumps([config.backbone.pipeline, str(locate(config.backbone.pipeline))]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    root = tmp_path_factory.mktemp("hub")
    sdxl = random_models.sdxl(root / "sdxl")
    clip = clip_folder(root / "clip")
    for name in (
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (sdxl / name).write_bytes(b"never fetched")
    (clip / "pytorch_model.bin").write_bytes(b"never fetched")
    hub = Hub({"acme/tiny-sdxl": sdxl, "acme/taste": clip})
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub, prompt_shards(root / "prompts")
    hub.shutdown()


def run(served: tuple[Hub, Path], home: Path, *pipelines: str, port: int | None = None) -> tuple[list[str], str]:
    """A process of its own, as huggingface_hub reads its environment once: a line for each pipeline's preflight, and what a user sees."""
    hub, prompts = served
    tree = {"data.prompts": str(prompts), "judge": "null", "device": "cpu", "output": str(home)}
    tree |= {"reward": "{name: pickscore, path: acme/taste, tokenizer: acme/taste}"}
    settings = [[f"{key}={value}" for key, value in {**tree, "backbone.pipeline": name}.items()] for name in pipelines]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{port or hub.server_address[1]}"
    command = [sys.executable, "-c", RUN, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-len(pipelines) :], done.stderr


@pytest.mark.slow
def test_a_model_is_fetched_once_and_then_needs_no_hub_and_what_it_has_not_is_one_line(
    served: tuple[Hub, Path], tmp_path: Path
) -> None:
    hub, _ = served
    (*wrong, line), seen = run(served, tmp_path, "acme/none", "acme/tiny-sdxl@v9", "acme/tiny-sdxl@v1")
    for said, model, revision in zip(wrong, ("acme/none", "acme/tiny-sdxl"), ("main", "v9"), strict=True):
        assert f"no such folder here, and the hub has no model {model!r} at revision {revision!r}" in said
    name, place = json.loads(line)
    assert name == "acme/tiny-sdxl@v1" and COMMIT in place, "the recipe keeps the name, the files lie in the cache"
    assert "unet/diffusion_pytorch_model.safetensors" in hub.asked and "model.safetensors" in hub.asked
    assert not [file for file in hub.asked if file.endswith(".bin") or "fp16" in file or file.startswith("sd_xl")]
    assert len(hub.asked) == len(set(hub.asked)), "and none of them twice"
    assert "%" in seen, "a bar shows how far it is"
    hub.asked.clear()
    lines, _ = run(served, tmp_path, "acme/tiny-sdxl@v1", "acme/other@v2", port=9)  # nobody answers there
    assert lines[0] == line and not hub.asked
    assert re.fullmatch(
        r"error: backbone\.pipeline='acme/other@v2': no such folder here, and it cannot be fetched from the hub \(.+\)\. "
        r"Where there is a network: `hf download acme/other --revision v2`; copy that cache \(HF_HOME\) here, or give a path\.",
        lines[1],
    )


def test_what_is_a_name_and_what_a_path() -> None:
    assert hub.name_of("acme/tiny") == ("acme/tiny", "main")
    assert hub.name_of("acme/tiny-1.0@refs/pr/3") == ("acme/tiny-1.0", "refs/pr/3")
    for path in (
        "/acme/tiny",
        "./acme/tiny",
        "~/tiny",
        "acme",
        "a/b/c",
        "weights/dmd2.bin",
        "a/unet.safetensors",
        "world://x",
        "../a/b",
    ):
        assert hub.name_of(path) is None, path
    assert hub.command("acme/tiny@v1") == "`hf download acme/tiny --revision v1`" and hub.command("/acme") == ""


def test_a_path_that_is_here_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "x").mkdir(parents=True)
    assert not hub.fetch("backbone", {"name": "sdxl", "pipeline": "models/x", "lora": None, "shift": 3.0})


def test_a_tokenizers_name_brings_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, revision, allow_patterns: asked.append(allow_patterns)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=[]))
    assert hub.fetch("reward", {"name": "hpsv2", "path": "acme/model", "tokenizer": "acme/words"})
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False] and "*.json" in asked[1]
