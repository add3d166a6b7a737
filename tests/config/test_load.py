"""Keys that were renamed: recipes get an error that names the new one, runs and exports of before are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from didr_core import config
from didr_core.config.load import RENAMED
from didr_core.types import DIDRError


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_names_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match=rf"'{old}' .*is now called '{new}'"):
        config.load("tiny", [f"{old}=1"])
    tree = config.dump(config.load("tiny"))
    section, _, key = old.partition(".")
    value = tree[section].pop(new.partition(".")[2])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {section: tree[section] | {key: value}}))
    assert config.recorded(tmp_path / "config.yaml") == config.load("tiny")
    with pytest.raises(DIDRError, match="is now called"):
        config.load(str(tmp_path / "config.yaml"))


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load("tiny").name == "tiny" and (config.RECIPES / "tiny.yaml").is_file()
