"""Recipes and `--set` as people type them: nothing is cut, turned into something else, or replaced without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from didr_core import config
from didr_core.config.files import read_yaml, typed
from didr_core.types import DIDRError

TYPED = [
    ("*.parquet", "*.parquet"),
    ("@x", "@x"),
    ("[a", "[a"),
    ("[v2]/a.parquet", "[v2]/a.parquet"),
    ("/data/set #2/a", "/data/set #2/a"),
    ("a: b", "a: b"),
    ("- a", "- a"),
    ("&a x", "&a x"),
    ("!x y", "!x y"),
    ("| x", "| x"),
    ("%x", "%x"),
    ("=", "="),
    ("~/prompts", "~/prompts"),
    ("010", "010"),
    ("1:30", "1:30"),
    ("2026-01-01", "2026-01-01"),
    ("'a #1'", "a #1"),
    ("7", 7),
    ("-0x1F", -31),
    ("0.5", 0.5),
    ("true", True),
    ("null", None),
    ("", None),
    ("[1, 0.5]", [1, 0.5]),
    ("{name: ode, path: 'a #1'}", {"name": "ode", "path": "a #1"}),
]


@pytest.mark.parametrize(("text", "value"), TYPED)
def test_values_are_taken_as_typed(text: str, value: Any) -> None:
    assert typed(text) == value and type(typed(text)) is type(value)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_no_text_is_a_traceback_and_what_is_no_yaml_value_is_itself(text: str) -> None:
    try:
        found = typed(text)
    except yaml.YAMLError:
        assert text.strip().startswith("{")
    else:
        if isinstance(found, str) and text.strip()[:1] not in ("[", "{", "'", '"'):
            assert found == text.strip()


@settings(deadline=None)
@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("01:-_.exyn# é*[&", max_size=9))
def test_what_we_write_is_read_back(value: Any) -> None:
    assert read_yaml(yaml.safe_dump({"a": value}, allow_unicode=True)) == {"a": value}


def test_leading_zeros_are_decimal() -> None:
    assert config.load("tiny", ["train.steps=010", "name=007"]).train.steps == 10


@pytest.mark.parametrize("item", ["drp.beta={a: 1", "drp={beta: 1, beta: 2}", "drp={beta: 1}}"])
def test_a_broken_mapping_is_a_sentence(item: str) -> None:
    with pytest.raises(DIDRError, match=r"--set 'drp"):
        config.load("tiny", [item])


@pytest.mark.parametrize("value", [".inf", "inf", "-Infinity", "nan", ".nan", "1e999"])
@pytest.mark.parametrize("key", ["drp.beta", "generator.max_grad_norm", "train.ema_decay", "times.generator"])
def test_infinities_are_refused(key: str, value: str) -> None:
    sets = [f"{key}=[0.1, {value}]" if key.startswith("times") else f"{key}={value}"]
    with pytest.raises(DIDRError, match=r"finite number|greater than|less than|valid number"):
        config.load("tiny", sets)


def recipe(folder: Path, text: str, encoding: str = "utf-8", name: str = "r.yaml") -> str:
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
def test_a_recipe_in_another_encoding_is_a_sentence(tmp_path: Path, encoding: str) -> None:
    path = recipe(tmp_path, "# café\nbase: tiny\nname: é\n", encoding)
    with pytest.raises(DIDRError, match=r"^recipe '.*r\.yaml': not UTF-8 \(.*\); save it as UTF-8\.$"):
        config.load(path)


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    assert config.load(recipe(tmp_path, "base: tiny\nname: é\n", "utf-8-sig")).name == "é"


def test_a_key_given_twice_names_both_lines(tmp_path: Path) -> None:
    text = "base: tiny\ntrain: {steps: 5}\nname: x\ntrain:\n  batch: 4\n"
    with pytest.raises(DIDRError, match="'train' is given twice, in lines 2 and 4"):
        config.load(recipe(tmp_path, text))
    with pytest.raises(DIDRError, match="'steps' is given twice, in lines 3 and 4"):
        config.load(recipe(tmp_path, "base: tiny\ntrain:\n  steps: 5\n  steps: 6\n"))


def test_a_base_is_found_beside_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    recipe(tmp_path / "recipes", "base: tiny\nname: common\ntrain: {steps: 3}\n", name="common.yaml")
    top = recipe(tmp_path / "recipes", "base: common.yaml\nname: top\n", name="top.yaml")
    monkeypatch.setenv("HOME", str(tmp_path / "recipes"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.load(top).train.steps == 3 == config.load("~/top.yaml").train.steps
    circle = recipe(tmp_path / "recipes", "base: circle.yaml\n", name="circle.yaml")
    with pytest.raises(DIDRError, match="goes in a circle"):
        config.load(circle)
    with pytest.raises(DIDRError, match="base=.*expected the name or the file of one recipe"):
        config.load(recipe(tmp_path, "base: [tiny, other]\n"))
