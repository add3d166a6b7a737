"""The command line's own answers."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from pipelines.cli import main as cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"didr {version('didr')}\n"
