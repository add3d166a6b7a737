"""What a recipe leaves open is decided by what fits, is the same on resume, and changes no number beyond rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import sdxl_folder
from small_learner import batch, learner
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config import Config
from didr_core.plan import fit, memory
from didr_core.plan.memory import Line, Plan, Process
from didr_core.types import DIDRError
from pipelines.align import align


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


def auto(toy: Path, *overrides: str) -> Config:
    both = ["train.micro_batch=auto", "roles.gradient_checkpointing=auto", "workers.train_gpus=0.7"]
    return configs.load(str(toy), ["workers.train=1", "train.batch=24", *both, *overrides])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of 10 GB, and for each sample of a pass 4 GB, 3 with the generator's activations recomputed, 1 with all networks'."""

    def plan(config: Config) -> Plan:
        each = {False: 4, "generator": 3, True: 1}[config.roles.gradient_checkpointing]  # type: ignore[index]
        size = 1e9 * (10 + each * config.sizes.micro_batch) / (1 + memory.MARGIN)
        return Plan([Process("trainer", 1, 0.7, [Line("", "", "", size)], [])], [], 1)

    monkeypatch.setattr(memory, "plan", plan)


@pytest.mark.parametrize(
    ("free", "size", "way"),
    [
        (300, 24, False),  # all of the share
        (43, 8, False),
        (27, 4, False),  # enough for the GPU to be the bound: nothing is recomputed, although 12 would fit with it
        (23, 4, "generator"),
        (21, 8, True),  # not enough without
        (13, 3, True),
        (11, 1, True),
        (10, 1, True),  # does not fit: preflight says what to change
    ],
)
def test_enough_samples_come_first_then_no_recomputation_then_more_samples(
    toy: Path, counted: None, free: float, size: int, way: Any
) -> None:
    config, told = fit.decided(auto(toy), free * 1e9 + 1)
    assert (config.train.micro_batch, config.roles.gradient_checkpointing) == (size, way)
    used = 10 + {False: 4, "generator": 3, True: 1}[way] * size
    assert told.startswith(f"micro-batch {size}: {used:.0f} of {free:.0f} GB, ")
    assert not fit.undecided(config) and fit.decided(config, 1.0) == (config, "")


def test_what_is_named_stays(toy: Path, counted: None) -> None:
    sized, _ = fit.decided(auto(toy, "train.micro_batch=6"), 29e9)
    assert (sized.train.micro_batch, sized.roles.gradient_checkpointing) == (6, "generator")
    whole, _ = fit.decided(auto(toy, "train.micro_batch=null"), 35e9)
    assert (whole.sizes.micro_batch, whole.roles.gradient_checkpointing) == (24, True)
    free, _ = fit.decided(auto(toy, "roles.gradient_checkpointing=false"), 23e9)
    assert (free.train.micro_batch, free.roles.gradient_checkpointing) == (3, False)


def test_the_largest_that_the_real_plan_lets_in(toy: Path) -> None:
    """Beside encoder and reward actors, which share the GPU where nothing is precomputed and are gone where it is."""
    shares = ("workers.encoder_gpus=0.1", "workers.reward_gpus=0.2", "workers.precompute=false")
    config = auto(toy, "roles.gradient_checkpointing=false", *shares)

    def used(size: int, *more: str) -> float:
        made = memory.plan(auto(toy, "roles.gradient_checkpointing=false", *shares, f"train.micro_batch={size}", *more))
        assert made is not None
        return made.gpu_bytes()[1]

    assert used(6) < used(8) < used(12) and used(8, "workers.precompute=true") < used(6)
    assert fit.decided(config, used(8))[0].train.micro_batch == 8
    assert fit.decided(config, used(8) - 1)[0].train.micro_batch == 6
    alone = config.workers.model_copy(update={"precompute": True})
    assert (fit.decided(config.model_copy(update={"workers": alone}), used(8))[0].train.micro_batch or 0) > 8


def test_a_cpu_and_small_families_take_the_whole_share(toy: Path) -> None:
    for config, free in (
        (auto(toy), None),
        (auto(toy, "workers.train_gpus=0"), 1.0),
        (configs.load("exact_2d", ["train.micro_batch=auto", "workers.train_gpus=1"]), 1.0),
    ):
        made, told = fit.decided(config, free)
        assert made.train.micro_batch is None and made.roles.gradient_checkpointing is False
        assert told.startswith(f"micro-batch {config.sizes.share}: nothing")


def test_the_gpu_with_least_room_decides_and_too_little_is_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_free", lambda: 2**60)
    assert fit.here(auto(toy))[0].train.micro_batch == 24
    monkeypatch.setattr(fit, "_free", lambda: 1e6)
    with pytest.raises(DIDRError, match="memory: trainer needs about"):
        fit.here(auto(toy))
    assert fit.here(auto(toy, "device=cpu"))[0].train.micro_batch is None


def test_a_resumed_run_keeps_the_decision(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def decide(config: Config, at_once: int = 1) -> tuple[Config, str]:
        chosen.append(config.train.micro_batch)
        return (fit._with(config, 2, True), "") if fit.undecided(config) else (config, "")

    monkeypatch.setattr(fit, "here", decide)
    short = ["train.steps=1", "evaluation.prompts=0", "train.micro_batch=auto", "roles.gradient_checkpointing=auto"]
    run = align(str(toy), short, output=str(tmp_path / "run"), local=True)
    align(resume=str(run.path), overrides=["train.steps=2"], local=True)
    config = run.config()
    assert chosen == ["auto", 2] and (config.train.micro_batch, config.roles.gradient_checkpointing) == (2, True)


@pytest.mark.parametrize("kinds", [("full", "lora"), ("full", "full"), ("lora", "lora")])
def test_whose_activations_are_recomputed(tmp_path: Path, kinds: tuple[str, str]) -> None:
    """By FLOPs of the two backward passes; gradients are the same whoever recomputes."""
    folder, found, flops = sdxl_folder(tmp_path / "pipeline"), [], []
    for way in (False, "generator", True, "auto"):
        roles = {"generator": kinds[0], "assistant": kinds[1], "gradient_checkpointing": way, "rank": 4}
        subject = learner(folder, roles=roles, algorithm={"name": "diff_instruct"})
        subject.backward(batch(subject), "assistant", lambda part, s=subject: s.assistant_loss(part, "ta0"))  # type: ignore[misc]
        subject.backward(batch(subject), "generator", subject.generator_loss)
        weights = (*subject.generator_weights.values.values(), *subject.assistant_weights.values.values())
        found.append([w.grad for w in weights if w.grad is not None])
        made = memory.plan(subject.config)
        assert made is not None
        flops.append([dict(made.flops)[f"{of}: backward"] for of in ("TA", "generator")])
    assert len(found[0]) > 20
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    none, generator, both, undecided = flops
    assert generator == [none[0], both[1]] and undecided == none
    assert both[0] > 1.2 * none[0] and both[1] > 1.2 * none[1]
