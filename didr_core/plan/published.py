"""The published architectures at full size (`published.yaml`), as the configs of pipeline folders without weights: no memory, no hub.

For memory plans, FLOP counts, layout tests and random-weight benchmarks. Backbones read the folder they are given and never this file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Settings = Mapping[str, Any]

PARTS: Mapping[str, Mapping[str, Settings]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
"""``PARTS[family][part]``: settings, and under ``class`` the class of diffusers or transformers; parts as in a pipeline folder."""


def write(family: str, folder: Path, **parts: Settings) -> Path:
    """Make ``folder`` a pipeline folder of ``family`` without weights, ``parts`` in place of the published ones; returns it."""
    made = {**PARTS[family], **parts}
    for part, settings in made.items():
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_complete(**settings)))
    (folder / "model_index.json").write_text(json.dumps({part: ["", s["class"]] for part, s in made.items()}))
    return folder


def _complete(**settings: Any) -> dict[str, Any]:
    """``settings`` with the class's own defaults for what they leave out."""
    import diffusers
    import transformers

    name = settings.pop("class")
    if hasattr(diffusers, name):
        signature = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        defaults = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}
        return {**defaults, **settings, "_class_name": name}
    return {**getattr(transformers, name).config_class(**settings).to_dict(), "architectures": [name]}
