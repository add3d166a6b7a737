"""Plans against what networks and learners really hold: FLOPs, activations, weights, gradients, moments, averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import clip_folder, sdxl_folder
from small_learner import batch, held, learner, lines, planned, small_config
from torch.utils.flop_counter import FlopCounterMode

from didr_core import config
from didr_core.plan import advice, memory
from didr_core.plan.memory import Plan
from didr_core.plan.trace import Counter
from didr_core.types import DIDRError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("memory") / "pipeline")


def full(folder: Path, **changes: Any) -> Any:
    roles = {"generator": "full", "assistant": "full", **changes}
    return learner(folder, roles=roles, train={"assistant_updates": 1})


def test_counted_on_meta_is_what_runs(folder: Path) -> None:
    """FLOPs of a real backward pass by torch's own counter; bytes by what autograd really saved."""
    subject = full(folder)
    own = {p.untyped_storage()._cdata for n in (subject.generator_net, subject.assistant_net) for p in n.parameters()}
    saved: dict[int, Any] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage()._cdata] = t
        return t

    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = subject.assistant_loss(batch(subject), "ta0")
    with FlopCounterMode(display=False) as backward:
        loss.sum().backward()
    plan = memory.plan(subject.config)
    assert plan is not None
    flops = {name: value * 4 for name, value in plan.flops}
    counted = flops["TA: fresh sample"] + flops["TA: forward"]
    # prompts have 16 tokens here and 77 in the plan; equal sizes are compared in test_flops.py
    assert forward.get_total_flops() <= counted <= 1.2 * forward.get_total_flops()
    assert backward.get_total_flops() <= flops["TA: backward"] <= 1.2 * backward.get_total_flops()
    held = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    assert held <= peaks(plan)["TA update", "forward"] <= 1.2 * held


def peaks(plan: Plan) -> dict[tuple[str, str], float]:
    return {(line.owner, line.what): line.bytes for line in plan.processes[0].phases}


def test_checkpointing_keeps_less_and_computes_more(folder: Path) -> None:
    whole, again = (memory.plan(full(folder, gradient_checkpointing=c).config) for c in (False, True))
    assert whole is not None and again is not None
    assert peaks(again)["TA update", "forward"] < 0.5 * peaks(whole)["TA update", "forward"]
    assert peaks(again)["TA update", "backward"] < peaks(whole)["TA update", "backward"]
    before, after = dict(whole.flops), dict(again.flops)
    assert after["TA: backward"] > before["TA: backward"] + 0.5 * before["TA: forward"]
    assert after["TA: forward"] == before["TA: forward"]


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


@pytest.mark.parametrize("estimator", ["ode", "stochastic", "hybrid"])
def test_the_plan_counts_the_flops_of_a_real_step(folder: Path, tmp_path: Path, estimator: str) -> None:
    """Every network of an update: TA, generator, proxy, decoder, reward; counted as it runs, against the sum of the plan's rows."""
    subject = learner(
        folder,
        algorithm={"name": "didr"},
        reward={"name": "pickscore", "path": str(clip_folder(tmp_path / "clip"))},
        drp={"estimator": estimator, "steps": 2, "particles": 2},
        roles={"generator": "full", "assistant": "full"},
        train={"micro_batch": 2, "assistant_updates": 3},
        times={"generator": [0.6, 0.9]},  # hybrid: where every sample costs what the plan counts, above its split
    )
    plan, data = memory.plan(subject.config), batch(subject)
    assert plan is not None
    with Counter() as count:
        subject.step(data)
    # prompts have 16 tokens here and 77 in the plan
    assert count.flops <= plan.total_flops * 4 <= 1.15 * count.flops


def test_shares_of_a_gpu_decide_who_meets_whom() -> None:
    def process(name: str, count: int, gpus: float, size: float) -> memory.Process:
        return memory.Process(name, count, gpus, [memory.Line("x", "y", "z", size)], [])

    plan = Plan([process("trainer", 2, 0.7, 50e9), process("actor", 4, 0.15, 10e9)], [], 1)
    names, used = plan.gpu_bytes()
    assert names == "trainer + 2 x actor"
    assert used == pytest.approx(70e9 * (1 + memory.MARGIN))
    assert plan.fits(80) and not plan.fits(70)
    assert Plan([process("trainer", 1, 0, 1e12)], [], 1).fits(1)


LEAST = ["train.micro_batch=1", "roles.gradient_checkpointing=true"]


