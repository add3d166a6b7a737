"""bfloat16 weights that move: masters and stochastic rounding against plain rounding, and against float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import sdxl_folder
from small_learner import batch, learner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from didr_core import config
from didr_core.config import Optim
from didr_core.networks import optim
from didr_core.networks.optim import StochasticAdamW, Weights, stochastic_round
from didr_core.types import DIDRError

LR, STEPS = 5e-7, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("precision") / "pipeline")


class Calls(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def matrix(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64, bias=False).to(dtype)


def descend(network: nn.Linear, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    """A constant gradient of 1: Adam moves every weight by -lr an update."""
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        network.weight.sum().backward()
        optimizer.step()


def ours(network: nn.Linear, update: optim.Update, **changes: Any) -> tuple[Weights, torch.optim.Optimizer]:
    weights = Weights(network, update)
    return weights, optim.optimizer(weights, Optim(lr=LR, **changes), seed=7)


def test_plain_bfloat16_stands_still_and_ours_moves() -> None:
    """Weights of size 0.07 lie 5e-4 apart in bfloat16: 200 steps of 5e-7 are a fifth of that."""
    expected = -LR * STEPS
    start = matrix(torch.bfloat16).weight.detach().clone()
    big = start.float().abs() > 0.02
    plain = matrix(torch.bfloat16)
    descend(plain, torch.optim.AdamW(plain.parameters(), lr=LR, betas=(0.0, 0.99), weight_decay=0.0))
    assert torch.equal(plain.weight[big], start[big])

    mastered = matrix(torch.bfloat16)
    weights, optimizer = ours(mastered, "master")
    descend(mastered, optimizer)
    moved = weights.values["weight"].detach() - start.float()
    assert (moved - expected).abs().max() < 3e-6  # 200 sums of float32
    assert torch.equal(mastered.weight, weights.values["weight"].bfloat16())
    assert mastered.weight.grad is None  # gathered in float32

    rounded = matrix(torch.bfloat16)
    _, optimizer = ours(rounded, "stochastic")
    descend(rounded, optimizer)
    moved = (rounded.weight.float() - start.float())[big]
    error = (moved.mean() - expected).abs() / (moved.std() / big.sum().sqrt())
    assert (moved != 0).float().mean() > 0.1
    assert error < 4, "unbiased in the mean: within four standard errors"


def test_adapters_gather_as_whole_networks_do() -> None:
    """Gradients of three micro-batches, 1, 2^-9 and 2^-9, which a bfloat16 sum would lose: float32 adds them up, either way."""
    for small in (False, True):
        network = nn.Sequential(matrix(torch.bfloat16), nn.Linear(3, 3, bias=False).bfloat16())
        weights = Weights(network, "master", small=small)
        optimizer = optim.optimizer(weights, Optim(lr=LR), seed=7)
        optim.begin(optimizer)
        optimizer.zero_grad(set_to_none=False)
        for size in (1.0, 2**-9, 2**-9):
            (size * sum(p.sum() for p in network.parameters())).backward()
            weights.gather()
        for name, p in network.named_parameters():
            assert (weights.values[name].grad == 1 + 2**-8).all()
            assert p.grad is None or not p.grad.any()
        optimizer.step()
        assert all(torch.equal(p, weights.values[name].bfloat16()) for name, p in network.named_parameters())


def test_stochastic_rounding_is_unbiased_and_leaves_what_fits() -> None:
    bits = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1e-6 * (1 + 2**-9)]).repeat(100_000, 1)
    rounded = stochastic_round(x, bits).float()
    assert all(len(column.unique()) == 2 for column in rounded.T)
    spread = rounded.std(0) / 100_000**0.5
    assert ((rounded.mean(0) - x[0]).abs() < 4 * spread).all()
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(exact.float(), bits), exact)


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_stochastic_adamw_is_torchs_adamw_in_float32(betas: tuple[float, float]) -> None:
    one, two = matrix(torch.float32), matrix(torch.float32)
    options = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1}
    a, b = torch.optim.AdamW(one.parameters(), **options), StochasticAdamW(two.parameters(), **options)  # type: ignore[arg-type]
    for i in range(5):
        for network, optimizer in ((one, a), (two, b)):
            network.zero_grad()
            (network.weight * torch.sin(torch.arange(64.0) + i)).square().sum().backward()
            optimizer.step()
    assert (one.weight - two.weight).abs().max() < 1e-6
    assert ("exp_avg" in b.state[two.weight]) is (betas[0] > 0)


def test_stochastic_adamw_makes_a_few_calls_for_many_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU waits for its host at each. In parts, in any memory format and after a resume the numbers are those of one weight at a time."""

    def made(dtype: torch.dtype) -> tuple[list[torch.Tensor], StochasticAdamW]:
        random = torch.Generator().manual_seed(0)
        shapes = [(3, 5, 2, 2), (7,), (4, 6)] * 30
        weights = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
        weights = [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
        return weights, StochasticAdamW(weights, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, seed=3)

    def updated(dtype: torch.dtype, at_once: int, again: bool = False) -> list[torch.Tensor]:
        monkeypatch.setattr(optim, "AT_ONCE", at_once)
        weights, optimizer = made(dtype)
        for step in range(3):
            for w in weights:
                w.grad = torch.sin(w.float() * 9 + step).to(dtype)
            if again and step == 2:
                state = {
                    i: {k: v.contiguous() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()
                }
                groups = optimizer.state_dict()["param_groups"]
                optimizer = StochasticAdamW(weights, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, seed=3)
                optimizer.load_state_dict({"state": state, "param_groups": groups})
                assert all(optimizer.state[w]["exp_avg"].stride() == w.stride() for w in weights)
            optimizer.step()
        return weights

    for dtype in (torch.float32, torch.bfloat16):
        whole = updated(dtype, 2**25)
        assert all(map(torch.equal, whole, updated(dtype, 2**25, again=True)))
        if dtype == torch.float32:
            assert all(map(torch.equal, whole, updated(dtype, 1)))
    weights, optimizer = made(torch.bfloat16)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    assert len([name for name in calls.names if "as_strided" not in name]) < 40


@pytest.mark.parametrize("update", ["master", "stochastic"])
def test_bfloat16_networks_train(folder: Path, update: str) -> None:
    made = {
        "roles": {
            "generator": "full",
            "assistant": "lora",
            "dtype": "bfloat16",
            "update": update,
            "gradient_checkpointing": True,
        },
        "generator": {"lr": 1e-5},
    }
    straight = learner(folder, **made)
    data = batch(straight)
    start = [p.detach().clone() for p in straight.generator_net.parameters()]
    assert start[0].dtype == torch.bfloat16
    for _ in range(3):
        metrics = straight.step(data).metrics
    assert metrics["matching/rms"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(straight.generator_net.parameters(), start, strict=True))
    assert next(straight.ema_net.parameters()).dtype == torch.float32


def test_bfloat16_agrees_with_float32(folder: Path) -> None:
    """The same update in both precisions: the gradients point the same way."""
    directions = []
    for dtype in ("float32", "bfloat16"):
        subject = learner(folder, roles={"generator": "full", "assistant": "full", "dtype": dtype})
        subject.step(batch(subject))
        directions.append(torch.cat([v.grad.flatten() for v in subject.generator_weights.values.values()]))  # type: ignore[union-attr]
    cosine = torch.nn.functional.cosine_similarity(directions[0], directions[1], dim=0)
    assert cosine > 0.98


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ode_proxy_recomputed_is_the_same(folder: Path, checkpointing: bool) -> None:
    subject = learner(
        folder,
        algorithm={"name": "didr"},
        reward={"name": "toy:Treacherous", "bad": ""},
        drp={"estimator": "ode", "steps": 3, "gradient_checkpointing": checkpointing},
        roles={"gradient_checkpointing": True},
    )
    subject.backbone.load_text()
    metrics = subject.step(batch(subject)).metrics
    assert metrics["drs/rms"] == pytest.approx(_DRS.setdefault("rms", metrics["drs/rms"]), rel=1e-5)


_DRS: dict[str, float] = {}


def test_an_absent_8_bit_adam_is_named_in_preflight() -> None:
    eight = config.load("tiny", ["generator.optimizer=adamw8bit"])
    if __import__("importlib.util").util.find_spec("bitsandbytes") is None:
        with pytest.raises(DIDRError, match=r"generator\.optimizer='adamw8bit': bitsandbytes is not installed"):
            optim.check(eight)
    optim.check(config.load("tiny"))
