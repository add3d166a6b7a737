"""Compiled blocks: the eager update in every layout of roles, no graph more after the first updates, a way back where compiling fails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import sdxl_folder
from small_learner import batch, learner
from torch import Tensor
from torch._dynamo.utils import counters

from didr_core.networks import compiled, fsdp
from didr_core.networks.compiled import Blocks
from didr_core.train.learner import Learner
from didr_core.types import Batch
from didr_core.world import random_models

FULL = {"generator": "full", "assistant": "full"}
RECIPE = {"generator": "full", "assistant": "lora", "gradient_checkpointing": True}  # of sdxl_1gpu
LORA = {"generator": "lora", "assistant": "lora", "gradient_checkpointing": True}  # of zimage_1gpu
ODE = {"estimator": "ode", "steps": 2, "gradient_checkpointing": True}
HYBRID = {"estimator": "hybrid", "steps": 2, "particles": 2}
LR = 1.0  # of plain gradient descent: far enough that rounding the weights is nothing
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "full, tweedie": ("aot_eager", "sdxl", FULL, {"estimator": "tweedie"}),
    "recipe, tweedie, inductor": ("inductor", "sdxl", RECIPE, {"estimator": "tweedie"}),
    "recipe, ode": ("aot_eager", "sdxl", RECIPE, ODE),
    "lora, hybrid": ("aot_eager", "sdxl", {**LORA, "gradient_checkpointing": False}, HYBRID),
    "zimage, lora, tweedie": ("aot_eager", "zimage", LORA, {"estimator": "tweedie"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compiled")
    return {"sdxl": sdxl_folder(root / "sdxl"), "zimage": random_models.zimage(root / "zimage")}


@pytest.fixture(autouse=True)
def no_graphs_yet() -> Iterator[None]:
    logging.getLogger("torch.__trace").disabled = True  # pytest's handler would have every graph written out
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(folders: dict[str, Path], family: str, how: str, parallel: Any = None, **changes: Any) -> Learner:
    backbone = {"name": family} | ({"max_tokens": 192, "resolution": 64} if family == "zimage" else {})
    train = {"compile": how, "micro_batch": 2} | changes.pop("train", {})
    changes = {"reward": {"name": "toy:Treacherous", "bad": ""}, "algorithm": {"name": "didr"}} | changes
    rates = {"generator": {"lr": LR}, "assistant": {"lr": LR}}
    subject = learner(
        folders[family], parallel, backbone=backbone, train=train, guidance={"reference": 3.0}, **rates, **changes
    )
    for name in ("generator", "assistant"):  # Adam divides rounding errors by their own size
        values = getattr(subject, f"{name}_weights").values.values()
        setattr(subject, f"{name}_opt", torch.optim.SGD(list(values)))
    return subject


def after(subject: Learner, updates: int, data: Batch) -> tuple[list[float], list[Tensor]]:
    """Losses; weights and gradients of the last update."""
    start = [v.detach().clone() for v in subject.generator_weights.values.values()]
    metrics = [subject.step(data).metrics for _ in range(updates)]
    held = [v for w in (subject.generator_weights, subject.assistant_weights) for v in w.values.values()]
    moved = (fsdp.whole(v.detach() - s).abs().max() for v, s in zip(held, start, strict=False))
    assert max(moved) > 1e-3
    tensors = [t for v in held for t in (v, v.grad) if t is not None]
    return [m[f"loss/{k}"] for m in metrics for k in ("assistant", "generator")], [
        fsdp.whole(t.detach()).clone() for t in tensors
    ]


def assert_same(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert len(one[1]) == len(other[1]) > 100
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_eager_one_and_graphs_stay_as_many(
    folders: dict[str, Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, family, roles, drp = CASES[case]
    monkeypatch.setattr(compiled, "BACKEND", backend)
    eager, ours = (made(folders, family, how, roles=roles, drp=drp) for how in ("none", "blocks"))
    data = batch(eager)
    assert_same(after(ours, 2, data), after(eager, 2, data))
    assert ours.blocks.why_not is None
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 4 and not counters["graph_break"]
    assert eager.state_dict()["generator"].keys() == ours.state_dict()["generator"].keys()
    ours.step(data)
    with torch.no_grad():  # pictures of another batch size, after training
        for which in ("ema", "reference"):
            three = data[0:3]
            z = torch.randn(3, *ours.backbone.latent_shape)
            ours.backbone.generate(ours.generator(which), z, three.condition)  # type: ignore[arg-type]
    assert counters["stats"]["unique_graphs"] == graphs


def test_blocks_that_see_captions_alone_are_recomputed_where_a_loss_goes_through_the_assistant(
    folders: dict[str, Path],
) -> None:
    """DI* differentiates the TA in its input: in Z-Image's caption blocks only weights of other roles require gradients then."""
    changes: dict[str, Any] = {"algorithm": {"name": "diff_instruct_star"}}
    plain, ours = (
        made(folders, "zimage", "none", roles={**LORA, "gradient_checkpointing": again}, **changes)
        for again in (False, True)
    )
    data = batch(plain)
    assert_same(after(ours, 1, data), after(plain, 1, data))


