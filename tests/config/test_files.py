"""Files are replaced whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from didr_core.config.files import claimed, expanded, replace_text, replaced


def test_a_file_is_replaced_whole_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    replace_text(path, "first, ±")
    replace_text(path, "second")
    assert path.read_text() == "second" and [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    replace_text(path, "old")
    with pytest.raises(OSError, match="full"), replaced(path) as partial:
        assert partial.suffix == ".npz" and partial.parent == tmp_path  # numpy appends a suffix that is missing
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_names_of_the_same_second_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: claimed(tmp_path / "runs", "toy"), range(24)))
    assert names == {"toy-20260101-000000", *(f"toy-20260101-000000-{n}" for n in range(1, 24))}
    assert names == {path.name for path in (tmp_path / "runs").iterdir()}


def test_a_leading_tilde_is_the_home_folder_and_an_unknown_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == Path("/home/me/x") and expanded("~") == Path("/home/me")
    assert expanded("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert expanded("/a/~/b") == Path("/a/~/b")
