"""What a reward from outside may get wrong, and that it is told with what came and what was expected, wherever the reward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Component, build
from didr_core.data.feed import LocalFeed
from didr_core.evaluate.evaluator import Evaluator
from didr_core.train.learner import Learner
from didr_core.types import Batch, DIDRError, NonFiniteError
from pipelines.cluster.scoring import Scorer

ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one": (lambda x: x.mean((1, 2, 3))[:1], "a tensor of shape [1], float32,"),
    "column": (lambda x: x.mean((2, 3))[:, :1], "a tensor of shape [4, 1], float32,"),
    "many": (lambda x: x.mean((2, 3)), "a tensor of shape [4, 3], float32,"),
    "scalar": (lambda x: x.mean(), "a tensor of shape [], float32,"),
    "whole numbers": (lambda x: x.mean((1, 2, 3)).long(), "a tensor of shape [4], int64,"),
    "a number": (lambda x: 0.5, "float 0.5"),
    "a list": (lambda x: [0.5] * len(x), "list [0.5, 0.5, 0.5, 0.5]"),
    "numpy": (lambda x: x.detach().mean((1, 2, 3)).numpy(), "ndarray"),
    "nothing": (lambda x: None, "NoneType None"),
}


class Wrong:
    """`test_contract`'s reward, by the key of :data:`ANSWERS`."""

    differentiable = True
    later = False  # right at the first call

    class Config(Component):
        answer: str

    def __init__(self, config: Config) -> None:
        self.answer, self.calls = config.answer, 0

    def load(self, device: torch.device | str = "cpu") -> None:
        pass

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {}

    def score(self, images: Tensor, inputs: Any) -> Any:
        self.calls += 1
        if self.later and self.calls == 1:
            return images.mean((1, 2, 3))
        return ANSWERS[self.answer][0](images)


class Late(Wrong):
    later = True


class Opaque(Wrong):
    differentiable = False


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"), train={"steps": 2, "batch": 4}, workers={"train": 1})


def load(toy: Path, answer: str, kind: str = "Wrong", *more: str) -> configs.Config:
    return configs.load(str(toy), more, {"reward": {"name": f"{__file__}:{kind}", "answer": answer}})


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_wrong_answer_is_refused_at_every_call(toy: Path, answer: str) -> None:
    for kind, fine in (("Wrong", 0), ("Late", 1)):
        reward, images = build("rewards", load(toy, answer, kind).reward), torch.rand(4, 3, 8, 8)
        for _ in range(fine):
            assert reward.score(images, {}).shape == (4,)
        with pytest.raises(DIDRError) as error:
            reward.score(images, {})
        said = str(error.value)
        assert f":{kind}'" in said and "\n" not in said
        assert f"returned {ANSWERS[answer][1]}" in said and "expected a float tensor of shape [4]" in said


def test_the_feed_the_trainer_the_actor_and_the_evaluation_refuse_it(toy: Path) -> None:
    config = load(toy, "one")
    with pytest.raises(DIDRError, match=r"returned a tensor of shape \[1\]"):
        next(iter(LocalFeed(config)))
    good = next(iter(LocalFeed(configs.load(str(toy)))))
    batch = Batch(good.index, good.ids, good.prompts, good.condition)
    with pytest.raises(DIDRError, match=r"shape \[1\], float32, for 4 picture"):
        Learner(config).step(batch)
    black_box = load(toy, "one", "Opaque", "drp.estimator=importance", "drp.steps=2")
    with pytest.raises(DIDRError, match=r"shape \[1\]"):
        Scorer(black_box).score(torch.rand(4, 3, 8, 8).numpy(), {})
    learner = Learner(config)
    evaluator = Evaluator.of(
        config, list(good.prompts), range(1), "cpu", backbone=learner.backbone, reward=learner.reward
    )
    with pytest.raises(DIDRError, match=r"shape \[1\]"):
        evaluator.judges.look(good.prompts, evaluator._parts[0].inputs, [(torch.rand(4, 3, 8, 8), {})])


def test_a_score_without_its_gradient_is_refused() -> None:
    reward = build("rewards", Detached.Config(name=f"{__file__}:Detached"))
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(DIDRError, match="score without a gradient, and says differentiable = True"):
        reward.score(images, {})
    with torch.no_grad():
        assert reward.score(images, {}).shape == (2,)


def test_prepared_inputs_have_a_row_for_each_prompt() -> None:
    reward = build("rewards", Detached.Config(name=f"{__file__}:Detached"))
    with pytest.raises(DIDRError, match=r"prepare\(\) returned a tensor of shape \[1\], float32, as 'x' for 3 prompt"):
        reward.prepare(["a", "b", "c"])
    with pytest.raises(DIDRError, match=r"prepare\(\) returned NoneType None for 1 prompt"):
        reward.prepare(["a"])


class Detached(Wrong):
    class Config(Component):
        answer: str = ""

    def prepare(self, prompts: Sequence[str]) -> Any:
        return {"x": torch.zeros(1)} if len(prompts) > 1 else None

    def score(self, images: Tensor, inputs: Any) -> Tensor:
        return images.detach().mean((1, 2, 3))


def test_a_baseline_that_is_not_finite_is_refused_in_the_head_start_too(toy: Path) -> None:
    config = configs.load(str(toy), ["train.assistant_warmup=1"])
    learner, batch = Learner(config), next(iter(LocalFeed(config)))
    assert batch.spread is not None
    batch.spread[2] = float("nan")
    with pytest.raises(NonFiniteError, match="step 1: non-finite reward of the starting") as error:
        learner.step(batch)
    assert repr([batch.ids[2]]) in str(error.value) and torch.isfinite(learner.scale.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class R:\n    pass", "has no nested Config class"),
        ("R = 3", "has no nested Config class"),
        (
            "from didr_core.config import Component\nclass R:\n    class Config(Component): ...",
            "has no method load and no",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("class R(", "SyntaxError"),
    ],
)
def test_a_class_that_is_no_reward_is_refused_before_anything_is_loaded(
    toy: Path, tmp_path: Path, code: str, said: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(DIDRError, match="rewards: ") as error:
        configs.load(str(toy), [f"reward={path}:R"])
    assert said in str(error.value) and str(path) in str(error.value)
