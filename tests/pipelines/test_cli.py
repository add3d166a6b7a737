"""The command line's own answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from didr_core import config as configs
from didr_core.train.run_folder import RunFolder
from pipelines.cli import main as cli
from pipelines.cli.explain import keys
from pipelines.cluster import session
from pipelines.cluster.resources import ClusterView, Node

ROOT = Path(__file__).resolve().parents[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"didr {version('didr')}\n"


HEAVY = "torch", "ray", "mlflow", "diffusers", "transformers", "numpy", "didr_core.config"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["align", "--help"], ["play", "--help"], ["compare", "--help"], ["doctor", "--help"], ["--version"]],
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


GROUP: Any = typer.main.get_command(cli.app)
EVERY = [[], ["config"], *([n] for n in GROUP.commands if n != "config"), ["config", "show"], ["config", "list"]]


@pytest.mark.parametrize("words", EVERY, ids=lambda words: " ".join(words) or "didr")
def test_help_ends_with_an_example_that_the_parser_takes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    said = re.sub(r"\s+", " ", capsys.readouterr().out).strip()
    assert stop.value.code == 0
    _, _, example = said.rpartition(" Example: ")
    given = shlex.split(example)
    assert given[:1] == ["didr"] and given[1 : 1 + len(words)] == words
    command: Any = GROUP
    for word in (rest := given[1:])[:]:
        if not isinstance(command, typer.core.TyperGroup):
            break
        command, rest = command.commands[word], rest[1:]
    command.make_context("didr", rest)


def test_a_recipe_is_told_in_whole_sentences() -> None:
    """`didr config list` shows the first line of each."""
    assert not [p.name for p in configs.RECIPES.glob("*.yaml") if not p.read_text().partition("\n")[0].endswith(".")]


def test_completion() -> None:
    env = {**os.environ, "_DIDR_COMPLETE": "complete_bash", "COMP_WORDS": "didr compa", "COMP_CWORD": "1"}
    run = "from pipelines.cli.main import main; main([])"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["compare"]
    assert "--install-completion" in [option for p in GROUP.params for option in p.opts]


def test_runs_are_listed_the_newest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wins = {"judge": {"wins": {"mean": 0.75, "low": 0.6, "high": 0.9}}}
    scores = {"version": 1, "models": {}, "pairs": [{"a": "aligned", "b": "start", "measures": wins}]}
    files = {
        "old/run.json": '{"status": "finished"}',
        "old/config.yaml": "train: {steps: 9}",
        "old/metrics.jsonl": '{"step": 8}\n{"step": 9}\n',
        "old/alarms.jsonl": '{"step": 8, "alarm": "clipping"}\n{"step": 9, "alarm": "clipping"}\n',
        "old/scores.json": json.dumps(scores),
        "new/run.json": '{"status": "running"}',
        "new/config.yaml": "train: {steps: 7}",
        "hurt/run.json": "{",
        "other/notes.txt": "",
    }
    for age, (name, text) in enumerate(reversed(files.items())):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (1e9 + age, 1e9 + age))
    os.utime(tmp_path / "new" / "run.json")
    with pytest.raises(SystemExit) as stop:
        cli.main(["runs", str(tmp_path)])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["new", "interrupted"], "no process is at work there"
    with pytest.raises(SystemExit), RunFolder(tmp_path / "new").lock():
        cli.main(["runs", str(tmp_path)])
    _, new, old, hurt = capsys.readouterr().out.splitlines()[:4]
    assert new.split()[:3] == ["new", "running", "0/7"] and re.search(r"\b0:\d\d\b", new)
    assert re.search(r"^old +finished +9/9 .* ago +held-out judge: wins 75 % \(60 to 90\) +clipping \(2\)$", old)
    assert hurt.startswith("hurt") and "?" in hurt
    with pytest.raises(SystemExit) as stop:
        cli.main(["runs", str(tmp_path / "other")])
    assert stop.value.code == 1 and "no runs there" in capsys.readouterr().err


def test_doctor_says_what_nodes_have_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ClusterView((Node("one", {"CPU": 4.0, "memory": 17137500000.0, "node:one": 1.0}),))
    monkeypatch.setattr(session, "ray_session", lambda address: contextlib.nullcontext(nodes))
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--address", "auto"])
    assert re.search(r"one .* 4 CPU, 16\.0 GiB memory", capsys.readouterr().out)
