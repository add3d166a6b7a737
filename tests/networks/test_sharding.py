"""Networks split over two gloo processes (FSDP2): the update of one process, shares in memory, checkpoints for any number of workers."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from random_models import sdxl_folder
from small_learner import batch, learner, planned, saved
from small_learner import held as bytes_held
from torch import Tensor
from worker_pair import spawn_pair

from didr_core import config
from didr_core.networks import fsdp, optim
from didr_core.train import checkpoint
from didr_core.train import distributed as parallel
from didr_core.train.learner import Learner
from didr_core.types import DIDRError

FULL = {"generator": "full", "assistant": "full", "fsdp": True}
CASES: dict[str, dict[str, Any]] = {
    "full": {"roles": FULL},
    "through_a_frozen_assistant": {  # differentiated in x, with activation checkpointing and micro-batches
        "roles": FULL | {"gradient_checkpointing": True},
        "algorithm": {"name": "diff_instruct_star"},
        "reward": {"name": "toy:Treacherous", "bad": ""},
        "train": {"micro_batch": 1},
    },
    "generator_alone": {"roles": FULL | {"assistant": "lora", "rank": 4}},
    "head_start": {"roles": FULL, "train": {"assistant_warmup": 2}},
    "masters": {"roles": FULL | {"dtype": "bfloat16"}, "train": {"ema_decay": 0.0}},
}
STEPS, LR = 3, 0.05  # of plain gradient descent: far enough that rounding the weights is nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("sharding") / "pipeline")


def subject(folder: Path, case: str, parallel: Any = None, workers: int = 1, lr: float = 1e-3) -> Learner:
    changes = {"workers": {"train": workers}, "generator": {"lr": lr}, "assistant": {"lr": lr}, **CASES[case]}
    return learner(folder, parallel, **changes)


def weights(of: Learner) -> dict[str, Tensor]:
    """All that trains, whole, by role and name."""
    parts = {"generator": of.generator_weights, "assistant": of.assistant_weights}
    found = {
        f"{role}/{name}": fsdp.whole(v.detach()) for role, part in parts.items() for name, v in part.values.items()
    }
    return found | {f"ema/{name}": fsdp.whole(v.detach()) for name, v in of.ema_net.named_parameters()}


def one_process(folder: Path, case: str, steps: int = STEPS) -> Learner:
    one = subject(folder, case, lr=LR)
    _sgd(one)
    for _ in range(steps):
        one.step(batch(one))
    return one


def _sgd(of: Learner) -> None:
    """Adam divides rounding errors by their own size: it would hide how near two gradients are."""
    for name in ("generator", "assistant"):
        values = list(getattr(of, f"{name}_weights").values.values())
        optimizer = torch.optim.SGD(values)
        optimizer.register_step_post_hook(lambda *_, name=name: getattr(of, f"{name}_weights").publish())
        setattr(of, f"{name}_opt", optimizer)


def _worker(rank: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    try:
        _checks(rank, Path(folder), Path(out))
    finally:
        dist.destroy_process_group()


def _checks(rank: int, folder: Path, out: Path) -> None:
    def half(of: Learner) -> Any:
        return batch(of)[2 * rank : 2 * rank + 2]  # type: ignore[misc]

    for case in sorted(CASES.keys() - {"head_start"}):
        many = subject(folder, case, parallel.current(), 2, LR)
        _sgd(many)
        for _ in range(STEPS):
            many.step(half(many))
        found = weights(many)
        held = sum(p.to_local().numel() if fsdp.is_sharded(p) else p.numel() for p in many.generator_net.parameters())
        torch.save({"weights": found, "held": held}, out / f"{case}-{rank}.pt")

    # with Adam: on from a checkpoint of two workers, and from one of a single one
    straight = subject(folder, "full", parallel.current(), 2)
    saver = checkpoint.Saver(straight)
    straight.step(half(straight))
    torch.save(bytes_held(straight), out / f"held-{rank}.pt")
    moments = {k: v.clone() for k, v in _moments(straight).items()}
    done: list[int] = []
    saver.save(out / "two", {"n": 1}, then=lambda: done.append(1))
    straight.step(half(straight))  # while it is written
    saver.wait()
    assert done == ([1] if rank == 0 else [])
    whole = straight.whole_average()
    assert (whole is None) == (rank == 1)
    torch.save((weights(straight), moments, whole.state_dict() if whole else None), out / f"straight-{rank}.pt")
    for source in ("two", "one"):
        resumed = subject(folder, "full", parallel.current(), 2)
        dist.barrier()
        assert checkpoint.load(out / source, resumed) == {"n": 1}
        if source == "two":
            assert all(torch.equal(v, moments[k]) for k, v in _moments(resumed).items())
        resumed.step(half(resumed))
        torch.save(weights(resumed), out / f"resumed-{source}-{rank}.pt")

    waiting = subject(folder, "head_start", parallel.current(), 2)  # the generator has not begun when it is saved
    waiting.step(half(waiting))
    begun = checkpoint.Saver(waiting)
    begun.save(out / "waiting", {})
    begun.wait()
    dist.barrier()
    resumed = subject(folder, "head_start", parallel.current(), 2)
    checkpoint.load(out / "waiting", resumed)
    assert not resumed.generator_opt.state and resumed.assistant_opt.state
    for _ in range(2):
        one, other = waiting.step(half(waiting)), resumed.step(half(resumed))
    assert one.metrics == other.metrics and "loss/generator" in one.metrics

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if rank == 1:  # one worker's disk is full: all of them hear of it, and the checkpoint never counts as one

        def no_room(*_: Any, **__: Any) -> None:
            raise full

        checkpoint.save_file = no_room  # type: ignore[assignment]
    saver.save(out / "full", {"n": 2})
    with pytest.raises(DIDRError, match=r"disk is full: about [\d,]+ bytes needed"):
        saver.wait()
    dist.barrier()
    assert not (out / "full").exists() and not (out / ".full.part").exists()


def _moments(of: Learner) -> dict[str, Tensor]:
    states = (of.generator_opt.state, of.assistant_opt.state)
    return {
        f"{n}/{i}/{k}": fsdp.whole(v)
        for n, s in enumerate(states)
        for i, p in enumerate(s.values())
        for k, v in p.items()
    }


@pytest.fixture(scope="module")
def two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    first = subject(folder, "full")  # a checkpoint of one worker
    first.step(batch(first))
    saved(first, out / "one", {"n": 1})
    assert not list((out / "one").glob("*.1.safetensors"))
    spawn_pair(_worker, str(folder), str(out))
    return out


def read(out: Path, name: str) -> Any:
    return torch.load(out / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"head_start"}))
def test_split_over_two_workers_it_is_the_update_of_one(two_processes: Path, folder: Path, case: str) -> None:
    start, one = weights(subject(folder, case)), one_process(folder, case)
    expected = weights(one)
    a, b = (read(two_processes, f"{case}-{rank}") for rank in range(2))
    bound = 0.15 if case == "masters" else 5e-5  # bfloat16 calls of half a batch round differently
    for role in ("generator", "assistant") if case == "masters" else ("generator", "assistant", "ema"):
        names = [n for n in expected if n.startswith(f"{role}/")]
        moved = sum(float((expected[n] - start[n]).float().square().sum()) for n in names) ** 0.5
        apart = sum(float((expected[n] - a["weights"][n]).float().square().sum()) for n in names) ** 0.5
        assert names and moved > 1e-3
        assert apart <= bound * moved, (role, apart / moved)
        assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in names)
    whole = sum(p.numel() for p in one.generator_net.parameters())
    assert a["held"] + b["held"] == whole and abs(a["held"] - b["held"]) < 0.1 * whole


def test_a_checkpoint_fits_any_number_of_workers(two_processes: Path, folder: Path) -> None:
    out = two_processes
    sizes = [(out / "two" / f"generator.{rank}.safetensors").stat().st_size for rank in range(2)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25  # each worker has written its own
    straight, moments, whole = read(out, "straight-0")
    for rank in range(2):  # two to two: the same bits
        resumed = read(out, f"resumed-two-{rank}")
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(v, straight[n]) for n, v in resumed.items())
    alone = subject(folder, "full")  # two to one
    assert checkpoint.load(out / "two", alone) == {"n": 1}
    assert alone.step_count == 1
    for key, value in _moments(alone).items():
        assert torch.equal(value, moments[key]), key
    alone.step(batch(alone))
    for name, value in weights(alone).items():
        assert (value - straight[name]).abs().max() <= 2e-4, name  # Adam: a step is 1e-3
    one_to_two = read(out, "resumed-one-0")
    for name, value in weights(alone).items():
        assert (value - one_to_two[name]).abs().max() <= 2e-4, name
    network = alone.backbone.load_network("generator")  # what `didr export` and `didr sample` read
    network.load_state_dict(checkpoint.read(out / "two", "ema"))
    assert set(whole) == set(network.state_dict())
    assert any((v - whole[n]).abs().max() > 0 for n, v in network.state_dict().items())  # a step earlier
    for name, value in whole.items():
        assert torch.equal(value, straight[f"ema/{name}"]), name


def test_a_worker_holds_what_the_plan_says(two_processes: Path, folder: Path) -> None:
    config = subject(folder, "full", workers=2).config
    for rank in range(2):
        assert read(two_processes, f"held-{rank}") == pytest.approx(
            planned(config), rel=0.02
        )  # uneven parts are padded
    assert planned(config) < 0.6 * planned(subject(folder, "full").config)


def test_a_checkpoint_that_lacks_a_part_is_named(two_processes: Path, folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(two_processes / "two", tmp_path / "broken"))
    (broken / "generator.1.safetensors").unlink()
    with pytest.raises(DIDRError, match=r"checkpoint .*broken: damaged: generator\.1\.safetensors is missing"):
        checkpoint.load(broken, subject(folder, "full"))


def test_moments_made_to_load_into_change_nothing(folder: Path) -> None:
    fresh, begun = subject(folder, "masters"), subject(folder, "masters")
    optim.begin(begun.generator_opt)
    optim.begin(begun.generator_opt)
    assert all(torch.equal(v, weights(begun)[n]) for n, v in weights(fresh).items())
    assert begun.generator_opt.param_groups[0]["lr"] == fresh.generator_opt.param_groups[0]["lr"] > 0
    assert len(begun.generator_opt.state) == len(begun.generator_weights.values)


def test_blocks_are_gathered_one_by_one(folder: Path) -> None:
    network = subject(folder, "full").generator_net
    sizes = list(fsdp.unit_sizes(network))
    assert len(sizes) > 5 and sum(sizes) == sum(p.numel() for p in network.parameters())
    assert max(sizes) < 0.5 * sum(sizes)


def test_what_cannot_be_split_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DIDRError, match="generator and assistant are adapters, which are not split"):
        learner(folder, roles={"fsdp": True})
    with pytest.raises(DIDRError, match="not rounded stochastically"):
        learner(folder, roles=FULL | {"update": "stochastic"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(DIDRError, match="layers of Sequential share weights"):
        fsdp.shard(tied, torch.device("cpu"))
    recipe = config.load("exact_2d", ["roles.fsdp=true", "generator.optimizer=adamw8bit"])
    with pytest.raises(DIDRError, match="cannot update weights that are split"):
        optim.check(recipe)
