"""Plans against what networks and learners really hold: FLOPs, activations, weights, gradients, moments, averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import clip_folder, sdxl_folder
from small_learner import batch, held, learner, lines, planned
from torch.utils.flop_counter import FlopCounterMode

from didr_core import config
from didr_core.plan import advice, memory, shapes
from didr_core.plan.footprint import Counter, measure
from didr_core.plan.memory import Plan
from didr_core.types import DIDRError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("memory") / "pipeline")


def unet_call(folder: Path) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel.from_pretrained(folder / "unet")
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)}
    return (
        net,
        (torch.randn(1, 4, 8, 8), torch.zeros(1).long()),
        {
            "encoder_hidden_states": torch.randn(1, 77, 32),
            "added_cond_kwargs": added,
            "return_dict": False,
        },
    )


@pytest.mark.parametrize("weights", [False, True])
def test_counted_on_meta_is_what_runs(folder: Path, weights: bool) -> None:
    """FLOPs of a real run by torch's own counter; bytes by what autograd really saved."""
    net, args, kwargs = unet_call(folder)
    of = shapes.family(learner(folder).config.backbone)
    assert of is not None and of.side == 8 and of.tokens == 77
    counted = shapes.network_cost(of, "float32", weights, False)
    net.requires_grad_(weights)
    args[0].requires_grad_(not weights)
    saved: dict[int, Any] = {}
    own = {p.untyped_storage()._cdata for p in (*net.parameters(), *args, *kwargs["added_cond_kwargs"].values())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage()._cdata] = t
        return t

    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(*args, **kwargs)[0]
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # attention on a CPU has no formula in torch's counter: the meta count has it, and it is small here
    assert forward.get_total_flops() <= counted.forward <= 1.2 * forward.get_total_flops()
    assert backward.get_total_flops() <= counted.backward <= 1.2 * backward.get_total_flops()
    held = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    assert counted.kept == pytest.approx(held, rel=0.1)
    assert counted.peak >= counted.kept


def test_checkpointing_keeps_less_and_computes_more(folder: Path) -> None:
    of = shapes.family(learner(folder).config.backbone)
    assert of is not None
    whole, again = (shapes.network_cost(of, "float32", True, c) for c in (False, True))
    nothing = shapes.network_cost(of, "float32", None, False)
    assert again.kept < 0.5 * whole.kept and again.peak < whole.peak
    assert again.backward > whole.backward + 0.5 * whole.forward
    assert nothing.backward == 0 and nothing.kept < again.kept and nothing.forward == whole.forward


ROLES = {
    "three copies": {"generator": "full", "assistant": "full"},
    "TA on the reference": {"generator": "full", "assistant": "lora", "dtype": "bfloat16", "update": "stochastic"},
    "masters": {"generator": "full", "assistant": "full", "dtype": "bfloat16"},
    "one base": {"generator": "lora", "assistant": "lora", "dtype": {"reference": "bfloat16"}},
}


@pytest.mark.parametrize("name", ROLES)
def test_the_plan_is_what_a_learner_holds(folder: Path, name: str) -> None:
    """Every byte of weights, masters, gradients, moments and average, after an update."""
    subject = learner(folder, roles=ROLES[name] | {"rank": 4})
    subject.step(batch(subject))
    assert planned(subject.config) == pytest.approx(held(subject), rel=1e-3)


@pytest.mark.parametrize("estimator", ["ode", "stochastic"])
def test_the_plan_counts_the_flops_of_a_real_step(folder: Path, tmp_path: Path, estimator: str) -> None:
    """Every network of an update: TA, generator, proxy, decoder, reward; counted as it runs, against the sum of the plan's rows."""
    subject = learner(
        folder,
        algorithm={"name": "didr"},
        reward={"name": "pickscore", "path": str(clip_folder(tmp_path / "clip"))},
        drp={"estimator": estimator, "steps": 2, "particles": 2},
        roles={"generator": "full", "assistant": "full"},
        train={"micro_batch": 2, "assistant_updates": 3},
    )
    plan, data = memory.plan(subject.config), batch(subject)
    assert plan is not None
    with Counter() as count:
        subject.step(data)
    assert (
        count.flops <= plan.total_flops * 4 <= 1.15 * count.flops
    )  # attention on a CPU has no formula in torch's counter


