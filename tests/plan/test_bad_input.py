"""Bad input through the command line: exit code 1, one clear message with key, value and fix on the last lines, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toy import toy_recipe

from didr_core import config as configs
from didr_core.data.prompts import PromptIndex
from didr_core.plan.preflight import opened, preflight
from didr_core.train import checkpoint
from didr_core.train.run_folder import RunFolder
from pipelines.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


Didr = Callable[..., str]


@pytest.fixture
def didr(capsys: pytest.CaptureFixture[str]) -> Didr:
    """Run `didr ...`; the exit code must be 1; returns what was said on stderr after "error: "."""

    def run(*arguments: object, code: int = 1) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert stop.value.code == code, said
        assert "Traceback" not in said
        return said.partition("error: ")[2] if code else said

    return run


def fails(didr: Didr, toy: Path, tmp_path: Path, *sets: str) -> str:
    """`didr align` with these settings stops in preflight: no run folder is left behind."""
    output = tmp_path / "run"
    said = didr("align", "--recipe", toy, "--output", output, *[a for s in sets for a in ("--set", s)])
    assert not output.exists()
    return said


def test_missing_prompts(didr: Didr, toy: Path, tmp_path: Path) -> None:
    said = fails(didr, toy, tmp_path, f"data.prompts={tmp_path}/nowhere")
    assert "data.prompts=" in said and "no such file or folder" in said
    (tmp_path / "empty").mkdir()
    assert "no .parquet files" in fails(didr, toy, tmp_path, f"data.prompts={tmp_path}/empty")
    assert "data.heldout=" in fails(didr, toy, tmp_path, f"data.heldout={tmp_path}/nowhere")


def test_all_that_is_missing_is_said_at_once(
    didr: Didr, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"{tmp_path}/nowhere"
    sets = [f"data.prompts={nowhere}", f"reward.path={nowhere}", f"judge={{name: pickscore, path: '{nowhere}'}}"]
    said = fails(didr, toy, tmp_path, *sets, f"backbone.pipeline={nowhere}")
    assert [line.partition("=")[0] for line in said.splitlines()] == [
        "data.prompts",
        "backbone.pipeline",
        "reward.path",
        "judge.path",
    ]
    with pytest.raises(SystemExit) as stop:  # a plan needs none of it
        cli.main(["doctor", "--recipe", str(toy), *[a for s in sets for a in ("--set", s)]])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not ready: ")]
    assert stop.value.code == 0 and [line.split()[2].partition("=")[0] for line in told] == [
        "data.prompts",
        "reward.path",
        "judge.path",
    ]
    monkeypatch.chdir(tmp_path)
    said = didr("align", "--recipe", "tiny_sdxl", "--local")
    assert "`python -m didr_core.world.random_models` makes it" in said
    _, wrong = opened(configs.load("sdxl_1gpu"), fetch=False)
    assert [line.partition("=")[0] for line in wrong] == [
        *("data.prompts", "data.heldout", "backbone.pipeline", "backbone.generator", "backbone.decoder"),
        *("reward.path", "reward.tokenizer", "judge.path"),
    ]


def test_prompts_at_an_address_that_does_not_answer(didr: Didr, toy: Path, tmp_path: Path) -> None:
    """No hub is asked in tests; whatever the library behind the address raises is one line."""
    said = fails(didr, toy, tmp_path, "data.prompts=hf://datasets/acme/prompts")
    assert "data.prompts='hf://datasets/acme/prompts': cannot be reached" in said and "Download it" in said


def test_corrupt_shard(didr: Didr, toy: Path, tmp_path: Path) -> None:
    shards = tmp_path / "p"
    shutil.copytree(toy.parent / "prompts", shards)
    whole = (shards / "shard-001.parquet").read_bytes()
    (shards / "shard-001.parquet").write_bytes(whole[: len(whole) // 2])
    assert "shard-001.parquet is not a readable Parquet file" in fails(didr, toy, tmp_path, f"data.prompts={shards}")


def test_wrong_column(didr: Didr, toy: Path, tmp_path: Path) -> None:
    said = fails(didr, toy, tmp_path, "data.column=promt")
    assert "data.column='promt'" in said and "it has id, prompt" in said and "Did you mean 'prompt'?" in said


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", "", "c"], "a.parquet:1 "),
        (["a", "b", "  "], "a.parquet:2 "),
        ([None, "b", "c"], "a.parquet:0 "),
        ([1, 2, 3], "holds int64, expected text"),
        ([], "not one prompt"),
    ],
)
def test_prompts_that_are_no_prompts(
    didr: Didr, toy: Path, tmp_path: Path, values: list[object], expected: str
) -> None:
    kind = pa.int64() if values and isinstance(values[0], int) else pa.string()
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"prompt": pa.array(values, kind)}), tmp_path / "p" / "a.parquet")
    assert expected in fails(didr, toy, tmp_path, f"data.prompts={tmp_path}/p")


def test_a_broken_judge_is_called_judge(didr: Didr, toy: Path, tmp_path: Path) -> None:
    said = fails(didr, toy, tmp_path, f"judge={{name: pickscore, path: '{tmp_path}/no'}}")
    assert "judge.path=" in said and "reward.path" not in said


def test_unknown_names(didr: Didr, toy: Path, tmp_path: Path) -> None:
    said = didr("align", "--recipe", "tniy")
    assert "'tniy'" in said and "Did you mean 'tiny'?" in said
    assert "Did you mean 'didr'?" in fails(didr, toy, tmp_path, "algorithm=ddir")
    said = fails(didr, toy, tmp_path, "drp.estimator=twedie")
    assert "drp.estimator" in said and "'tweedie'" in said and "twedie" in said
    said = fails(didr, toy, tmp_path, "reward=pikscore")
    assert "'pikscore'" in said and "Did you mean 'pickscore'?" in said
    said = fails(didr, toy, tmp_path, "drp.betta=1")
    assert "unknown key 'drp.betta'" in said and "'drp.beta'" in said
    assert "run 'no-such-run'" in didr("align", "--resume", "no-such-run")
    assert "KEY=VALUE" in fails(didr, toy, tmp_path, "drp.beta")


def test_values_out_of_range(didr: Didr, toy: Path, tmp_path: Path) -> None:
    assert "drp.beta: Input should be greater than 0 (got 0)" in fails(didr, toy, tmp_path, "drp.beta=0")
    assert "drp.beta" in fails(didr, toy, tmp_path, "drp.beta=-0.5")
    assert "drp.steps" in fails(didr, toy, tmp_path, "drp.estimator=ode", "drp.steps=0")
    assert "does not divide by workers.train=3" in fails(didr, toy, tmp_path, "workers.train=3")


def test_weights_that_are_not_what_the_recipe_says(didr: Didr, toy: Path, tmp_path: Path) -> None:
    said = fails(didr, toy, tmp_path, f"backbone.pipeline={tmp_path}/nowhere")
    assert "backbone.pipeline=" in said and "no such folder" in said
    said = fails(didr, toy, tmp_path, f"backbone.pipeline={toy.parent / 'clip'}")
    assert "model_index.json is missing" in said and "StableDiffusionXLPipeline" in said
    said = fails(didr, toy, tmp_path, f"reward.path={toy.parent / 'pipeline' / 'unet'}")
    assert "reward.path=" in said and "expected clip" in said
    assert "backbone.generator=" in fails(didr, toy, tmp_path, f"backbone.generator={toy.parent / 'clip'}")


def test_more_workers_than_cpus_is_said_before_ray_starts(didr: Didr, toy: Path, tmp_path: Path) -> None:
    workers = 4 * (os.cpu_count() or 1) + 4
    said = fails(didr, toy, tmp_path, f"workers.train={workers}", f"train.batch={workers}")
    assert f"needs {workers + 2} CPU" in said and "workers.train" in said


def test_output_of_another_run(didr: Didr, toy: Path, tmp_path: Path) -> None:
    config = configs.load(str(toy))
    other = RunFolder.create(config, str(tmp_path / "other"))
    before = (other.path / "run.json").read_text()
    said = didr("align", "--recipe", toy, "--local", "--output", other.path)
    assert "belongs to run 'other'" in said and "--resume" in said
    assert (other.path / "run.json").read_text() == before
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.txt").write_text("mine")
    assert "not empty" in didr("align", "--recipe", toy, "--local", "--output", tmp_path / "files")
    assert "output='ftp://host/runs'" in didr("align", "--recipe", toy, "--set", "output=ftp://host/runs")
    with other.lock():
        assert "another process is training in it" in didr("align", "--resume", other.path, "--local")


def test_a_resumed_run_must_stay_the_same_run(didr: Didr, toy: Path, tmp_path: Path) -> None:
    run = RunFolder.create(configs.load(str(toy)), str(tmp_path / "run"))
    said = didr("align", "--resume", run.path, "--local", "--set", "drp.beta=2")
    assert "drp.beta=2" in said and "go on as it began" in said


def test_sample_and_export_say_what_is_missing(didr: Didr, toy: Path, tmp_path: Path) -> None:
    run = RunFolder.create(configs.load(str(toy)), str(tmp_path / "run"))
    assert "not exported yet" in didr("sample", "--run", run.path, "--prompt", "x")
    assert "no checkpoint yet" in didr("export", "--run", run.path)
    assert "model_index.json is missing" in didr("sample", "--export", toy.parent / "clip", "--prompt", "x")
    assert "either --run RUN or --export DIR" in didr("sample", "--prompt", "x")


def test_a_home_folder_is_meant_wherever_a_path_is(
    didr: Didr, toy: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave the ~ of ``--output=~/x`` and of ``--set a=~/x`` as it is."""
    monkeypatch.setenv("HOME", str(half.parent))
    monkeypatch.chdir(tmp_path)
    didr("export", f"--run=~/{half.name}", "--output=~/again", code=0)
    didr("sample", "--export=~/again", "--prompt", "~/a tilde", "--output=~/pictures", code=0)
    assert [p.name for p in (half.parent / "pictures").iterdir()] == ["a-tilde-seed0.png"]
    assert (half.parent / "again" / "model_index.json").is_file() and not list(tmp_path.iterdir())
    assert str(half.parent / "no") in didr("sample", "--export=~/no", "--prompt", "x")
    assert "no run folder" in didr("export", "--run=~no-such-user/x")