def test_where_compiling_fails_training_goes_on_without(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hard case: forward passes are compiled, a backward one cannot be, in the middle of a micro-batch's gradients."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def none(*_: Any) -> None:
        raise ValueError("no such kernel\nmore lines")

    broken = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=none)
    monkeypatch.setattr(compiled, "BACKEND", broken)
    eager, ours = (made(folders, "sdxl", how, roles=FULL, drp={"estimator": "tweedie"}) for how in ("none", "blocks"))
    data = batch(eager)
    with pytest.warns(UserWarning, match=r"blocks are not compiled \(ValueError: no such kernel\)") as told:
        found = after(ours, 2, data)
    assert sum("train.compile" in str(w.message) for w in told) == 1
    for a, b in zip((*found[0], *found[1]), (v for part in after(eager, 2, data) for v in part), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_networks_split_over_workers_compile_inside_their_hooks(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full networks; a group of one, which splits as a group of two does; a TA differentiated in x, under activation checkpointing."""
    import torch.distributed as dist

    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        roles = FULL | {"fsdp": True, "gradient_checkpointing": True}
        changes = {"roles": roles, "algorithm": {"name": "diff_instruct_star"}, "workers": {"train": 2}}
        eager, ours = (
            made(folders, "sdxl", how, _Two(), train={"micro_batch": 1}, **changes) for how in ("none", "blocks")
        )
        data = batch(eager)[:2]  # type: ignore[misc]
        assert fsdp.is_sharded(next(ours.generator_net.parameters()))
        assert_same(after(ours, 2, data), after(eager, 2, data))
        graphs = counters["stats"]["unique_graphs"]
        assert ours.blocks.why_not is None and graphs >= 4
        ours.step(data)
        assert counters["stats"]["unique_graphs"] == graphs
    finally:
        dist.destroy_process_group()


class _Two:
    rank, world_size = 0, 2

    def mean_(self, values: list[Tensor]) -> None: ...


def test_auto_compiles_large_networks_on_gpus_alone(folders: dict[str, Path]) -> None:
    class Large(torch.nn.Module):
        _repeated_blocks = ("Linear",)

        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(blocks))

    def asked(how: Any, device: str, blocks: int = compiled.MANY) -> bool:
        return Blocks([Large(blocks), Large(blocks)], how, torch.device(device)).why_not is None

    assert asked("auto", "cuda") and asked("blocks", "cpu", 1)
    assert not asked("auto", "cpu") and not asked("auto", "cuda", compiled.MANY - 1)
    assert not asked("none", "cuda") and not asked("blocks", "meta")
    with pytest.warns(UserWarning, match="Sequential names no _repeated_blocks"):
        Blocks([torch.nn.Sequential()], "blocks", torch.device("cpu"))
    assert made(folders, "sdxl", "auto").blocks.why_not == "not asked for"


def test_copies_are_of_the_plain_class_of_function(folders: dict[str, Path]) -> None:
    """A merged copy (for exports) computes with its own weights, and compiles nothing."""
    ours = made(folders, "sdxl", "blocks")
    base: Any = ours.reference_net.base  # type: ignore[union-attr]
    other = copy.deepcopy(base)
    for block in compiled.repeated(other):
        for p in block.parameters():
            p.data.zero_()
    x = torch.randn(1, 4, next(compiled.repeated(base)[0].parameters()).numel())
    block, zeroed = (compiled.repeated(n)[0] for n in (base, other))
    context = torch.randn(1, 7, 32)
    assert torch.equal(zeroed(x, encoder_hidden_states=context), x)
    assert not torch.equal(block(x, encoder_hidden_states=context), x)
    assert not counters["stats"]
