"""Exports load and draw the same under the oldest releases that their cards name and under the installed ones.

`make test-exports`: installs the old ones into a temporary folder, so packages must be reachable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from didr_core import config as configs
from didr_core.config import Config, build
from didr_core.export.card import READERS
from didr_core.export.folder import export_run
from didr_core.networks import lora, roles
from didr_core.world import random_models

pytestmark = [pytest.mark.packages, pytest.mark.slow]
SHARED = ("transformers==4.57.6", "peft==0.18.0", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
SHARED += ("httpx==0.28.1", "httpcore==1.0.9", "sniffio==1.3.1")
OLDEST = {"sdxl": "diffusers==0.35.2", "zimage": "diffusers==0.36.0"}
OTHER = "diffusers==0.42.0"
GOLDEN = Path(__file__).parents[1] / "backbones" / "golden_steps.json"
READER = Path(__file__).parent / "reader.py"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each family the PYTHONPATH that puts old releases before those of this environment, whose torch serves both."""
    root = tmp_path_factory.mktemp("old")
    for folder, packages in (("shared", SHARED), *((family, (package,)) for family, package in OLDEST.items())):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(root / folder), *packages]
        subprocess.run(command, check=True)
    return {family: f"{root / family}:{root / 'shared'}" for family in OLDEST}


def moved(network: nn.Module) -> nn.Module:
    """Trained, so to say: every weight is another, in numbers that half precision holds."""
    with torch.no_grad():
        for i, weight in enumerate(network.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            weight.copy_((weight + 0.1 * noise).bfloat16().float())
    return network


def settings(family: str, pipeline: str, **more: Any) -> Config:
    return configs.load(f"tiny_{family}", [f"backbone.pipeline={pipeline}", *(f"{k}={v}" for k, v in more.items())])


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path, Path]]:
    """By kind: family, export, and the export of its start."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    sources = {"world": "world://pipeline"}
    sources |= {family: str(getattr(random_models, family)(root / family)) for family in OLDEST}
    text = Path(sources["zimage"], "text_encoder", "config.json")  # a number that releases write in different places
    tree = json.loads(text.read_text())
    tree["rope_parameters"]["rope_theta"] = 100.0
    text.write_text(json.dumps(tree))
    for kind, source in sources.items():
        family = "zimage" if kind == "zimage" else "sdxl"
        with_adapter = kind != "world"
        config = settings(
            family, source, **({"roles.generator": "lora", "roles.rank": 4, "roles.alpha": 12} if with_adapter else {})
        )
        backbone = build("backbones", config.backbone)
        start = export_run(config, backbone, backbone.load_network("generator"), root / f"{kind}-start")
        network = roles.bare_generator(backbone, config.backbone, config.roles)
        out = export_run(config, backbone, moved(network), root / f"{kind}-export", redraw=True)
        assert (out / lora.ADAPTER).is_file() == with_adapter
        made[kind] = family, out, start
    return made


def read(export: Path, base: Path, out: Path, path: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(READER), str(export), str(base), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecat" not in done.stderr, done.stderr[-3000:]
    return dict(np.load(out)), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["world", "sdxl", "zimage"])
def test_old_and_new_readers_draw_the_same(
    kind: str, exports: dict[str, tuple[str, Path, Path]], old: dict[str, str], tmp_path: Path
) -> None:
    family, export, base = exports[kind]
    ours, new = read(export, base, tmp_path / "new.npz")
    theirs, before = read(export, base, tmp_path / "old.npz", old[family])
    golden = json.loads(GOLDEN.read_text())
    for told in (new, before):
        known = golden[family][told["versions"]["diffusers"]]
        assert known.keys() == told["steps"].keys()
        assert all(np.allclose(known[n], told["steps"][n], atol=2e-6) for n in known)
    new, before = new["versions"], before["versions"]
    assert before["diffusers"] == OLDEST[family].partition("==")[2] and before["transformers"].startswith("4.57.")
    assert new["diffusers"] != before["diffusers"] and new["peft"] != before["peft"]
    for wanted in (before["diffusers"].rpartition(".")[0], "4.57", "0.18"):
        assert wanted in READERS
    assert ours.keys() == theirs.keys() and len(ours) == {"world": 2, "sdxl": 6, "zimage": 3}[kind]
    for name, picture in ours.items():
        assert picture.std() > 0.01
        assert np.abs(picture - theirs[name]).max() < 1e-4, name
        if name.startswith("base of"):  # the adapter is seen, and is what was merged
            assert np.abs(picture - ours["card"]).max() > 0.05
        else:
            assert np.abs(picture - ours["card"]).max() < 5e-3, name


def test_old_folders_and_another_stock(old: dict[str, str], tmp_path: Path) -> None:
    """The cases of test_stock.py again: in an SDXL folder that old releases saved, and with another diffusers as stock."""
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path / "sdxl"
    make = f"from pathlib import Path; from didr_core.world import random_models; random_models.sdxl(Path({str(folder)!r}))"
    python(root, "-c", make, PYTHONPATH=old["sdxl"])
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_diffusers_version"] == "0.35.2" and (folder / "tokenizer_2" / "vocab.json").is_file()
    python(root, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "other"), OTHER)
    test = ("-m", "pytest", "-q", "-x", "tests/backbones", "-k", "is_stock_diffusers or steps_are")
    for environment in ({"DIDR_TEST_SDXL": str(folder)}, {"PYTHONPATH": str(tmp_path / "other")}):
        assert " passed" in python(root, *test, **environment)


def python(cwd: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
