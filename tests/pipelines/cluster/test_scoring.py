"""Rewards without a gradient, scored by actors during training: the same numbers as in one process, and actors that die are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import clip_folder
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import build
from didr_core.data import scales
from didr_core.train.run_folder import RunFolder
from pipelines.align import align
from pipelines.cluster.resources import Need
from pipelines.cluster.session import ray_session

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_actors_score_as_one_process_does_and_the_dead_are_replaced(tmp_path: Path) -> None:
    """And, in the same Ray, a composite's missing scales are measured there as they are here."""
    import ray

    from pipelines.cluster.group import measured_scales
    from pipelines.cluster.scoring import ActorReward, start_scorers

    part = {"reward": {"name": "pickscore", "path": str(clip_folder(tmp_path / "part"))}}
    parts = {"name": "composite", "parts": [part], "measure_prompts": 2}
    open_scales = configs.load(str(toy_recipe(tmp_path, reward=parts)))
    config = configs.load("tiny_blackbox", ["workers.rewards=2"])
    assert config.reward is not None
    here = build("rewards", config.reward)
    captions = ["a red circle", "two blue squares", "a green triangle above a red circle"]
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1, 0, 0, 0] = float("nan")
    with ray_session("local", 4) as view:
        assert measured_scales(open_scales, view) == scales.resolve(open_scales)
        actors = start_scorers(config, Need(cpus=0.5))
        reward = ActorReward(actors)
        inputs = reward.prepare(captions)
        expected = here.score(images, here.prepare(captions))
        assert expected.isnan().tolist() == [False, True, False]
        assert torch.equal(reward.score(images, inputs).nan_to_num(), expected.nan_to_num())
        ray.kill(actors[0], no_restart=False)
        assert torch.equal(reward.score(images, inputs).nan_to_num(), expected.nan_to_num())


def test_a_run_with_a_black_box_is_the_same_on_ray_and_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`toy:Opaque` has no gradient; only the Ray run scores it in actors."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    recipe = toy_recipe(
        tmp_path,
        reward={"name": "toy:Opaque", "bad": "none"},
        drp={"estimator": "importance", "steps": 2, "particles": 3, "beta": 0.5},
        train={"steps": 2, "batch": 4, "checkpoint_every": 2},
        workers={"train": 1, "local_cpus": 5},
        evaluation={"grid": 2, "prompts": 0},
    )
    there, here = RunFolder(tmp_path / "there"), RunFolder(tmp_path / "here")
    align(str(recipe), output=str(there.path), address="local")
    align(str(recipe), output=str(here.path), local=True)
    one, two = ([json.loads(line) for line in r.metrics_path.read_text().splitlines()] for r in (there, here))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for key in ("reward/proxy", "reward/gain", "loss/generator", "drs/ratio"):
            assert np.isclose(a[key], b[key], rtol=1e-4), key
