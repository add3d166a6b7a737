"""The command line's own answers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from didr_core import config as configs
from pipelines.cli import main as cli
from pipelines.cli.explain import keys

ROOT = Path(__file__).resolve().parents[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"didr {version('didr')}\n"


HEAVY = "torch", "ray", "mlflow", "diffusers", "transformers", "numpy", "didr_core.config"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["align", "--help"], ["evaluate", "--help"], ["doctor", "--help"], ["--version"]]
)
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    look = f"import sys, atexit; atexit.register(lambda: print('LOADED', *[m for m in {HEAVY} if m in sys.modules]))"
    run = f"{look}; from pipelines.cli.main import main; main({arguments})"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]


def test_doctor_reads_a_plan_without_the_libraries_that_made_it(tmp_path: Path) -> None:
    look = "import sys, atexit; atexit.register(lambda: print('LOADED', *[m for m in ('diffusers', 'peft') if m in sys.modules]))"
    run = f"{look}; from pipelines.cli.main import main; main(['doctor', '--recipe', 'tiny'])"
    said = [
        subprocess.run(
            [sys.executable, "-c", run],
            cwd=ROOT,
            env={**os.environ, "DIDR_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert said[0][-1] == "LOADED diffusers peft"
    assert said[1][-1] == "LOADED"
    assert said[0][:-1] == said[1][:-1]


@pytest.mark.parametrize("command", [("config", "show"), ("doctor",)])
@pytest.mark.parametrize("key", ["reward", "judge", "algorithm", "backbone", "drp.estimator"])
def test_commands_that_do_not_train_run_no_code_of_a_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...], key: str
) -> None:
    code, ran = tmp_path / "mine.py", tmp_path / "ran"
    code.write_text(f"open({str(ran)!r}, 'w')\n")
    name = f"{code}:Mine"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"base": "tiny", **(nested(key, name))}))
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--recipe", str(recipe)])
    said = capsys.readouterr().out.replace("\n", "")
    assert stop.value.code == 0 and f"not loaded: {name}." in said and not ran.exists()
    with pytest.raises(SystemExit) as stop:  # what trains runs it
        cli.main(["align", "--recipe", str(recipe)])
    assert stop.value.code == 1 and ran.exists() and "cannot import" in capsys.readouterr().err


def test_prompts_of_any_kind_become_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\na red ring\tx\nA red ring\ty\n\tz\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "' + "a red ring " * 7 + '"}\n')
    (tmp_path / "held.txt").write_text("a red ring\n")
    files, out = [str(tmp_path / "a.tsv"), str(tmp_path / "b.jsonl")], tmp_path / "out"
    arguments = [*files, "--out", str(out), "--against", str(tmp_path / "held.txt"), "--recipe", "tiny"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["prompts", *arguments])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"3 prompts in {out} (of 4 rows)",
        "1 empty, left out",
        "1 duplicates, kept (--drop leaves them out)",
        f"2 are in {tmp_path / 'held.txt'} too, e.g. 'a red ring'",
        "1 longer than the encoder reads (tokenizer: 20 tokens)",
        "1 longer than the encoder reads (tokenizer_2: 20 tokens)",
        "1 longer than the reward reads (taste: 20 tokens)",
    ]


def nested(key: str, name: str) -> dict[str, Any]:
    section, _, below = key.partition(".")
    return {section: {below: name} if below else {"name": name, "option": 3}}


@pytest.mark.parametrize("recipe", ["tiny", "zimage_1gpu", "exact_2d"])
def test_every_key_is_explained(recipe: str) -> None:
    told = {key.path: key.meaning for key in keys(configs.load(recipe))}
    assert not [path for path, meaning in told.items() if len(meaning) < 9]
    assert "temperature" in told["drp.beta"]
    assert "reward is not heard" in told["alarms.drs_silent"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drp.beta"], ["drp.beta", "0.15", "number > 0", "temperature"]),
        (["train", "-s", "train.batch=12"], ["train.batch", "12", "train.micro_batch", "train.threads"]),
    ],
)
def test_explain(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", *arguments])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in out for word in said)


def test_explain_names_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", "drp.bet"])
    assert stop.value.code == 1 and "Did you mean 'drp.beta'?" in capsys.readouterr().err
