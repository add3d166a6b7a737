"""The export: stock diffusers loads it without this package, pictures are ours, folders are whole or absent, the card tells the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from random_models import clip_folder, sdxl_folder
from torch import nn

from didr_core import config as configs
from didr_core.config import Config, build
from didr_core.diffusion import sampling
from didr_core.evaluate.contestants import one_step_contestant
from didr_core.evaluate.evaluator import Evaluator
from didr_core.evaluate.scores import card_section
from didr_core.export.card import licences, model_card
from didr_core.export.folder import export_run
from didr_core.networks.lora import ADAPTER, KOHYA
from didr_core.types import DIDRError

PROMPTS = ["a red circle", "two blue rings"]

# Runs in a process of its own that cannot import this package.
STOCK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("didr_core", "pipelines", "tune_spaces"):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

folder, single, noise, prompts, out = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split("|"), sys.argv[5]
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__name__ == "StableDiffusionXLPipeline" and type(pipe.scheduler).__name__ == "LCMScheduler"
z = torch.from_numpy(np.load(noise))
images = pipe(prompts, latents=z, num_inference_steps=1, guidance_scale=0, timesteps=[399], output_type="np").images
unet = UNet2DConditionModel.from_config(folder, subfolder="unet").to(torch.float16)
unet.load_state_dict(load_file(single), strict=True)
folder_state = pipe.unet.state_dict()
assert all(v.dtype == torch.float16 for v in unet.state_dict().values())
assert all(torch.equal(v.float(), folder_state[k]) for k, v in unet.state_dict().items())
np.save(out, images)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return sdxl_folder(root / "pipeline"), clip_folder(root / "clip")


def configuration(folders: tuple[Path, Path], **changes: Any) -> Config:
    tree = {
        "name": "try it",
        "backbone": {"name": "sdxl", "pipeline": str(folders[0])},
        "algorithm": "didr",
        "reward": {"name": "pickscore", "path": str(folders[1])},
        "generator": {"lr": 1e-4},
        "assistant": {"lr": 2e-4},
        "train": {"steps": 10, "batch": 4},
        "data": {"prompts": "world://prompts/train"},
    }
    return configs.validate(tree | changes)


class Writes:
    """A backbone that exports one small file, or fails at it."""

    def __init__(self, error: Exception | None = None, text: str = "new") -> None:
        self.error, self.text = error, text

    def export(self, generator: nn.Module, folder: str) -> None:
        Path(folder, "model_index.json").write_text(self.text)
        if self.error:
            raise self.error


def test_stock_diffusers_makes_our_pictures(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = configuration(folders)
    backbone = build("backbones", config.backbone)
    backbone.load_text()
    backbone.load_decoder()
    generator = backbone.load_network("generator")
    with torch.no_grad():  # a trained generator is not the reference, and half precision must not decide the test
        for i, weight in enumerate(generator.parameters()):
            weight.add_(0.15 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
            weight.copy_(weight.half().float())
    out = export_run(config, backbone, generator, tmp_path / "export", run={"command": "didr align", "commit": "abc"})
    single = out / "didr_try_it_1step_unet_fp16.safetensors"
    assert single.is_file() and (out / "README.md").is_file() and (out / "config.yaml").is_file()
    told = yaml.safe_load((out / "config.yaml").read_text())
    assert "tracking" not in told and told["backbone"] | {"pipeline": ""} == config.backbone.model_dump() | {
        "pipeline": ""
    }
    assert told["train"] == config.train.model_dump() and told["backbone"]["pipeline"] == folders[0].name
    written = [p for p in out.rglob("*") if p.suffix in (".json", ".yaml", ".md")]
    assert not [p.name for p in written if str(folders[0].parent) in p.read_text()], "no paths of this machine"

    z = sampling.noise(7, range(len(PROMPTS)), backbone.latent_shape)
    np.save(tmp_path / "z.npy", z.numpy())
    arguments = [str(out), str(single), str(tmp_path / "z.npy"), "|".join(PROMPTS), str(tmp_path / "images.npy")]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.from_numpy(np.load(tmp_path / "images.npy")).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours, reference = (
            backbone.decode(backbone.generate(network, z, backbone.encode(PROMPTS)))
            for network in (generator, backbone.load_network("reference"))
        )
    assert ours.shape == theirs.shape
    # Text towers and VAE are exported in half precision, which these random ones were not trained for: hence not 1e-6.
    assert (ours - theirs).abs().max() < 1e-3
    assert (reference - theirs).abs().max() > 0.03, "the test would see another generator's pictures"


def test_a_failed_export_leaves_nothing_and_keeps_the_old_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config, module, target = configuration(folders), nn.Linear(1, 1), tmp_path / "export"
    full = OSError(28, "No space left on device")
    with pytest.raises(DIDRError, match="No space left on device"):
        export_run(config, Writes(full), module, target)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    export_run(config, Writes(text="old"), module, target)  # type: ignore[arg-type]
    with pytest.raises(DIDRError, match="No space left"):
        export_run(config, Writes(full), module, target, overwrite=True)  # type: ignore[arg-type]
    assert (target / "model_index.json").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_only_our_own_export_is_overwritten_and_only_when_asked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config, module, target = configuration(folders), nn.Linear(1, 1), tmp_path / "export"
    target.mkdir()
    export_run(config, Writes(text="one"), module, target)  # type: ignore[arg-type]
    with pytest.raises(DIDRError, match="not empty"):
        export_run(config, Writes(text="two"), module, target)  # type: ignore[arg-type]
    (target / "stale.bin").write_text("")
    export_run(config, Writes(text="two"), module, target, overwrite=True)  # type: ignore[arg-type]
    assert (target / "model_index.json").read_text() == "two" and not (target / "stale.bin").exists()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(DIDRError, match="not an export of ours"):
        export_run(config, Writes(), module, foreign, overwrite=True)  # type: ignore[arg-type]
    assert (foreign / "chapter.txt").read_text() == "years of work"


def test_the_card_holds_scores_settings_and_terms_but_no_machine_paths(folders: tuple[Path, Path]) -> None:
    config = configuration(folders)
    backbone = build("backbones", config.backbone)
    backbone.load_text()
    backbone.load_decoder()
    network = backbone.load_network("generator")
    models = [one_step_contestant(name, backbone, network) for name in ("start", "aligned")]
    scores = Evaluator(backbone, PROMPTS).compare(models, facts={"commands": ["didr evaluate x"]}).tree
    card = model_card(
        config,
        scores=card_section(scores),
        run={"command": "didr align --recipe tiny", "commit": "0123abc"},
        files=("didr_x_1step_unet_fp16.safetensors", "grid.png"),
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers" and "one-step" in front["tags"] and front["license"]
    for text in (
        "timesteps=[399]",
        "guidance_scale=0",
        "0123abc",
        "didr align --recipe tiny",
        "didr evaluate x",
        "grid.png",
    ):
        assert text in card, text
    std = scores["models"]["aligned"]["measures"]["latent_std"]["mean"]
    assert "| aligned | 1 |" in card and json.dumps(std)
    assert "| beta | 1 " in card and "generator 0.0001, assistant 0.0002" in card
    assert str(folders[0]) not in card and str(folders[0].parent) not in card
    control = configuration(folders, algorithm="diff_instruct", reward=None)
    assert "beta" not in model_card(control) and "Not scored." in model_card(control)


def test_terms_come_from_the_weights_own_card(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert dict(licences(configuration(folders))) == {
        "backbone pipeline `pipeline`": "not stated beside the weights; look it up before publishing",
        "reward path `clip`": "not stated beside the weights; look it up before publishing",
    }
    assert set(dict(licences(configs.load("tiny"))).values()) == {"cc0-1.0"}
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    parts = [{"weight": 1.0, "reward": {"name": "pickscore", "path": str(tmp_path / "w.safetensors")}}]
    parts.append({"weight": 1.0, "reward": {"name": "pickscore", "path": "world://rewards/taste"}})
    both = configs.load("tiny", ["reward=" + json.dumps({"name": "composite", "parts": parts})])
    found = dict(licences(both))
    assert found["reward.parts[0].reward path `w.safetensors`"] == "cc-by-nc-4.0" and "cc0-1.0" in found.values()
    assert "pickscore w.safetensors, pickscore world://rewards/taste" in model_card(both)
    control = model_card(configs.load("tiny", ["algorithm=diff_instruct"]))
    assert "without a reward" in control and "beta" not in control and "pickscore" not in control
    card = folders[0] / "README.md"
    card.write_text("---\nlicense: openrail++\n---\n# Base\n")
    try:
        assert "openrail++" in dict(licences(configuration(folders)))["backbone pipeline `pipeline`"]
        card.write_text("---\nlicense: other\nlicense_name: sai-nc-community\n---\n")
        assert dict(licences(configuration(folders)))["backbone pipeline `pipeline`"] == "sai-nc-community"
    finally:
        card.unlink()


def test_a_card_is_for_others(folders: tuple[Path, Path]) -> None:
    config = configuration(folders, roles={"generator": "lora", "rank": 8})
    command = (
        f"didr align --output=/home/me/runs/x --set backbone.pipeline={folders[0]} --set drp.beta=1/2 -r /a/b/c.yaml"
    )
    run = {"command": command, "versions": {"diffusers": "0.42.1", "torch": "2.13.0+cpu", "peft": "0.21.2", "ray": "2"}}
    card = model_card(config, run=run, files=(ADAPTER, KOHYA))
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    assert len(tags) == len(set(tags)) and "didr" in tags
    assert "/home" not in card and str(folders[0].parent) not in card and "/a/b" not in card
    assert "--output=x --set backbone.pipeline=pipeline --set drp.beta=1/2 -r c.yaml" in card
    assert f'pipe.load_lora_weights("path/to/this/folder", weight_name="{ADAPTER}")' in card and "rank 8" in card
    assert f"In A1111 and ComfyUI use `{KOHYA}`" in card
    assert "`torch==2.13.0+cpu diffusers==0.42.1 peft==0.21.2`" in card and "diffusers 0.35" in card
    assert ADAPTER not in model_card(config, run=run)


def test_parts_are_the_sources_own_files_and_have_a_variants_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = configuration(folders)
    backbone = build("backbones", config.backbone)
    (folders[0] / "tokenizer" / "LICENSE").write_text("diffusers falls over a name without a dot")
    out = export_run(config, backbone, backbone.load_network("generator"), tmp_path / "export", redraw=True)
    for part in ("tokenizer", "tokenizer_2"):
        own = {p.name: p.read_bytes() for p in (folders[0] / part).glob("*.*")}
        written = {p.name: p.read_bytes() for p in (out / part).iterdir()}
        assert {"vocab.json", "merges.txt"} <= written.keys()  # of these transformers 5 writes none
        assert own.items() <= written.items() or "vocab.json" not in own
    kept = json.loads((folders[0] / "text_encoder" / "config.json").read_text())
    written = json.loads((out / "text_encoder" / "config.json").read_text())
    assert kept | {"dtype": "float32", "torch_dtype": "float32"} == written  # else transformers 5 takes the file's type
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        plain, half = out / part / f"{stem}.safetensors", out / part / f"{stem}.fp16.safetensors"
        assert plain.samefile(half), "one file of two names"
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").samefile(
        out / "didr_try_it_1step_unet_fp16.safetensors"
    )


def test_an_export_that_draws_something_else_is_not_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = configuration(folders)
    backbone = build("backbones", config.backbone)
    export = backbone.export
    other = backbone.load_network("generator")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    backbone.export = lambda _, folder: export(other, folder)
    with pytest.raises(DIDRError, match=r"draws another picture than the generator \(mean difference "):
        export_run(config, backbone, backbone.load_network("generator"), tmp_path / "export", redraw=True)
    assert list(tmp_path.iterdir()) == []
