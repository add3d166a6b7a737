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


def test_a_key_with_a_new_meaning_says_so_and_keeps_no_old_value(tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match="now called 'drp.split_noise'.*a time and is a noise level now"):
        config.load("tiny", ["drp.split=0.4"])
    tree = config.dump(config.load("tiny"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"drp": {"estimator": "hybrid", "split": 0.4}}))
    assert config.recorded(tmp_path / "config.yaml").drp.split_noise == config.load("exact_2d").drp.split_noise


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load("tiny").name == "tiny" and (config.RECIPES / "tiny.yaml").is_file()


def test_values_keep_their_types_and_are_not_shared(tmp_path: Path) -> None:
    judge = {"name": "pickscore", "path": "somewhere"}
    found = config.load("tiny", ["drp.beta=0.5"], {"drp.beta": 1e-05, "judge": judge, "judge.path": "elsewhere"})
    assert found.drp.beta == 1e-05 and found.judge is not None and found.judge.model_dump()["path"] == "elsewhere"
    assert judge["path"] == "somewhere"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.dump(found)))
    assert config.recorded(tmp_path / "c.yaml", values={"train.steps": 7}).train.steps == 7
    with pytest.raises(DIDRError, match=r"unknown key 'drp.betta'.*Did you mean 'drp.beta'"):
        config.load("tiny", values={"drp.betta": 1})
