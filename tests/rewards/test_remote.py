"""Rewards that are scored elsewhere: the updates are those with the reward beside the trainer; what is asked for, and done meanwhile."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import clip_folder, sdxl_folder
from torch import Tensor

from didr_core import config as configs
from didr_core.config import Config, build, fingerprint
from didr_core.rewards.remote import RemoteReward
from didr_core.train.learner import Learner
from didr_core.types import Batch, DIDRError, Tensors

PROMPTS = ["red", "a green circle", "blue above", "two squares"]


class Elsewhere:
    """An actor without Ray: it computes when it is waited for. ``log``: what was asked for and waited for, in order."""

    def __init__(self, reward: Any, log: list[str] | None = None) -> None:
        self.reward, self.log = reward, [] if log is None else log
        reward.load()

    def submit(self, images: Tensor, inputs: Tensors, weight: Tensor | None) -> Any:
        self.log.append("asked for scores" if weight is None else "asked for gradients")
        return lambda: self._score(images, inputs, weight)

    def _score(self, images: Tensor, inputs: Tensors, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.log.append("waited")
        with torch.set_grad_enabled(weight is not None):
            score = self.reward.score(images.requires_grad_(weight is not None), inputs)
            return score.detach(), None if weight is None else torch.autograd.grad(score, images, weight)[0]

    def remote(self) -> RemoteReward:
        return RemoteReward(self.submit, self.reward.prepare, self.reward.differentiable)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return sdxl_folder(root / "pipeline"), clip_folder(root / "one", seed=1), clip_folder(root / "two", seed=2, size=16)


def settings(folders: tuple[Path, Path, Path], **changes: Any) -> Config:
    one, two = ({"name": "pickscore", "path": str(folder)} for folder in folders[1:])
    tree: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "backbone": {"name": "sdxl", "pipeline": str(folders[0])},
        "algorithm": "didr",
        "reward": {
            "name": "composite",
            "parts": [{"reward": one, "weight": 0.7, "scale": 0.3}, {"reward": two, "scale": 1.3}],
        },
        "drp": {"estimator": "tweedie", "beta": 0.3},
        "generator": {"lr": 1e-3},
        "assistant": {"lr": 1e-3},
        "train": {"steps": 4, "batch": 4, "micro_batch": 2},
        "data": {"prompts": "unused"},
    }
    return configs.validate(tree | changes)


def batch(of: Learner) -> Batch:
    of.backbone.load_text()
    assert of.reward is not None
    told, spread = of.backbone.encode(PROMPTS), torch.full((4,), 0.35)
    return Batch(torch.arange(4), PROMPTS, PROMPTS, told, of.reward.prepare(PROMPTS), torch.full((4,), 0.1), spread)


def elsewhere(config: Config, parts: tuple[int, ...], log: list[str]) -> Any:
    """The reward of ``config``, of which ``parts`` are scored elsewhere; () : the whole."""
    made = build("rewards", config.reward)  # type: ignore[arg-type]
    if not parts:
        return Elsewhere(made, log).remote()
    made.load()
    for n in parts:
        made.rewards[n] = Elsewhere(made.rewards[n], log).remote()
    return made


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ((), {"algorithm": "didr"}),
        ((0, 1), {"drp": {"estimator": "hybrid"}}),
        ((1,), {"drp": {"estimator": "ode", "steps": 2, "snr_gate": True, "clip": 1.0}}),
        ((0,), {"algorithm": {"name": "diff_instruct_star", "weight": 0.5}}),
        (
            (0,),
            {
                "algorithm": {"name": "diff_instruct_pp", "weight": 0.0},
                "train": {"steps": 4, "batch": 4, "micro_batch": 1},
            },
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_updates_are_those_of_a_reward_beside_the_trainer(
    folders: tuple[Path, Path, Path], parts: tuple[int, ...], changes: dict[str, Any]
) -> None:
    config = settings(folders, **changes)
    log: list[str] = []
    here, there = Learner(config), Learner(config, reward=elsewhere(config, parts, log))
    seen = batch(here)
    for _ in range(3):
        one, two = here.step(seen).metrics, there.step(seen).metrics
        wanted = {
            k: v for k, v in one.items() if parts or k.count("/") < 2
        }  # of a whole, the actor keeps its parts to itself
        assert two == wanted
    assert log and "reward/gain" in wanted
    for name in ("generator", "assistant", "ema"):
        a, b = here.state_dict()[name], there.state_dict()[name]
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_the_ta_and_the_next_micro_batch_are_at_work_while_a_gradient_is_away(folders: tuple[Path, Path, Path]) -> None:
    config = settings(folders, algorithm="didr")
    log: list[str] = []
    there = Learner(config, reward=elsewhere(config, (), log))
    evaluated = there.assistant_net.forward

    def noted(*given: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            log.append("the TA answers")
        return evaluated(*given, **more)

    there.assistant_net.forward = noted  # type: ignore[method-assign]
    there._update_generator(batch(there), 0)
    begun = ["asked for gradients", "the TA answers", "asked for scores"]
    assert log == [*begun, *begun, *["waited"] * 4]  # of two micro-batches: asked first, waited for last


def test_a_gradient_is_scaled_by_what_comes_upstream_and_not_asked_for_in_vain(
    folders: tuple[Path, Path, Path],
) -> None:
    reward = build("rewards", settings(folders).reward.parts[0].reward)  # type: ignore[union-attr]
    actor = Elsewhere(reward)
    remote, inputs = actor.remote(), reward.prepare(PROMPTS)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.tensor([1.0, -0.3, 0.0, 7.0])
    (expected,) = torch.autograd.grad(reward.score(images, inputs), images, upstream)
    (found,) = torch.autograd.grad(remote.score(images, inputs), images, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert actor.log == ["asked for gradients", "waited"] and not found[2].any() and found[3].any()
    with torch.no_grad():
        assert torch.equal(remote.score(images, inputs), reward.score(images, inputs))
    assert not remote.score(images.detach(), inputs).requires_grad
    assert actor.log[2:] == ["asked for scores", "waited"] * 2


def test_what_goes_wrong_there_is_told_here() -> None:
    images = torch.rand(2, 3, 4, 4).requires_grad_()

    def answers(answer: Any) -> RemoteReward:
        future: Future[Any] = Future()
        future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        return RemoteReward(lambda *_: future.result, lambda _: {})

    with pytest.raises(ValueError, match="the reward broke"):
        answers(ValueError("the reward broke")).score(images, {})
    for wrong in ((torch.ones(1), images.detach()), (torch.ones(2), None), (torch.ones(2), torch.ones(2, 3, 4, 5))):
        with pytest.raises(DIDRError, match=r"2 pictures of shape \[3, 4, 4\] were sent.*expected one of each"):
            answers(wrong).score(images, {})


def test_where_a_reward_is_changes_no_number_and_no_cache(folders: tuple[Path, Path, Path]) -> None:
    """`placement` is a key of every reward, written down where it says something, and no part of what baselines follow from."""
    plain = settings(folders)
    tree = configs.dump(plain)
    assert "placement" not in str(tree) and not plain.pools
    tree["reward"]["parts"][1]["reward"] |= {"placement": "actors", "actors": {"count": 2, "gpus": 0.25}}
    moved = configs.validate(tree)
    assert configs.validate(configs.dump(moved)) == moved and list(moved.pools) == ["reward.parts[1].reward"]
    assert moved.pools["reward.parts[1].reward"].actors.count == 2  # type: ignore[attr-defined]
    assert fingerprint.component("rewards", plain.reward) == fingerprint.component("rewards", moved.reward)  # type: ignore[arg-type]
    tree["reward"]["placement"] = "actors"  # of a composite: of all its parts
    assert list(configs.validate(tree).pools) == ["reward.parts[0].reward", "reward.parts[1].reward"]
    tree["judge"] = {**tree["reward"]["parts"][1]["reward"]}
    with pytest.raises(DIDRError, match="judge.placement='actors'.*leave it out"):
        configs.validate(tree)
    black_box = configs.load("tiny_blackbox")
    assert list(black_box.pools) == ["reward"] and not black_box.in_actors
