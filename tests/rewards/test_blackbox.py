"""Rewards without a gradient: who may use them, and the analytic checker as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from didr_core import config as configs
from didr_core.config import build
from didr_core.types import DIDRError
from didr_core.world import assess
from didr_core.world.checker_reward import CheckerReward

CHECKER = 'reward={name: "didr_core.world.checker_reward:CheckerReward"}'


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ([CHECKER], r"drp\.estimator='hybrid' needs.*drp\.estimator=importance"),
        ([CHECKER, "drp.estimator=tweedie"], r"drp\.estimator='tweedie' needs"),
        ([CHECKER, "algorithm=diff_instruct_pp", "drp.estimator=importance"], "'diff_instruct_pp' needs"),
        (
            ['reward={name: composite, parts: [{reward: {name: "didr_core.world.checker_reward:CheckerReward"}}]}'],
            "composite",
        ),
    ],
)
def test_an_estimator_or_rival_that_needs_a_gradient_refuses_in_the_config(settings: list[str], fix: str) -> None:
    with pytest.raises(DIDRError, match=fix):
        configs.load("exact_2d", settings)


def test_who_is_a_black_box() -> None:
    assert configs.load("tiny_blackbox").black_box
    assert not configs.load("tiny_blackbox", ["algorithm=diff_instruct"]).black_box  # asks for no reward
    assert not configs.load("tiny").black_box


def test_the_checker_reward_is_the_worlds_utility() -> None:
    reward = build("rewards", CheckerReward.Config())
    captions = ["a red circle", "three blue squares"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    inputs = reward.prepare(captions)
    assert inputs["caption"].dtype == torch.uint8 and inputs["caption"].shape[0] == 2
    assert np.array_equal(reward.score(images, inputs).numpy(), assess.utility(images.numpy(), captions))
    images[0] = float("inf")
    assert reward.score(images, inputs).isnan().tolist() == [True, False]


def test_a_prompt_from_another_world_is_named() -> None:
    with pytest.raises(DIDRError, match=r"'a cat in the rain' is not a caption.*data\.prompts"):
        build("rewards", CheckerReward.Config()).prepare(["a cat in the rain"])