@pytest.mark.slow
def test_the_published_recipes_fit_80_gb_and_say_what_60_would_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any weights on the machine; the sizes are the published ones."""
    from pipelines.cli.main import main

    monkeypatch.setenv("DIDR_CACHE", str(tmp_path))  # what `doctor` planned is asked for once more, below
    for recipe in ("sdxl_1gpu", "zimage_1gpu", "sdxl_8gpu", "zimage_8gpu"):
        plan = memory.plan(config.load(recipe, LEAST))  # what `auto` comes to at last: tests/plan/test_fit.py
        assert plan is not None and plan.fits(80), recipe
        assert not plan.fits(40)
    sdxl = memory.plan(config.load("sdxl_1gpu", LEAST))
    assert sdxl is not None
    assert lines(sdxl, "reference") == {"weights (base of reference, TA)": 2 * 2_567_463_684}
    assert dict(sdxl.flops)["generator: forward"] / 1e12 == pytest.approx(
        6.76, abs=0.01
    )  # counted apart, for the design notes
    together = [*LEAST, "workers.precompute=false"]
    with pytest.raises(SystemExit) as done:
        main(["doctor", "--recipe", "sdxl_1gpu", "--gpu-gb", "60", *(w for s in together for w in ("--set", s))])
    assert done.value.code == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "change this: --set" in said and "2,567M x 2 B (bfloat16)" in said
    with pytest.raises(DIDRError, match=r"memory: trainer .* needs about \d+ GB, the GPU has 60 GB. Change: --set"):
        advice.check(config.load("sdxl_1gpu", together), 60)


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
    made = sum(p.numel() * p.element_size() for p in subject.generator_net.parameters())
    plan = memory.plan(subject.config)
    assert plan is not None and lines(plan, "generator")["adapter"] == made
    with pytest.raises(DIDRError, match="no layer of UNet2DConditionModel"):
        memory.plan(learner_config(folder, targets=("nothing",)))


def learner_config(folder: Path, **roles: Any) -> config.Config:
    tree = config.dump(learner(folder).config)
    return config.validate({**tree, "roles": {**tree["roles"], **roles}})


def test_text_encoders_of_a_folder_are_counted(folder: Path) -> None:
    subject = learner(folder)
    subject.backbone.load_text()
    loaded = subject.backbone._text  # type: ignore[attr-defined]
    held = sum(p.numel() * 4 for tower in (loaded.text_encoder, loaded.text_encoder_2) for p in tower.parameters())
    plan = memory.plan(subject.config)
    assert plan is not None and plan.processes[-1].name == "encoder actor"
    assert plan.processes[-1].held[0].bytes == held


def test_counting_keeps_nothing_and_counts_what_was_there_never() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to("meta")
    for p in linear.parameters():
        p.grad = torch.empty_like(p)
    count, x = Counter(), torch.empty(2, 8, device="meta")
    with count:
        with count.phase("forward"):
            out = linear(x)
        kept = count.now
        with count.phase("backward"):
            out.sum().backward()
    flops = {name: phase.flops for name, phase in count.phases.items()}
    assert flops == {"forward": 2 * 2 * (8 * 16 + 16 * 4), "backward": 2 * 2 * (8 * 16 + 2 * 16 * 4)}
    assert kept == 4 * 2 * (16 + 4)  # tanh's output (the first sum is freed) and the result
    del out
    assert count.now == 0


def test_a_reward_in_actors_is_theirs_to_hold(folder: Path, tmp_path: Path) -> None:
    """Its weights are in no trainer and in no actor of the stream; of two micro-batches in flight the trainer holds both."""
    reward = {"name": "pickscore", "path": str(clip_folder(tmp_path / "clip"))}
    pool = {"placement": "actors", "actors": {"count": 3, "gpus": 0.5}}
    changes: dict[str, Any] = {
        "algorithm": {"name": "didr"},
        "drp": {"estimator": "tweedie"},
        "train": {"micro_batch": 1},
    }
    local, away = (memory.plan(small_config(folder, reward=r, **changes)) for r in (reward, reward | pool))
    assert local is not None and away is not None
    by_name = [{p.name: p for p in plan.processes} for plan in (local, away)]
    weights = [{n: sum(x.bytes for x in p.held if x.owner == "reward") for n, p in ps.items()} for ps in by_name]
    size = weights[0]["trainer"]
    assert weights[0] == {"trainer": size, "reward actor": size, "encoder actor": 0} and size > 0
    assert weights[1] == {"trainer": 0, "reward actor": 0, "scoring actor": size, "encoder actor": 0}
    actor = by_name[1]["scoring actor"]
    assert (actor.count, actor.gpus, actor.before) == (3, 0.5, False) and actor.phases[0].bytes > 0
    key = "generator update", "backward"
    assert peaks(away)[key] > 1.3 * peaks(local)[key]
    for phase in ("TA: backward", "generator: backward", "proxy"):
        a, b = (dict(plan.flops)[phase] for plan in (local, away))
        assert b == a if phase != "proxy" else 0 < b < a, phase
