"""The command line's own answers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main as cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"didr {version('didr')}\n"


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


def nested(key: str, name: str) -> dict[str, Any]:
    section, _, below = key.partition(".")
    return {section: {below: name} if below else {"name": name, "option": 3}}
