"""Rewards scored by actors during training: the same numbers as in one process, and actors that are lost are replaced."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import build
from didr_core.data import scales
from didr_core.train.observer import Observer
from didr_core.train.patience import Patience
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError, NoAnswerError
from pipelines.align import align
from pipelines.cluster.resources import ClusterView

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_actors_score_as_one_process_does_and_the_lost_are_replaced(
    ray_here: ClusterView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, in the same Ray: missing scales, a hung call, an environment of its own, a pool that grows and shrinks, a whole run."""
    import ray

    from pipelines.cluster import keeper
    from pipelines.cluster.group import measured_scales
    from pipelines.cluster.scoring import placed, start_pools

    recipe = toy_recipe(tmp_path, workers={"train": 1, "local_cpus": 5}, evaluation={"grid": 2, "prompts": 4})
    pickscore = configs.load(str(recipe)).reward
    assert pickscore is not None
    part = {"reward": pickscore.model_dump() | {"placement": "actors"}}
    own = {"runtime_env": {"env_vars": {"FACTOR": "2"}}, "count": 2, "cpus": 0.5}
    wayward = {"name": "toy:Wayward", "orders": str(tmp_path), "placement": "actors", "actors": own}
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions, calls, said = (
        ["a red circle", "two blue squares", "a green triangle above a red circle"],
        tmp_path / "calls",
        [],
    )
    open_scales = configs.load(
        str(recipe), values={"reward": {"name": "composite", "parts": [part], "measure_prompts": 2}}
    )
    assert measured_scales(open_scales, ray_here) == scales.resolve(open_scales)

    black_box = configs.load("tiny_blackbox", ["workers.rewards=2"])
    here = build("rewards", black_box.reward)  # type: ignore[arg-type]
    reward = placed(black_box, pools := start_pools(black_box, ray_here))
    spoilt = images.clone()
    spoilt[1, 0, 0, 0] = float("nan")
    expected = here.score(spoilt, here.prepare(captions))
    assert expected.isnan().tolist() == [False, True, False]
    assert torch.equal(reward.score(spoilt, reward.prepare(captions)).nan_to_num(), expected.nan_to_num())
    ray.kill(pools[0].actors[0], no_restart=False)
    assert torch.equal(reward.score(spoilt, reward.prepare(captions)).nan_to_num(), expected.nan_to_num())
    del reward, pools

    config = configs.load(str(recipe), values={"reward": wayward})
    (pool,) = start_pools(config, ray_here, calls)
    pool.share_with(0, 1, said.append)
    remote, here = placed(config, [pool]), build("rewards", config.reward)  # type: ignore[arg-type]
    inputs = remote.prepare(captions)
    assert inputs["factor"].tolist() == [2.0] * 3 and os.environ.get("FACTOR") is None
    pictures = images.requires_grad_()
    (expected,) = torch.autograd.grad(here.score(pictures, inputs).sum(), pictures)

    def graded(remote: Any = remote) -> torch.Tensor:
        return torch.autograd.grad(remote.score(pictures, inputs).sum(), pictures)[0]

    assert torch.equal(graded(), expected) and not said
    (tmp_path / "order").write_text("die")
    assert torch.equal(graded(), expected) and "was lost in a call; another one is asked (1 of 3)" in said[0]
    said.clear()
    (tmp_path / "order").write_text("throw")
    with pytest.raises(ray.exceptions.RayTaskError, match="told to throw"):
        graded()
    assert not said  # it would throw again
    (tmp_path / "order").write_text("hang")
    waits = remote.begin(pictures, inputs, None)  # type: ignore[misc]
    while (tmp_path / "order").exists():
        time.sleep(0.1)
    patience = Patience(Observer(), 3.0, calls)
    with pytest.raises(
        NoAnswerError, match=r"the scoring actor of 'toy:Wayward' .* scoring \d pictures, has not answered for"
    ):
        while True:
            time.sleep(0.1)
            patience.look()
    pool.settings = pool.settings.model_copy(update={"timeout_s": 5.0})
    assert torch.equal(torch.autograd.grad(waits()[0].sum(), pictures)[0], expected)
    assert "gave no answer for 5 s (reward.actors.timeout_s)" in said[0]
    del remote, graded, pool, waits

    monkeypatch.setattr(keeper, "IDLE_S", 10.0)
    ranged = configs.load(str(recipe), values={"reward": wayward | {"actors": {"count": [1, 2], "cpus": 0.5}}})
    (pool,) = start_pools(ranged, ray_here, calls)
    remote, pictures = placed(ranged, [pool]), images.detach().requires_grad_()
    said.clear()
    pool.share_with(0, 1, said.append)
    (expected,) = torch.autograd.grad(here.score(pictures, inputs).sum(), pictures)
    while len(pool.actors) < 2 or pool.coming:  # asked without a pause
        assert torch.equal(torch.autograd.grad(remote.score(pictures, inputs).sum(), pictures)[0], expected)
    assert said == ["scoring actors of 'toy:Wayward': 2, 1 before"]
    _, second = pool.actors
    while second in pool.actors:
        time.sleep(12.0)
        pool.tell()
    assert torch.equal(torch.autograd.grad(remote.score(pictures, inputs).sum(), pictures)[0], expected)
    assert said[1:] == ["scoring actors of 'toy:Wayward': 1, 2 before"]
    del remote, pool, second

    moved = ["reward.placement=actors", "reward.actors.count=[1,2]", "reward.actors.cpus=0.5", "train.micro_batch=4"]
    there, alone = (RunFolder(tmp_path / name) for name in ("there", "alone"))
    align(str(recipe), moved, output=str(there.path), address="local")
    align(str(recipe), ["train.micro_batch=4"], output=str(alone.path), local=True)
    one, two = ((run.checkpoint(run.last_step()) / "SHA256SUMS").read_text() for run in (there, alone))
    assert one == two and "generator" in one  # of all weights and moments
    assert (there.path / "scores.npz").read_bytes() == (alone.path / "scores.npz").read_bytes()
    with pytest.raises(DIDRError, match="placement='actors'.*no actors in one process.*--local"):
        align(str(recipe), moved, output=str(tmp_path / "refused"), local=True)


def test_a_run_with_a_black_box_is_the_same_on_ray_and_in_one_process(ray_here: ClusterView, tmp_path: Path) -> None:
    """`toy:Opaque` has no gradient; only the Ray run scores it in actors."""
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
