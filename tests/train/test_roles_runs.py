"""Whole runs of both families with every kind of roles: align, resume, export, sample, in one process and in two.

Full networks in one process: test_families.py. Through Ray: tests/pipelines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from toy import toy_recipe
from worker_pair import spawn_pair

from didr_core import config as configs
from didr_core.data.feed import LocalFeed
from didr_core.evaluate.finish import finish, looker
from didr_core.networks.lora import ADAPTER, KOHYA
from didr_core.plan.preflight import preflight
from didr_core.train import checkpoint
from didr_core.train import distributed as parallel
from didr_core.train.learner import Learner
from didr_core.train.loop import Journal, loop
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder
from didr_core.world import random_models
from pipelines.cli import main as cli
from pipelines.report.figures import save_grid

pytestmark = pytest.mark.slow
FAMILIES = ("sdxl", "zimage")
ROLES: dict[str, dict[str, Any]] = {
    "lora": {"generator": "lora", "assistant": "lora", "rank": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
    "full": {"gradient_checkpointing": True},
    "split": {"fsdp": True, "gradient_checkpointing": True},
    "split_generator": {"fsdp": True, "assistant": "lora", "rank": 4, "dtype": "bfloat16"},
}


def didr(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    assert stop.value.code == 0


def recipe_of(folder: Path, family: str, roles: str, workers: int) -> tuple[Path, Path]:
    """A recipe, and the pipeline folder that its generator starts from: not the reference's."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = getattr(random_models, family)(folder / "reference")
    start = getattr(random_models, family)(folder / "start", seed=1)
    backbone: dict[str, Any] = {"name": family, "pipeline": str(pipeline), "generator": str(start)}
    backbone |= {"resolution": 64} | ({"max_tokens": 192} if family == "zimage" else {})
    recipe = toy_recipe(
        folder,
        backbone=backbone,
        roles=ROLES[roles],
        drp={"estimator": "ode", "steps": 2, "gradient_checkpointing": True, "beta": 0.5},
        train={"steps": 2, "batch": 4, "micro_batch": 1, "checkpoint_every": 2, "assistant_updates": 1},
        workers={"train": workers},
        evaluation={"grid": 2, "prompts": 2, "every": 2},
    )
    return recipe, start


def network_of(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer  # type: ignore[no-any-return]


def check_export(run: RunFolder, start: Path, family: str, lora: bool) -> None:
    """Stock diffusers loads and samples it; it has moved; an adapter lies beside it."""
    import diffusers

    assert run.last_step() == 3 and (run.path / "grids" / "step-000002.png").is_file()
    pipe = diffusers.DiffusionPipeline.from_pretrained(run.path / "export", torch_dtype=torch.float32)
    found = network_of(pipe).state_dict()
    before = network_of(diffusers.DiffusionPipeline.from_pretrained(start)).state_dict()
    assert found.keys() == before.keys()  # an adapter is merged: the base's own names
    assert any((found[n] - before[n].float()).abs().max() > 1e-3 for n in before)
    assert (run.path / "export" / "pytorch_lora_weights.safetensors").is_file() == lora
    if lora:
        pipe.load_lora_weights(run.path / "export")
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"guidance_scale": 0.0} | ({"max_sequence_length": 192} if family == "zimage" else {})
    picture = pipe("a red circle", num_inference_steps=1, height=64, width=64, output_type="pt", **more).images
    assert picture.shape == (1, 3, 64, 64) and bool(torch.isfinite(picture).all()) and picture.std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_from_recipe_to_stock_diffusers(family: str, tmp_path: Path) -> None:
    recipe, start = recipe_of(tmp_path, family, "lora", 1)
    run = RunFolder(tmp_path / "run")
    didr("align", "--recipe", recipe, "--local", "--output", run.path)
    assert run.last_step() == 2
    didr("align", "--resume", run.path, "--local", "--set", "train.steps=3")
    saved = checkpoint.read(run.checkpoint(3), "generator")
    assert saved and all("/lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    check_export(run, start, family, lora=True)
    didr("sample", "--run", run.path, "--prompt", "a red circle", "--output", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == 1


CASES = [(family, roles) for family in FAMILIES for roles in ROLES if family == "sdxl" or roles in ("lora", "split")]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[RunFolder, Path]]:
    """All cases in one pair of gloo processes: two steps, then a third by learners that begin anew from the checkpoint."""
    root = tmp_path_factory.mktemp("two_workers")
    made = {}
    for family, roles in CASES:
        recipe, start = recipe_of(root / f"{family}-{roles}", family, roles, 2)
        config = configs.load(str(recipe))
        preflight(config)
        made[family, roles] = RunFolder.create(config, str(root / f"{family}-{roles}" / "run")), start
    spawn_pair(_worker, [str(run.path) for run, _ in made.values()], str(root / "meeting"))
    return made


def _worker(rank: int, runs: list[str], meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        for path in runs:
            for steps in (2, 3):
                _train(RunFolder(Path(path)), steps, rank)
    finally:
        dist.destroy_process_group()


def _train(run: RunFolder, steps: int, rank: int) -> None:
    """What a worker of `didr align` does, without Ray."""
    config = run.config([f"train.steps={steps}"])
    learner = Learner(config, parallel=parallel.current())
    journal = Journal(run, config, learner, "")
    journal.restore()
    assert learner.step_count == (0 if steps == 2 else 2)
    look = looker(learner, config, run, save_grid) if rank == 0 else None
    feed = LocalFeed(config, learner.step_count * config.train.batch, rank=rank, world_size=2)
    loop(learner, feed, journal, Observer(), writes=rank == 0, look=look)
    learner.gather()
    dist.barrier()  # rank 0 counts checkpoints
    if steps == 3:
        finish(learner, config, run, draw=save_grid)


def told(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a safetensors file, whose writer puts metadata in any order."""
    with safe_open(file, "pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name).numpy().tobytes() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("family", "roles"), CASES)
def test_two_workers_go_from_recipe_to_stock_diffusers(
    family: str, roles: str, two_workers: dict[tuple[str, str], tuple[RunFolder, Path]]
) -> None:
    run, start = two_workers[family, roles]
    split = roles.startswith("split")
    assert (run.checkpoint(3) / "generator.1.safetensors").is_file() == split
    check_export(run, start, family, lora=roles == "lora")
    again = run.path.parent / "again"  # the same from the checkpoint, by one process
    didr("export", "--run", run.path, "--output", again)
    file = f"{'unet' if family == 'sdxl' else 'transformer'}/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(run.path / "export" / file), load_file(again / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for name in [ADAPTER, *([KOHYA] if family == "sdxl" else [])] if roles == "lora" else []:
        assert told(run.path / "export" / name) == told(again / name)
