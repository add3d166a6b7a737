"""The scores of models as a file and a table: ``scores.json`` to read, ``scores.npz`` to compute with."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from didr_core.config.files import replace_text, replaced
from didr_core.config.provenance import provenance
from didr_core.evaluate.paired import Array, Bootstrap, interval, won
from didr_core.export.card import markdown
from didr_core.types import DIDRError

VERSION = 1
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Measure:
    """How a measure is named and read. ``better`` is "higher", "lower" or "" (to be compared with the start's)."""

    title: str
    better: str = "higher"
    unit: str = ""
    shown: bool = True  # in the short table


MEASURES: dict[str, Measure] = {
    "reward": Measure("training reward"),
    "judge": Measure("held-out judge"),
    "utility": Measure("true utility"),
    "strict": Measure("strict accuracy", unit="%"),
    "loose": Measure("loose accuracy", unit="%", shown=False),
    "diversity": Measure("diversity over seeds"),
    "layout_diversity": Measure("layout diversity over seeds", shown=False),
    "feature_diversity": Measure("feature distance over seeds"),
    "lpips_diversity": Measure("LPIPS over seeds"),
    "background_entropy": Measure("free background", unit="bits"),
    "position_entropy": Measure("free position", unit="bits"),
    "clipped": Measure("clipped values", "", "%", shown=False),
    "saturation": Measure("saturation", "", shown=False),
    "latent_mean": Measure("latent mean", "", shown=False),
    "latent_std": Measure("latent deviation", "", shown=False),
    "size": Measure("object size", shown=False),
    "contrast": Measure("contrast", shown=False),
    "centring": Measure("centring", "", shown=False),
    "shape_iou": Measure("shape overlap", shown=False),
}
for _facet in ("count", "colour", "shape", "relation", "background"):
    MEASURES[f"right_{_facet}"] = Measure(f"{_facet} right", unit="%", shown=False)
for _kind in ("single", "count", "pair", "relation"):
    MEASURES[f"strict_{_kind}"] = Measure(f"strict, {_kind}", unit="%", shown=False)
JUDGES = ("utility", "judge", "reward")
"""Measures that give a verdict, the last word first."""


def describe(name: str) -> Measure:
    """The entry of :data:`MEASURES`, one for a reward by its name (``reward/hpsv2``), or a plain one for what a world brought itself."""
    plain = Measure(name.removeprefix("reward/").replace("_", " "), shown=name.startswith("reward/"))
    return MEASURES.get(name) or plain


@dataclass(frozen=True)
class Scores:
    """``tree`` is what scores.json holds; ``arrays`` is ``{model: {measure: [T, S, N]}}``, NaN (or a negative code) where undefined."""

    tree: dict[str, Any]
    arrays: dict[str, Arrays]

    @classmethod
    def build(
        cls,
        models: Mapping[str, Mapping[str, Any]],
        arrays: dict[str, Arrays],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        facts: Mapping[str, Any] | None = None,
        focus: str = "aligned",
        world: str = "none",
        resamples: int = 2000,
    ) -> Scores:
        """Statistics over measured values. Codes (integer arrays named ``<what>_code``, groups ``<what>_group``) become entropies."""
        trainings = max(len(next(iter(values.values()))) for values in arrays.values())
        full = {name: {key: _numbers(value) for key, value in values.items()} for name, values in arrays.items()}
        boot = Bootstrap(len(prompts), trainings, resamples)
        bits = {name: {f"{w}_entropy": v for w, v in entropies(boot, values)} for name, values in full.items()}
        rows: dict[str, Any] = {}
        for name, values in full.items():
            drawn = {key: boot.means(value) for key, value in values.items() if not _is_code(key)} | bits[name]
            rows[name] = {**models[name], "measures": _ordered({k: interval(v).tree() for k, v in drawn.items()})}
        pairs = [
            {"a": a, "b": b, "measures": _compare(boot, full[a], full[b], bits[a], bits[b])}
            for a, b in _pairs(list(full), focus)
        ]
        named = sorted({key for row in rows.values() for key in row["measures"]}, key=_rank)
        tree = {
            "version": VERSION,
            "world": world,
            "counts": {
                "prompts": len(prompts),
                "seeds": len(seeds),
                "trainings": trainings,
                "pictures_per_model": len(prompts) * len(seeds) * trainings,
            },
            "seeds": list(seeds),
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "intervals": f"95 %, paired bootstrap over captions{' and training seeds' if trainings > 1 else ''}, {resamples} resamples",
            "models": rows,
            "pairs": pairs,
            "measures": {key: {k: v for k, v in vars(describe(key)).items() if k != "shown"} for key in named},
            "facts": dict(facts or {}),
        }
        return cls(tree, arrays)

    def write(self, folder: Path) -> Path:
        """``scores.json`` and ``scores.npz`` into ``folder``, each atomically; returns the path of the JSON."""
        folder = Path(folder)
        arrays = {f"{model}/{key}": v for model, values in self.arrays.items() for key, v in values.items()}
        with replaced(folder / "scores.npz") as partial:
            np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
        replace_text(folder / "scores.json", json.dumps(self.tree, indent=1, ensure_ascii=False) + "\n")
        return folder / "scores.json"

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """What :meth:`write` wrote."""
        arrays: dict[str, Arrays] = {}
        with np.load(Path(folder) / "scores.npz", allow_pickle=False) as file:
            for name in file.files:
                model, _, measure = name.partition("/")
                arrays.setdefault(model, {})[measure] = file[name]
        return cls(read_scores(Path(folder) / "scores.json"), arrays)


def read_scores(path: Path) -> dict[str, Any]:
    """The tree of a scores.json.

    Raises:
        DIDRError: not there, not JSON, or of another version.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DIDRError(
            f"{path}: cannot read scores ({error}). A run with evaluation.prompts above 0 writes them."
        ) from error
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        found = tree.get("version") if isinstance(tree, dict) else type(tree).__name__
        raise DIDRError(f"{path}: scores of version {found!r}, expected {VERSION}. Score the run again.")
    return tree


def pool(scores: Sequence[Scores], facts: Mapping[str, Any] | None = None, focus: str = "aligned") -> Scores:
    """One comparison out of several trainings of the same contest (same prompts, noise seeds and models), paired training by training.

    Raises:
        DIDRError: prompts, seeds or models differ.
    """
    first = scores[0].tree
    for other in scores[1:]:
        for key in ("prompts_sha256", "seeds", "world"):
            if other.tree[key] != first[key]:
                raise DIDRError(
                    f"pool: scores differ in {key!r} ({first[key]!r}, {other.tree[key]!r}); only like can be compared with like"
                )
        if list(other.arrays) != list(scores[0].arrays):
            raise DIDRError(f"pool: scores of other models: {list(scores[0].arrays)} and {list(other.arrays)}")
    arrays = {
        model: {key: np.concatenate([s.arrays[model][key] for s in scores]) for key in values}
        for model, values in scores[0].arrays.items()
    }
    models = {name: {k: v for k, v in row.items() if k != "measures"} for name, row in first["models"].items()}
    count = first["counts"]["prompts"]
    built = Scores.build(
        models, arrays, [""] * count, first["seeds"], facts=facts or first["facts"], focus=focus, world=first["world"]
    )
    return Scores(built.tree | {"prompts_sha256": first["prompts_sha256"]}, arrays)


def table(tree: Mapping[str, Any], everything: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: a row a model, a column a measure, "mean ± half the 95 % interval"."""
    names = [n for n in tree["measures"] if (everything or describe(n).shown) and _known(tree, n)]
    header = ["model", "steps", *(title(n) for n in names)]
    models = tree["models"].items()
    return header, [
        [model, str(row.get("steps", "")), *(show(row["measures"].get(n), n) for n in names)] for model, row in models
    ]


def comparison_table(
    tree: Mapping[str, Any], a: str, measures: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Model ``a`` against every other: difference and win rate with intervals, one row per (opponent, measure)."""
    header = ["against", "measure", "difference", "95 % interval", "wins", "95 % interval"]
    rows = []
    for pair in tree["pairs"]:
        if pair["a"] != a:
            continue
        for name in measures or [n for n in pair["measures"] if describe(n).shown]:
            entry = pair["measures"].get(name)
            if entry is None or entry["difference"]["mean"] is None:
                continue
            wins = entry.get("wins")
            difference = entry["difference"]
            rows.append(
                [
                    pair["b"],
                    title(name),
                    _number(difference["mean"], name, sign=True),
                    f"{_number(difference['low'], name, sign=True)} to {_number(difference['high'], name, sign=True)}",
                    f"{100 * wins['mean']:.1f} %" if wins else "",
                    f"{100 * wins['low']:.1f} to {100 * wins['high']:.1f} %" if wins else "",
                ]
            )
    return header, rows


def win_matrix(tree: Mapping[str, Any], name: str) -> dict[str, dict[str, dict[str, float]]]:
    """``{a: {b: {"mean", "low", "high"}}}``: the share of prompts and noises in which a beats b by the measure ``name``, a tie a half;
    empty where it gives no wins."""
    matrix: dict[str, dict[str, dict[str, float]]] = {}
    for pair in tree["pairs"]:
        wins = pair["measures"].get(name, {}).get("wins")
        if wins and wins["mean"] is not None:
            matrix.setdefault(pair["a"], {})[pair["b"]] = dict(wins)
            other = {"mean": 1 - wins["mean"], "low": 1 - wins["high"], "high": 1 - wins["low"]}
            matrix.setdefault(pair["b"], {})[pair["a"]] = other
    return matrix


def laws_table(tree: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How far models' pictures are from those of one of them, as a set: header and rows; no rows where that was not asked for."""
    laws = tree.get("laws", {"real": "", "models": {}})
    names = list(next(iter(laws["models"].values()), {}))
    header = [f"against {laws['real']}", *(n.upper() if n in ("fid", "kid", "cmmd") else n for n in names)]
    return header, [[model, *(f"{row[n]:.4g}" for n in names)] for model, row in laws["models"].items()]


def numbers(tree: Mapping[str, Any], focus: str) -> dict[str, float]:
    """What a tracker ranks runs by: ``<model>/<measure>``, and ``wins/<opponent>/<measure>`` of ``focus``."""
    found = {
        f"{model}/{n}": entry["mean"] for model, row in tree["models"].items() for n, entry in row["measures"].items()
    }
    for pair in (p for p in tree["pairs"] if p["a"] == focus):
        found |= {
            f"wins/{pair['b']}/{n}": entry["wins"]["mean"] for n, entry in pair["measures"].items() if "wins" in entry
        }
    return {name: value for name, value in found.items() if value is not None}


def card_section(tree: Mapping[str, Any] | None) -> str:
    """What a model card says of scores, in Markdown."""
    if not tree:
        return "Not scored."
    counts, facts = tree["counts"], tree.get("facts", {})
    lines = [
        f"{counts['prompts']} held-out prompts, noise seeds {tree['seeds']}, {counts['pictures_per_model']} pictures a model; "
        f"mean ± half the 95 % interval ({tree['intervals']}).",
        markdown(*table(tree)),
    ]
    header, rows = comparison_table(tree, "aligned")
    if rows:
        lines += ["The aligned generator against the others, prompt by prompt:", markdown(header, rows)]
    if facts.get("commands"):
        lines.append("Made by `" + "`, then `".join(facts["commands"]) + "`.")
    return "\n\n".join(lines)


def title(name: str) -> str:
    """Name of a measure with its unit."""
    entry = describe(name)
    return f"{entry.title}, {entry.unit}" if entry.unit else entry.title


def show(entry: Mapping[str, float | None] | None, name: str) -> str:
    """``mean ± half the interval``; a dash where undefined."""
    if not entry or entry["mean"] is None:
        return "–"
    low, high = entry["low"], entry["high"]
    half = "" if low is None or high is None else f" ± {_number((high - low) / 2, name)}"
    return _number(entry["mean"], name) + half


def origin(prompts_source: str = "", commands: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Where, when and with what a table was made: the ``facts`` of scores. No host names, no paths: files with it are published."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commands": list(commands),
        "prompts_source": prompts_source,
        "hardware": hardware,
        **provenance(),
        **more,
    }


def _compare(boot: Bootstrap, a: Arrays, b: Arrays, bits_a: Arrays, bits_b: Arrays) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    for key in a:
        if key not in b or _is_code(key):
            continue
        measures[key] = {"difference": interval(boot.means(a[key] - b[key])).tree()}
        # A share of wins says something of one prompt's pictures; a yes/no measure would count mostly ties.
        if describe(key).better and not key.startswith(("strict", "loose", "right_")):
            measures[key]["wins"] = interval(boot.means(won(a[key], b[key]))).tree()
    for key in bits_a.keys() & bits_b.keys():
        measures[key] = {"difference": interval(bits_a[key] - bits_b[key]).tree()}
    return _ordered(measures)


def _pairs(names: Sequence[str], focus: str) -> Iterator[tuple[str, str]]:
    """All pairs, ``focus`` first in each of its own; of the rest the later against the earlier."""
    rest = [n for n in names if n != focus]
    if focus in names:
        yield from ((focus, n) for n in rest)
    yield from ((rest[j], rest[i]) for j in range(len(rest)) for i in range(j))


def _is_code(key: str) -> bool:
    return key.endswith(("_code", "_group"))


def entropies(boot: Bootstrap, values: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Array]]:
    """``(what, bits [R + 1])`` of every ``<what>_code``, its captions grouped by ``<what>_group`` where there is one."""
    for key in values:
        if key.endswith("_code"):
            what = key.removesuffix("_code")
            groups = values.get(f"{what}_group")
            yield what, boot.entropy(values[key], None if groups is None else groups[0, 0])


def _numbers(values: NDArray[Any]) -> NDArray[Any]:
    """Yes/no becomes 1/0."""
    return values.astype(np.float64) if values.dtype == bool else values


def _rank(name: str) -> tuple[int, str]:
    order = list(MEASURES)
    return (order.index(name) if name in order else len(order), name)


def _ordered(measures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: measures[name] for name in sorted(measures, key=_rank)}


def _known(tree: Mapping[str, Any], name: str) -> bool:
    return any((row["measures"].get(name) or {}).get("mean") is not None for row in tree["models"].values())


def _number(value: float | None, name: str, sign: bool = False) -> str:
    if value is None:
        return "–"
    if describe(name).unit == "%":
        return f"{100 * value:{'+' if sign else ''}.1f}"
    return f"{value:{'+' if sign else ''}.3f}" if abs(value) < 100 else f"{value:{'+' if sign else ''}.1f}"
