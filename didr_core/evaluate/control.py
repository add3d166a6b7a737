"""A control's row that was measured once and is shipped: `evaluation.control: world://control.json`, so that every demo shows one.

The control is the very same training without the reward. What is kept is its training's settings, its seed, and its measures of the first
held-out prompts, so that a run is compared with it prompt by prompt on the same noise, as with a control trained beside it. It is
left out, with the reason, where it is no control: where any setting that it depends on is another. `python -m benchmarks.control` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from didr_core.config import Config, dump, flatten, locate
from didr_core.config.files import mapping, replace_text
from didr_core.evaluate.scores import Scores
from didr_core.types import DIDRError

SECTIONS = ("backbone", "reward", "judge", "guidance", "times", "generator", "assistant", "roles")
OF_TRAIN = ("steps", "batch", "assistant_updates", "assistant_warmup", "ema_decay", "anchor")
"""What a control's training and its measures follow from, beside the prompts."""
KEPT = ("reward", "judge", "utility", "strict", "background_code", "position_code", "position_group")
"""Measures that are kept: what the short table shows of one noise seed."""


def kept(path: str | None) -> bool:
    """Whether ``evaluation.control`` names such a file, and not a run's folder."""
    return bool(path) and str(path).endswith(".json")


def read(path: str) -> dict[str, Any]:
    """What :func:`keep` wrote.

    Raises:
        DIDRError: there is no such file, or something else is in it.
    """
    file = Path(locate(path))
    if not file.is_file():
        raise DIDRError(
            f"evaluation.control={path!r}: no such file. Expected a run's folder, or what benchmarks.control made."
        )
    tree = mapping(file.read_bytes(), f"evaluation.control={path!r}")
    if missing := {"settings", "seed", "seeds", "prompts", "model", "measures"} - tree.keys():
        raise DIDRError(
            f"evaluation.control={path!r}: has no {', '.join(sorted(missing))}. Make it again: python -m benchmarks.control."
        )
    return tree


def with_control(scores: Scores, config: Config, prompts: Sequence[str]) -> Scores:
    """``scores`` with the kept control's row before the aligned one's; as they are, with the reason in their facts, where it is none."""
    path = config.evaluation.control
    if path is None or not kept(path) or "control" in scores.arrays:
        return scores
    tree = read(path)
    if reason := _other(tree, config, prompts, scores.tree["seeds"]):
        told = f"no control is shown: {reason}"
        return replace(scores, tree={**scores.tree, "facts": {**scores.tree["facts"], "control": told}})
    places = {seed: place for place, seed in enumerate(tree["seeds"])}
    rows = [places[seed] for seed in scores.tree["seeds"]]
    own = {name: np.array(values)[rows, : len(prompts)][None] for name, values in tree["measures"].items()}
    models = {name: {k: v for k, v in row.items() if k != "measures"} for name, row in scores.tree["models"].items()}
    told = (
        f"the control was trained once before, with training seed {tree['seed']} ({tree['made by']}), not in this run"
    )
    return Scores.build(
        _second(models, {**tree["model"], "seed": tree["seed"]}),
        _second(scores.arrays, own),
        prompts,
        scores.tree["seeds"],
        facts={**scores.tree["facts"], "control": told},
        world=scores.tree["world"],
    )


def keep(scores: Scores, config: Config, prompts: Sequence[str], path: Path, command: str) -> None:
    """Write the aligned row of ``scores``, of a finished control's run, as such a file."""
    measures = {}
    for name, values in scores.arrays["aligned"].items():
        if name in KEPT:
            rows = values[0] if values.dtype.kind == "f" else values[0].astype(int)
            measures[name] = np.round(rows, 4).tolist()
    row = {key: scores.tree["models"]["aligned"][key] for key in ("steps", "guidance")}
    lines = {
        "made by": command,
        "seed": config.seed,
        "seeds": scores.tree["seeds"],
        "settings": _settings(config),
        "model": row,
        "prompts": [_hash(prompt) for prompt in prompts],
        "measures": measures,
    }
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines.items())
    replace_text(path, f"{{{text}}}\n")


def _other(tree: Mapping[str, Any], config: Config, prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """Why the kept control is none of this run; empty where it is one."""
    if not config.needs_reward:
        return f"{config.algorithm.name} uses no reward"
    own, settings = tree["settings"], _settings(config)
    for key in [*settings, *own]:
        if (now := settings.get(key)) != (then := own.get(key)):
            return f"{key} is {now!r} here and {then!r} in {config.evaluation.control}"
    if len(prompts) > len(tree["prompts"]) or tree["prompts"][: len(prompts)] != [_hash(p) for p in prompts]:
        return (
            f"other held-out prompts, or more of them, than the {len(tree['prompts'])} of {config.evaluation.control}"
        )
    if missing := [seed for seed in seeds if seed not in tree["seeds"]]:
        return f"noise seeds {missing} are not in {config.evaluation.control}"
    return ""


def _settings(config: Config) -> dict[str, Any]:
    tree = json.loads(json.dumps(dump(config)))
    train = {key: tree["train"][key] for key in OF_TRAIN}
    return flatten({key: tree[key] for key in SECTIONS} | {"train": train, "data.prompts": config.data.prompts})


def _second(mapping_: Mapping[str, Any], control: Any) -> dict[str, Any]:
    """``control`` after the first entry, the start."""
    first, *rest = mapping_.items()
    return dict([first, ("control", control), *rest])


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]
