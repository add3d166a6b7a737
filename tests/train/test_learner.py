"""The update itself, on random SDXL-class models: invariances, refusal of non-finite values. Resumes: test_resume.py."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_models import clip_folder, sdxl_folder
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_learner import saved

from benchmarks.exact_world import BatchNoise, batches
from didr_core import config
from didr_core.algorithms import losses
from didr_core.config import Anchor
from didr_core.data.teacher_pairs import TeacherPairs
from didr_core.diffusion.schedule import RectifiedFlow
from didr_core.train import checkpoint
from didr_core.train.learner import Learner
from didr_core.types import Batch, DIDRError, NonFiniteError

PROMPTS = ["red", "a green circle", "blue above", "two squares"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return sdxl_folder(root / "pipeline"), clip_folder(root / "clip")


def learner(folders: tuple[Path, Path], **changes: Any) -> Learner:
    tree = {
        "name": "test",
        "seed": 3,
        "backbone": {"name": "sdxl", "pipeline": str(folders[0])},
        "algorithm": "didr",
        "reward": {"name": "pickscore", "path": str(folders[1])},
        "generator": {"lr": 1e-3},
        "assistant": {"lr": 1e-3},
        "train": {"steps": 6, "batch": 4},
        "data": {"prompts": "unused"},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    return Learner(config.validate(tree))


def batch(of: Learner, spread: float = 0.25) -> Batch:
    if of.backbone._text is None:  # type: ignore[attr-defined]
        of.backbone.load_text()
    inputs = of.reward.prepare(PROMPTS) if of.reward else {}
    n = len(PROMPTS)
    return Batch(
        torch.arange(n), PROMPTS, PROMPTS, of.backbone.encode(PROMPTS), inputs, torch.zeros(n), torch.full((n,), spread)
    )


def weights(of: Learner) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in of.generator_net.parameters()])


@pytest.mark.parametrize("estimator", ["tweedie", "shift", "stochastic", "importance", "hybrid"])
def test_micro_batches_do_not_change_the_update(folders: tuple[Path, Path], estimator: str) -> None:
    drp = {
        "estimator": estimator,
        "steps": 1 if estimator in ("tweedie", "shift") else 3,
        "particles": 2,
        "snr_gate": True,
        "clip": 0.5,
    }
    rates = {"generator": {"lr": 0.1}, "assistant": {"lr": 0.1}}
    whole, parts = learner(folders, drp=drp, **rates), learner(folders, drp=drp, train={"micro_batch": 1}, **rates)
    # SGD in place of Adam, whose first update is the gradient's sign and so blows up rounding
    for each in (whole, parts):
        each.generator_opt = torch.optim.SGD(each.generator_net.parameters())
        each.assistant_opt = torch.optim.SGD(each.assistant_net.parameters())
    start = weights(whole)
    a, b = whole.step(batch(whole)), parts.step(batch(parts))
    moved = (weights(whole) - start).abs().max()
    assert moved > 1e-4
    assert (weights(whole) - weights(parts)).abs().max() < 1e-3 * moved
    assert a.metrics["loss/generator"] == pytest.approx(b.metrics["loss/generator"], rel=1e-4)


@pytest.mark.parametrize("where", ["reward", "baseline"])
def test_a_nan_names_the_prompt_and_changes_no_generator_weight(folders: tuple[Path, Path], where: str) -> None:
    subject = learner(folders)
    data = batch(subject)
    broken = data.reward_inputs["text"].clone() if where == "reward" else None
    if broken is not None:
        broken[2] = float("nan")
        object.__setattr__(data, "reward_inputs", {"text": broken})
    else:
        assert data.baseline is not None
        data.baseline[2] = float("nan")
    before = weights(subject)
    with pytest.raises(NonFiniteError, match="blue above") as error:
        subject.step(data)
    assert "red" not in str(error.value)
    assert torch.equal(weights(subject), before)


def test_beta_scales_the_drs_and_the_reward_scale_cancels_units(folders: tuple[Path, Path]) -> None:
    base = learner(folders, drp={"estimator": "tweedie", "beta": 1.0})
    hot = learner(folders, drp={"estimator": "tweedie", "beta": 0.5})
    wide = learner(folders, drp={"estimator": "tweedie", "beta": 1.0})
    one, two = base.step(batch(base)).metrics, hot.step(batch(hot)).metrics
    three = wide.step(batch(wide, spread=1.0)).metrics
    assert two["drs/rms"] == pytest.approx(2 * one["drs/rms"], rel=1e-3)
    assert three["drs/rms"] == pytest.approx(one["drs/rms"] * 0.5, rel=1e-3)


def test_a_reward_without_a_spread_is_refused(folders: tuple[Path, Path]) -> None:
    subject = learner(folders)
    data = batch(subject, spread=0.0)
    with pytest.raises(DIDRError, match=r"all have the same one.*raise train\.batch or baseline\.samples"):
        subject.step(data)
    assert data.spread is not None
    data.spread[1], subject.scale.total[:] = 0.5, 0
    subject.step(data)
    assert subject.scale.value == pytest.approx((0.5 / 4) ** 0.5)


def test_warm_up_counts_the_updates_of_each_network(folders: tuple[Path, Path]) -> None:
    """Two a step for the TA from the first; for the generator none until it starts."""
    warm = {"lr": 1.0, "warmup": 4}
    subject = learner(
        folders, generator=warm, assistant=warm, train={"assistant_updates": 2, "assistant_warmup": 2, "batch": 4}
    )
    seen: dict[str, list[float]] = {"generator": [], "assistant": []}
    for name, rates in seen.items():
        optimizer = getattr(subject, f"{name}_opt")
        optimizer.step = lambda o=optimizer, to=rates: to.append(o.param_groups[0]["lr"])
    for _ in range(5):
        subject.step(batch(subject))
    assert seen["assistant"] == [0.25, 0.5, 0.75] + 7 * [1.0]
    assert seen["generator"] == [0.25, 0.5, 0.75]


def test_pure_noise_of_rectified_flow_has_a_finite_update() -> None:
    class Last(BatchNoise):
        def uniform(self, index: Any, tag: str, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
            return torch.ones(len(index))

    subject = Learner(config.load("exact_2d", ["train.batch=8", "drp.estimator=hybrid"]), noise=Last(0))
    subject.backbone.schedule = RectifiedFlow()
    assert all(math.isfinite(v) for v in subject.step(next(batches(8, 1))).metrics.values())


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_anchor_pairs_average_over_ranks_to_the_mean_of_the_batch(workers: int, tmp_path: Path) -> None:
    """Unequal shares, and ranks without a pair."""
    torch.manual_seed(0)
    save_file({"z": torch.randn(16, 3), "x0": torch.randn(16, 3), "condition.c": torch.randn(16, 2)}, tmp_path / "p")
    pairs = TeacherPairs(Anchor(pairs=str(tmp_path / "p"), weight=1.0, batch=4), (3,), "cpu")

    def mean(world: int) -> float:
        values = []
        for rank in range(world):
            z, x0, condition, share = pairs.draw(5, 7, SimpleNamespace(rank=rank, world_size=world))  # type: ignore[arg-type]
            assert len(z) == len(condition) > 0
            values.append(share * pairs.loss(z, x0))
        return torch.stack(values).mean().item()

    assert mean(workers) == pytest.approx(mean(1), rel=1e-6)


def test_diff_instruct_is_still_where_assistant_and_reference_agree(folders: tuple[Path, Path]) -> None:
    subject = learner(folders, algorithm="diff_instruct", guidance={"reference": 1.0}, assistant={"lr": 1e-12})
    metrics = subject.step(batch(subject)).metrics
    assert metrics["matching/rms"] < 1e-4
    assert "drs/rms" not in metrics and "reward/raw" not in metrics


def test_matching_loss_has_the_stated_gradient() -> None:
    torch.manual_seed(0)
    x0, direction = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    losses.matching(x0, direction).sum().backward()
    assert x0.grad is not None
    assert torch.allclose(x0.grad, direction / 48)


def test_clip_caps_only_what_is_above_the_limit() -> None:
    x = torch.ones(2, 1, 2, 2) * torch.tensor([3.0, 0.5]).view(2, 1, 1, 1)
    clipped, share = losses.clip_rms(x, torch.tensor([1.0, 1.0]))
    assert torch.allclose(losses.rms(clipped), torch.tensor([1.0, 0.5]))
    assert share.tolist() == [1.0, 0.0]


def test_a_full_disk_keeps_the_last_checkpoint(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = learner(folders)
    saved(subject, tmp_path, {"n": 1})

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DIDRError, match=r"disk is full: about [\d,]+ bytes needed"):
        saved(subject, tmp_path, {"n": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path, subject) == {"n": 1}
    assert not list(tmp_path.parent.glob(".*.part"))
