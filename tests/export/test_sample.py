"""`didr align --local`, `export`, `sample`: the pictures are those of stock diffusers, from a process that cannot import this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_recipe

from didr_core.train import checkpoint
from didr_core.train.run_folder import RunFolder
from pipelines.cli import main as cli

pytestmark = pytest.mark.slow
PROMPTS = ["a picture of 0-3", "a picture of 1-7"]

STOCK = """
import sys, torch
sys.modules["didr_core"] = sys.modules["pipelines"] = None
from diffusers import LCMScheduler, StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
assert isinstance(pipe.scheduler, LCMScheduler)
for i, prompt in enumerate(sys.argv[3:]):
    noise = torch.Generator().manual_seed(11 + i)
    image = pipe(prompt, num_inference_steps=1, guidance_scale=0, timesteps=[399], generator=noise).images[0]
    image.save(f"{sys.argv[2]}/{i}.png")
"""


def didr(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("toy")
    found = RunFolder(folder / "run")
    sets = ["train.steps=4", "train.keep_checkpoints=1", "evaluation.every=3"]
    recipe = toy_recipe(folder)
    didr("align", "--recipe", recipe, "--local", "--output", found.path, *[a for s in sets for a in ("--set", s)])
    return found


def test_sampled_pictures_equal_stock_diffusers(run: RunFolder, tmp_path: Path) -> None:
    prompts = [a for p in PROMPTS for a in ("--prompt", p)]
    didr("sample", "--run", run.path, *prompts, "--seed", 11, "--output", tmp_path / "ours")
    (tmp_path / "stock").mkdir()
    command = [sys.executable, "-c", STOCK, str(run.path / "export"), str(tmp_path / "stock"), *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    ours = sorted((tmp_path / "ours").iterdir())
    assert [p.name for p in ours] == ["a-picture-of-0-3-seed11.png", "a-picture-of-1-7-seed12.png"]
    for i, path in enumerate(ours):
        a, b = (np.asarray(Image.open(p), np.int16) for p in (path, tmp_path / "stock" / f"{i}.png"))
        assert a.shape == b.shape == (32, 32, 3) and a.std() > 5
        assert np.abs(a - b).max() <= 1  # a rounding apart at most
    assert np.abs(np.asarray(Image.open(ours[0]), np.int16) - np.asarray(Image.open(ours[1]), np.int16)).max() > 10


def test_export_again_and_with_the_raw_weights(run: RunFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for weights in ("ema", "generator"):
        folder = tmp_path / weights
        didr("export", "--run", run.path, "--output", folder, "--weights", weights)
        (single,) = folder.glob("didr_*.safetensors")
        tensors = load_file(single)
        state = checkpoint.read(run.checkpoint(4), weights)
        assert all(torch.equal(value, state[name].half()) for name, value in tensors.items())
    assert (run.path / "export" / "scores.json").is_file()


def test_grids_on_the_way_and_at_the_end(run: RunFolder) -> None:
    assert [p.name for p in (run.path / "grids").iterdir()] == ["step-000003.png"]
    assert Image.open(run.path / "grid.png").size[0] > 300
    assert json.loads((run.path / "scores.json").read_text())["counts"]["prompts"] == 8


def test_config_show_and_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    didr("config", "show", "--recipe", "tiny", "--set", "train.micro_batch=4")
    shown = capsys.readouterr().out
    assert "didr_core/backbones/sdxl.py" in shown and "world://pipeline" in shown and "train.batch 24" in shown
    didr("config", "list")
    assert "tiny" in capsys.readouterr().out


def test_help_is_quick() -> None:
    """No heavy library for `didr --help`."""
    heavy = "torch", "ray", "mlflow", "diffusers", "pyarrow"
    code = f"import sys; from pipelines import cli; sys.exit([m for m in {heavy} if m in sys.modules] or 0)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_pictures_say_what_they_are_and_never_share_a_name(run: RunFolder, tmp_path: Path) -> None:
    for prompt in ("一匹の赤い馬", "дом у моря"):
        didr("sample", "--run", run.path, "--prompt", prompt, "--output", tmp_path)
    made = {p.name: Image.open(p).info for p in tmp_path.iterdir()}
    assert made == {
        "一匹の赤い馬-seed0.png": {"prompt": "一匹の赤い馬", "seed": "0"},
        "дом-у-моря-seed0.png": {"prompt": "дом у моря", "seed": "0"},
    }


@pytest.mark.parametrize(("device", "said"), [("tpu", "device"), ("cuda", "sees no CUDA device")])
def test_a_device_that_is_not_there_is_one_line(
    run: RunFolder, device: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--run", str(run.path), "--prompt", "x", "--device", device])
    assert stop.value.code == 1
    assert said in capsys.readouterr().err


def test_exported_weights_are_readable_as_the_folder_is(run: RunFolder) -> None:
    folder = run.path / "export"
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) >= 4
    assert {p.stat().st_mode & 0o777 for p in weights} == {folder.stat().st_mode & 0o666}