def test_shares_of_a_gpu_decide_who_meets_whom() -> None:
    def process(name: str, count: int, gpus: float, size: float) -> memory.Process:
        return memory.Process(name, count, gpus, [memory.Line("x", "y", "z", size)], [])

    plan = Plan([process("trainer", 2, 0.7, 50e9), process("actor", 4, 0.15, 10e9)], [], 1)
    names, used = plan.gpu_bytes()
    assert names == "trainer + 2 x actor"
    assert used == pytest.approx(70e9 * (1 + memory.MARGIN))
    assert plan.fits(80) and not plan.fits(70)
    assert Plan([process("trainer", 1, 0, 1e12)], [], 1).fits(1)


@pytest.mark.slow
@pytest.mark.timeout(600)  # dozens of full-size forward and backward passes on the meta device: 30 s on an idle machine
def test_the_published_recipes_fit_80_gb_and_say_what_60_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Without any weights on the machine; the sizes are the published ones."""
    from pipelines.cli.main import main

    for recipe in ("sdxl_1gpu", "zimage_1gpu", "sdxl_8gpu", "zimage_8gpu"):
        plan = memory.plan(config.load(recipe))
        assert plan is not None and plan.fits(80), recipe
        assert not plan.fits(40)
    sdxl = memory.plan(config.load("sdxl_1gpu"))
    assert sdxl is not None
    assert lines(sdxl, "reference") == {"weights (base of reference, TA)": 2 * 2_567_463_684}
    unet = {phase: flops for phase, _, flops in sdxl.flops}["TA's answer"]
    assert unet / 1e12 == pytest.approx(6.76, abs=0.01)  # counted apart, for the design notes
    with pytest.raises(SystemExit) as done:
        main(["doctor", "--recipe", "sdxl_1gpu", "--gpu-gb", "60"])
    assert done.value.code == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "change this: --set" in said and "2,567M x 2 B (bfloat16)" in said
    with pytest.raises(DIDRError, match=r"memory: trainer .* needs about \d+ GB, the GPU has 60 GB. Change: --set"):
        advice.check(config.load("sdxl_1gpu"), 60)


def test_a_small_world_needs_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli.main import main

    assert memory.plan(config.load("exact_2d")) is None
    advice.check(config.load("exact_2d"), 1)
    with pytest.raises(SystemExit) as done:
        main(["doctor", "--recipe", "exact_2d"])
    assert done.value.code == 0
    assert "installed" in capsys.readouterr().out


def test_adapters_are_counted_as_peft_makes_them(folder: Path) -> None:
    subject = learner(folder)
    net, _, _ = unet_call(folder)
    made = sum(p.numel() for p in subject.generator_net.parameters())
    targets = subject.config.roles.targets or getattr(subject.backbone, "lora_targets", None)
    assert memory.adapter_parameters(net, targets, 4) == made
    with pytest.raises(DIDRError, match="no layer of UNet2DConditionModel"):
        memory.adapter_parameters(net, ("nothing",), 4)


def test_a_call_is_measured_without_keeping_anything(folder: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to("meta")
    cost = measure(linear, (torch.empty(2, 8, device="meta"),), {}, weights=True)
    assert cost.forward == 2 * 2 * (8 * 16 + 16 * 4)
    assert cost.backward == 2 * 2 * (8 * 16 + 2 * 16 * 4)  # weights of both layers, input of the second
    assert cost.kept == 4 * 2 * (16 + 4)  # tanh's output (the first sum is freed) and the result