@pytest.fixture(scope="module")
def half(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with one checkpoint; tests go on from copies of it."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["align", "--recipe", str(toy), "--local", "--output", str(folder), "--set", "train.steps=2"])
    assert stop.value.code == 0
    return folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_at_a_checkpoint_loses_nothing(didr: Didr, half: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(half, run.path)
    before = {file.name: file.read_bytes() for file in run.checkpoint(2).iterdir()}
    partial = run.path / "checkpoints" / ".step-000004.part" / "state.json"
    partial.parent.mkdir()
    partial.symlink_to("/dev/full")
    said = didr("align", "--resume", run.path, "--local", "--set", "train.steps=4")
    assert "step-000004" in said and "the disk is full" in said and "bytes needed" in said and "free" in said
    assert run.checkpoints() == [2] and run.info()["status"] == "failed"
    assert before == {file.name: file.read_bytes() for file in run.checkpoint(2).iterdir()}
    assert not partial.parent.exists()
    didr("align", "--resume", run.path, "--local", code=0)
    assert run.checkpoints() == [2, 4] and run.info()["status"] == "finished"
    assert [row["step"] for row in map(json.loads, run.metrics_path.read_text().splitlines())] == [1, 2, 3, 4]


def test_a_damaged_run_is_named_wherever_it_is_read(didr: Didr, half: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(half, tmp_path / "run")))
    didr("align", "--resume", run.path, "--local", "--set", "train.steps=3", code=0)
    (run.checkpoint(3) / "ema.0.safetensors").write_bytes(b"")
    for command in (("align", "--local", "--resume"), ("export", "--overwrite", "--run")):
        said = didr(*command, run.path)
        assert "step-000003: damaged: ema.0.safetensors" in said and "goes on from step-000002" in said
    run.checkpoint(3).rename(tmp_path / "away")
    didr("align", "--resume", run.path, "--local", code=0)
    assert [row["step"] for row in map(json.loads, run.metrics_path.read_text().splitlines())] == [1, 2, 3]
    for name in ("run.json", "config.yaml", "metrics.jsonl"):
        shutil.copy(run.path / name, tmp_path / name)
        (run.path / name).write_bytes(b"\x80\x05 no text\n")
        assert f"{run.path / name}" in didr("align", "--resume", run.path, "--local").splitlines()[0]
        shutil.copy(tmp_path / name, run.path / name)


def test_a_nan_reward_stops_the_step_and_names_the_prompt(didr: Didr, toy: Path, tmp_path: Path) -> None:
    config = configs.load(str(toy))
    bad = PromptIndex.open(config.data.prompts).read(np.arange(16, 24), config.seed)[5]  # of step 3
    recipe = tmp_path / "nan.yaml"
    recipe.write_text(f"base: {toy}\nreward: {{name: 'toy:Treacherous', bad: '{bad.prompt}'}}\n")
    run = RunFolder(tmp_path / "run")
    said = didr("align", "--recipe", recipe, "--local", "--output", run.path)
    assert said.startswith("step 3: non-finite") and repr(bad.id) in said
    assert run.checkpoints() == [2] and run.info()["status"] == "failed" and bad.id in run.info()["message"]
    assert torch.isfinite(checkpoint.read(run.checkpoint(2), "scale")["total"]).all()


def test_the_reason_is_the_last_line_and_the_exit_code_is_1(toy: Path, tmp_path: Path) -> None:
    """As a shell sees it, and `ray job submit`, which runs this command."""
    command = [sys.executable, "-m", "pipelines.align", "--recipe", str(toy), "--set", "drp.beta=-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: ")
        and "drp.beta" in done.stderr.strip().splitlines()[-1]
    )
    assert not done.stdout


@pytest.mark.parametrize("recipe", ["tiny", "tiny_blackbox", "exact_2d"])
def test_recipes_of_the_bundled_world_pass_preflight(recipe: str, tmp_path: Path) -> None:
    """What `make demo` runs: a check that grew stricter must not refuse our own files."""
    preflight(configs.load(recipe, [f"output={tmp_path}"]))
