"""`didr align --local`, `export`, `sample`: the pictures are those of stock diffusers, from a process that cannot import this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_recipe

from didr_core.config import build
from didr_core.diffusion import sampling
from didr_core.export.sample import to_image
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
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
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
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
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


def test_start_and_teacher_beside_it_on_the_same_noise(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("id,Prompt\n1,a picture of 0-3\n2,a picture of 1-7\n")
    asked = ["--run", run.path, "--prompts", tmp_path / "prompts.csv", "--beside", "teacher", "--beside", "start"]
    didr("sample", *asked, "--seed", 11, "--output", tmp_path / "one", "--grid", tmp_path / "grid.html")
    drawn = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "one").iterdir()}
    assert len(drawn) == 6

    config = run.config()
    backbone = build("backbones", config.backbone)
    backbone.load_text()
    backbone.load_decoder()
    for place, prompt in enumerate(PROMPTS):
        z = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(11 + place))
        condition, network = backbone.encode([prompt]), backbone.load_network("reference")
        expected = {
            "-start": sampling.one_step(backbone, backbone.load_network("generator"))(condition, z),
            "-teacher": sampling.sample_reference(backbone, network, condition, z, 50, config.guidance.reference),
        }
        name = f"{prompt.replace(' ', '-')}-seed{11 + place}"
        for model, latent in expected.items():
            picture = np.asarray(to_image(backbone.decode(latent)[0]), np.int16)
            assert np.abs(picture - drawn[f"{name}{model}.png"]).max() <= 1
        assert (drawn[f"{name}-start.png"] != drawn[f"{name}.png"]).any()

    page = (tmp_path / "grid.html").read_text()
    assert page.count("data:image/png") == 6 and "http" not in page
    assert page.index("start</figcaption>") < page.index("aligned</figcaption>") < page.index("teacher</figcaption>")
    one = ["--export", run.path / "export", "--prompt", "x", "--output", tmp_path, "--grid", tmp_path / "g.png"]
    didr("sample", *one, "--count", 2)
    assert Image.open(tmp_path / "g.png").size[0] > 300


def test_two_runs_on_one_page(run: RunFolder, tmp_path: Path) -> None:
    other = shutil.copytree(run.path, tmp_path / "other")
    didr("compare", run.path, other, "--count", 4, "--beside", "start", "--out", tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "http" not in page and all(f"{name}</figcaption>" in page for name in ("run", "other", "start"))
    tree = json.loads((tmp_path / "page" / "scores.json").read_text())
    assert [(p["a"], p["b"]) for p in tree["pairs"]] == [("run", "other"), ("run", "start"), ("start", "other")]
    twins, start = ([p["measures"]["reward"]["difference"][k] for k in ("low", "high")] for p in tree["pairs"][:2])
    assert twins == [0, 0] and start[0] < start[1]


def test_the_page_to_play_with_draws_before_and_after(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["play", str(run.path)])
    assert stop.value.code == 1 and "pip install gradio" in capsys.readouterr().err

    seen: dict[str, Any] = {}

    class Interface:
        def __init__(self, **given: Any) -> None:
            seen.update(given)

        def launch(self, **given: Any) -> None:
            seen.update(given)

    part = lambda **given: given["label"]  # noqa: E731
    library = SimpleNamespace(Interface=Interface, Textbox=part, Number=part, Image=part)
    monkeypatch.setitem(sys.modules, "gradio", library)
    didr("play", run.path, "--port", 7999)
    assert (seen["inputs"], seen["outputs"]) == (["prompt", "seed"], ["before", "after"])
    assert (seen["server_name"], seen["server_port"]) == ("127.0.0.1", 7999)
    _, after = seen["fn"](PROMPTS[0], 11)
    didr("sample", "--run", run.path, "--prompt", PROMPTS[0], "--seed", 11, "--output", tmp_path)
    assert (np.asarray(after) == np.asarray(Image.open(next(tmp_path.glob("*.png"))))).all()
