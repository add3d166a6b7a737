"""Replicas end where each of them would alone."""

from __future__ import annotations

import pytest
import torch

from benchmarks import replicas
from benchmarks.exact_world import BatchNoise, batches
from benchmarks.exactness import World, settings
from benchmarks.replicas import Replica
from didr_core.config import Config
from didr_core.train.learner import Learner

SHORT = ("train.batch=16", "train.steps=4")


def alone(config: Config, seed: int, updates: int = 4) -> Learner:
    learner = Learner(config, noise=BatchNoise(seed))
    for batch in batches(config.train.batch, updates):
        learner.step(batch)
    return learner


def same(together: Learner, place: int, single: Learner) -> None:
    for role in ("generator", "ema"):
        stacked = together.generator(role)  # type: ignore[arg-type]
        for value, wanted in zip(stacked.weights, single.generator(role).parameters(), strict=True):  # type: ignore[arg-type, union-attr]
            assert torch.allclose(value[place], wanted, atol=3e-5), role
    moved = [v[place] - single.backbone.load_network("generator").get_parameter(n) for n, v in named(together)]
    assert sum(m.abs().sum().item() for m in moved) > 1, "nothing was trained"


def named(together: Learner) -> list[tuple[str, torch.Tensor]]:
    return list(zip(together.generator_net.names, together.generator_net.weights, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["default", "importance", "tweedie"])
def test_didr_of_two_betas_and_two_seeds(estimator: str) -> None:
    cases = [(1.0, 0), (0.3, 0), (0.3, 1)]
    config = World(2, 1.0).config(SHORT).model_copy(update={"drp": settings(estimator, 1.0)})
    together, calls = replicas.train(config, [Replica(seed, 1 / beta) for beta, seed in cases], 4)
    assert calls > 0
    for place, (beta, seed) in enumerate(cases):
        single = World(2, beta).config(SHORT).model_copy(update={"drp": settings(estimator, beta)})
        same(together, place, alone(single, seed))


@pytest.mark.parametrize("clip", [10.0, 0.01])
def test_a_rival_its_margin_and_a_clip_that_bites(clip: float) -> None:
    common = [*SHORT, f"generator.max_grad_norm={clip}", f"assistant.max_grad_norm={clip}"]
    config = World(2, 1.0).config([*common, "algorithm=dmdr", "algorithm.weight=1", "algorithm.margin=0"])
    together, _ = replicas.train(config, [Replica(0, 0.1, 2.0), Replica(0, 3.0, 1.0)], 4)
    for place, (weight, margin) in enumerate([(0.1, 2.0), (3.0, 1.0)]):
        sets = ["algorithm=dmdr", f"algorithm.weight={weight}", f"algorithm.margin={margin}"]
        same(together, place, alone(World(2, 1.0).config([*common, *sets]), 0))


def test_samples_are_each_replicas_own() -> None:
    config = World(2, 1.0).config(SHORT)
    together, _ = replicas.train(config, [Replica(0), Replica(1)], 2)
    made = replicas.samples(together, 2, 50)
    assert made.shape == (2, 50, 2) and not torch.allclose(made[0], made[1])
