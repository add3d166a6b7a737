"""examples/align_tiny.ipynb: its cells run in order, in one namespace, and are committed without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / "examples" / "align_tiny.ipynb"
CODE = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_is_committed_without_outputs_and_uses_the_core_alone() -> None:
    assert len(CODE) > 6 and not [cell for cell in CODE if cell["outputs"] or cell["execution_count"]]
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", "\n".join("".join(c["source"]) for c in CODE), re.MULTILINE))
    assert imported == {"torch", "PIL", "didr_core"}


@pytest.mark.slow
def test_its_cells_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    before, after = names["before"], names["after"]
    assert before.shape == after.shape == (8, 3, 32, 32) and (before - after).abs().mean() > 0.003
    assert names["cosine"].min() > 0.999
    assert names["gain"].mean() > 0, "s_r leads uphill"
    gains = [float(g) for g in re.findall(r"reward ([-+.\d]+) sd", capsys.readouterr().out)]
    assert len(gains) == 10 and torch.tensor(gains).isfinite().all()
