"""The build on a miniature setting: every part runs, finished parts are left alone, a killed part continues bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from examples.tiny_world import training
from examples.tiny_world.build import MINIATURE, PARTS, build_part
from examples.tiny_world.card import render_card
from examples.tiny_world.quality import read_quality

TRAINED = ("prompts", "tokenizer", "vae", "reference", "pairs", "regression", "distill", "anchor", "taste", "judge")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for name in TRAINED:
        assert build_part(name, folder / "build", folder / "world", settings=MINIATURE.get(name))
    return folder


def test_every_part_runs_and_is_timed(miniature):
    assert set(TRAINED) | {"quality", "card"} == set(PARTS)
    assert set(read_quality(miniature / "world")["seconds"]) == set(TRAINED)
    for path in (
        "pipeline/model_index.json",
        "generator/config.json",
        "rewards/taste/config.json",
        "rewards/judge/reward.json",
        "anchor.safetensors",
    ):
        assert (miniature / "world" / path).exists(), path
    assert "CC0" in render_card(read_quality(miniature / "world"))


def test_finished_parts_are_left_alone(miniature):
    assert not build_part("prompts", miniature / "build", miniature / "world", settings=MINIATURE["prompts"])
    with pytest.raises(ValueError, match="unknown part"):
        build_part("nothing", miniature / "build", miniature / "world")


def test_a_killed_part_continues_bit_for_bit(miniature, monkeypatch):
    whole = load_file(miniature / "build" / "regression_unet" / "diffusion_pytorch_model.safetensors")
    (miniature / "build" / "regression_state.pt").unlink()
    (miniature / "build" / "done" / "regression").unlink()
    save = training.Checkpoint.save

    def save_and_die(self, step, force=False):
        save(self, step, force=True)
        if step == 2:
            raise KeyboardInterrupt

    arguments = ("regression", miniature / "build", miniature / "world")
    monkeypatch.setattr(training.Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        build_part(*arguments, settings=MINIATURE["regression"])
    monkeypatch.setattr(training.Checkpoint, "save", save)
    assert build_part(*arguments, settings=MINIATURE["regression"])
    again = load_file(miniature / "build" / "regression_unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_muon_orthogonalises():
    update = training.orthogonalise(torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 and singular.max() < 1.3
