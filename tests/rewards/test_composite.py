"""Composite rewards: standardisation, what beta means, measured scales; and rewards that live outside of the package."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import clip_folder, prompt_shards, sdxl_folder

from didr_core import config
from didr_core.config import Config, registry
from didr_core.data import scales
from didr_core.data.feed import LocalFeed, PromptEncoder, RewardPreparer
from didr_core.data.prompts import columns
from didr_core.rewards.composite import Composite, part_names
from didr_core.train.learner import Learner
from didr_core.types import DIDRError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composite")
    sdxl_folder(root / "pipeline")
    clip_folder(root / "one", seed=1)
    clip_folder(root / "two", seed=2, size=16)
    prompt_shards(root / "prompts")
    (root / "colourful.py").write_text(readme_example())
    return root


def readme_example() -> str:
    text = (ROOT / "didr_core" / "rewards" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "class Colourful" in code
    return str(code)


def tree(root: Path, reward: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "seed": 3,
        "backbone": {"name": "sdxl", "pipeline": str(root / "pipeline")},
        "algorithm": "didr",
        "reward": reward,
        "generator": {"lr": 1e-3},
        "assistant": {"lr": 1e-3},
        "train": {"steps": 2, "batch": 4},
        "data": {"prompts": str(root / "prompts")},
    }


def part(root: Path, which: str = "one", **more: Any) -> dict[str, Any]:
    return {"reward": {"name": "pickscore", "path": str(root / which)}, **more}


def composite(root: Path, *parts: dict[str, Any], **more: Any) -> Config:
    return config.validate(tree(root, {"name": "composite", "parts": list(parts), **more}))


def first_step(of: Config) -> dict[str, float]:
    return Learner(of).step(next(iter(LocalFeed(of)))).metrics


def test_beta_means_the_same_for_a_reward_and_for_a_composite_of_it(root: Path) -> None:
    single = first_step(config.validate(tree(root, part(root)["reward"])))
    for scale, weight in ((1.0, 1.0), (0.37, 1.0), (1.0, 5.0)):
        metrics = first_step(composite(root, part(root, scale=scale, weight=weight)))
        for key in ("drs/rms", "matching/rms", "reward/gain", "reward/proxy", "loss/generator"):
            assert metrics[key] == pytest.approx(single[key], rel=2e-3, abs=1e-4), (key, scale, weight)
        assert metrics["reward/pickscore/raw"] == pytest.approx(single["reward/raw"], rel=1e-4)
        assert metrics["reward/pickscore/weighted"] == pytest.approx(metrics["reward/raw"], rel=1e-4)


def test_a_composite_is_the_weighted_sum_of_its_scaled_parts(root: Path) -> None:
    of = composite(root, part(root, scale=0.5), part(root, "two", weight=-0.25, scale=2.0)).reward
    reward = Composite(of)  # type: ignore[arg-type]
    reward.check()
    reward.load()
    prompts = ["a red circle", "blue"]
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    inputs = reward.prepare(prompts)
    alone = [r.score(images, r.prepare(prompts)) for r in reward.rewards]
    total, log = reward.details(images, inputs)
    assert torch.allclose(total, alone[0] / 0.5 - 0.25 * alone[1] / 2.0, atol=1e-5)
    assert torch.equal(total, reward.score(images, inputs))
    assert set(log) == {f"{n}/{k}" for n in ("pickscore", "pickscore_2") for k in ("raw", "scaled", "weighted")}
    assert torch.allclose(log["pickscore_2/scaled"], alone[1] / 2.0, atol=1e-5)
    assert torch.allclose(log["pickscore_2/weighted"], -0.125 * alone[1], atol=1e-5)


def test_missing_scales_are_measured_as_the_baselines_spread_is(root: Path) -> None:
    open_ = composite(root, part(root), part(root, "two", scale=7.0), measure_prompts=6)
    assert scales.missing(open_) == ["reward"]
    done = scales.resolve(open_)
    assert scales.missing(done) == [] and scales.resolve(done) is done
    assert config.validate(config.dump(done)) == done  # what a resumed run reads
    first, second = done.reward.parts  # type: ignore[union-attr]
    assert second.scale == 7.0
    single = config.validate(tree(root, part(root)["reward"]))
    from didr_core.data.prompts import PromptIndex

    batch = columns(PromptIndex.open(single.data.prompts).read(np.arange(6), single.seed))
    spread = RewardPreparer(single)(PromptEncoder(single)(batch))["spread"]
    assert first.scale == pytest.approx(float(np.sqrt(spread.mean())), rel=1e-3)


def test_what_a_composite_refuses(root: Path) -> None:
    with pytest.raises(DIDRError, match="parts"):
        composite(root)
    with pytest.raises(
        DIDRError, match=r"reward: composite: parts\.0\.reward: pickscore has no key 'pth'.*Did you mean 'path'"
    ):
        composite(root, {"reward": {"name": "pickscore", "path": "x", "pth": "y"}})
    with pytest.raises(DIDRError, match="leave it out"):
        composite(root, part(root, weight=0))
    with pytest.raises(DIDRError, match="scale"):
        composite(root, part(root, scale=0))
    with pytest.raises(DIDRError, match="composite inside a composite"):
        composite(root, {"reward": {"name": "composite", "parts": [part(root)]}})
    with pytest.raises(DIDRError, match="pikscore.*Did you mean 'pickscore'"):
        composite(root, {"reward": {"name": "pikscore", "path": "x"}})
    lost = composite(root, part(root), part(root, "three")).reward
    with pytest.raises(DIDRError, match=r"reward\.parts\[1\] \(pickscore\): .*no such folder"):
        Composite(lost).check()  # type: ignore[arg-type]
    unscaled = Composite(composite(root, part(root)).reward)  # type: ignore[arg-type]
    unscaled.load()
    with pytest.raises(DIDRError, match="pickscore has scale=None"):
        unscaled.score(torch.rand(1, 3, 16, 16), unscaled.prepare(["x"]))
    blind = composite(root, {"reward": {"name": f"{root}/colourful.py:Colourful", "grey": ""}}, measure_prompts=2)
    with pytest.raises(DIDRError, match=r"reward\.parts\[0\] \(Colourful\).*expected a number above 0"):
        scales.resolve(blind)


def test_parts_of_one_kind_are_numbered(root: Path) -> None:
    of = composite(root, part(root), part(root, "two"), {"reward": {"name": "clip_score", "path": str(root / "one")}})
    assert part_names(of.reward) == ["pickscore", "pickscore_2", "clip_score"]  # type: ignore[arg-type]


def test_the_readmes_reward_trains_from_its_file(root: Path) -> None:
    name = f"{root}/colourful.py:Colourful"
    of = config.validate(tree(root, {"name": name, "grey": "gray"}))
    kind = registry.find("rewards", name)
    assert kind.__name__ == "Colourful" and registry.find("rewards", name) is kind
    metrics = first_step(of)
    assert np.isfinite(metrics["reward/gain"]) and metrics["drs/rms"] > 0
    both = composite(root, part(root, scale=1.0), {"reward": {"name": name}, "scale": 0.1})
    assert "reward/Colourful/raw" in first_step(both)


def test_a_config_reaches_other_processes_with_rewards_that_live_in_files(root: Path) -> None:
    """As Ray's workers get it: pickled here, unpickled where the file was never imported."""
    of = config.validate(tree(root, {"name": f"{root}/colourful.py:Colourful", "grey": "gray"}))
    code = "import pickle, sys; c = pickle.load(sys.stdin.buffer); print(type(c.reward).__qualname__, c.reward.grey)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(of), cwd=ROOT, capture_output=True)
    assert done.stdout.decode().split() == ["Colourful.Config", "gray"], done.stderr.decode()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.module:X", "No module named"),
        ("toy:Absent", "no attribute"),
        ("nowhere/file.py:X", "No such file"),
        ("toy:toy_recipe", "no nested Config"),
    ],
)
def test_plug_ins_that_cannot_be_found_are_named(name: str, words: str) -> None:
    with pytest.raises(DIDRError, match=words) as said:
        registry.find("rewards", name)
    assert repr(name) in str(said.value)
