"""`benchmarks.pareto` without its trainings: the plan, the settings of each point, and the report on made-up measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import pareto, pareto_along
from benchmarks.pareto_figure import save_fronts
from didr_core import config
from didr_core.types import DIDRError


def test_every_method_and_weight_is_a_valid_run() -> None:
    base = config.load("tiny")
    for name, method in pareto.METHODS.items():
        for weight in pareto.WEIGHTS:
            made = config.load("tiny", method.settings(base, weight))
            assert made.algorithm.name == name.removesuffix("_hybrid").removesuffix("_blackbox")
    stronger = config.load("tiny", pareto.METHODS["didr"].settings(base, 2.0))
    assert stronger.drp.beta == pytest.approx(base.drp.beta / 2)
    dmdr = [config.load("tiny", pareto.METHODS["dmdr"].settings(base, w)).algorithm for w in (1.0, 4.0)]
    assert dmdr[1].weight == pytest.approx(4 * dmdr[0].weight)  # type: ignore[attr-defined]


def test_controls_are_trained_once_a_seed_and_seeds_come_first() -> None:
    plan = pareto.points(["didr", "diff_instruct"], [0.5, 1.0], [0, 1])
    names = [f"{label}-{seed}" for seed in (0, 1) for label in ("didr-0.5", "didr-1", "diff_instruct")]
    assert [p.name for p in plan] == names


def test_a_work_folder_serves_one_benchmark(tmp_path: Path) -> None:
    given = argparse.Namespace(work=tmp_path, recipe="tiny", overrides=[], seconds=10.0)
    pareto._one_benchmark_a_folder(given)
    pareto._one_benchmark_a_folder(given)
    given.seconds = 20.0
    with pytest.raises(DIDRError, match=r"holds trainings made with .*10\.0.*20\.0"):
        pareto._one_benchmark_a_folder(given)


def made_up(shift: float, trainings: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """A model whose gains lie `shift` higher and whose fidelity lies as much lower."""
    rng = np.random.default_rng(seed)
    shape = (trainings, 2, 50)
    measures = {name: rng.normal(shift, 0.1, shape) for name in (*pareto.GAINS, "reward")}
    measures |= {name: rng.normal(1 - shift, 0.1, shape) for name in ("strict", "diversity")}
    return measures | {"features": rng.normal(shift, 1, (*shape, 4)).astype(np.float32)}


def test_the_report_ranks_a_front_that_is_known(tmp_path: Path) -> None:
    """Both trade one for one; `better` is ahead by 0.3 on every gain at the same fidelity."""
    arrays = {"teacher": made_up(0.0, 1, 0), "start": made_up(0.0, 1, 1)}
    for i, shift in enumerate((0.3, 0.6, 0.9)):
        arrays[f"worse-{shift}"] = made_up(shift, 2, 10 + i)
        arrays[f"better-{shift}"] = made_up(shift, 2, 20 + i)
        for gain in pareto.GAINS:
            arrays[f"better-{shift}"][gain] = arrays[f"better-{shift}"][gain] + 0.3
    methods = {m: [label for label in arrays if label.startswith(m)] for m in ("worse", "better")}
    summary = pareto.summarise(arrays, arrays["teacher"]["features"], 2, 50)
    assert summary["worse-0.9"]["feature_distance"][0] > summary["worse-0.3"]["feature_distance"][0]
    panels = pareto.fronts({k: v for k, v in summary.items() if k != "teacher"}, methods)
    assert len(panels) == 6
    for panel in panels:
        worse, better = (panel["methods"][m]["hypervolume"] for m in ("worse", "better"))
        assert worse["high"] < better["low"] <= better["mean"] <= better["high"] < 1.1
        assert panel["methods"]["worse"]["front"] == ["worse-0.9", "worse-0.6", "worse-0.3"]
    tree = {
        "methods": methods,
        "points": {
            label: {"steps": 7, "measures": {name: pareto.interval(v).tree() for name, v in values.items()}}
            for label, values in summary.items()
        },
        "fronts": panels,
        "by_seed": pareto.by_seed(
            {k: v for k, v in arrays.items() if k != "teacher"}, arrays["teacher"]["features"], methods
        ),
    }
    assert [[p["better"] > p["worse"] for p in seed] for seed in tree["by_seed"]] == [[True] * 6] * 2
    assert panels[0]["methods"]["better"]["beaten_by"] == [] and panels[0]["methods"]["worse"]["beaten_by"]
    assert json.loads(json.dumps(tree)) == tree
    text = pareto.tables(tree)
    assert "| better | " in text and "| worse-0.3 | 7 | " in text
    assert save_fronts(tree, tmp_path / "pareto.png").stat().st_size > 10_000


def test_along_a_training_medians_and_what_is_better_in_both(tmp_path: Path) -> None:
    def row(method: str, seed: int, updates: int, utility: float, apart: float) -> dict[str, Any]:
        known = dict.fromkeys(("judge", "strict", "background_entropy"), 1.0)
        return known | {
            **{"label": f"{method}-4", "method": method, "seed": seed, "updates": updates},
            **{"utility": utility, "feature_distance": apart},
        }

    rows = [row("didr", s, u, 8 + u / 100, u / 10) for s in (0, 1) for u in (20, 40)]
    rows += [row("dmdr", 0, 40, 8.5, 3.0), row("dmdr", 1, 40, 8.5, 5.0)]
    assert pareto_along.beaten_by(rows, rows[1]) == ["dmdr-4 at 40"] and not pareto_along.beaten_by(rows, rows[3])
    text = pareto_along.table(rows, range(0, 60, 20))
    assert "| didr-4 | 20 | 2 | 8.2 |" in text and "| didr-4 | 0 | 40 | 1 | dmdr-4 at 40 |" in text
    pareto_along.save(rows, tmp_path / "along.png")
    base = config.load("tiny")
    point = pareto.Point("didr", 4.0, 1)
    made = config.load("tiny", pareto.settings_of(point, [], 40, base, along=20))
    assert made.train.steps == 60 and made.train.checkpoint_every == 20 and made.train.keep_checkpoints > 100


def test_means_of_one_network() -> None:
    measures: dict[str, Any] = made_up(0.5, 1, 0) | {"background_code": np.zeros((1, 2, 50), np.int64)}
    found = pareto_along.means(measures, made_up(0.0, 1, 1)["features"])
    assert found["utility"] == pytest.approx(0.5, abs=0.1) and found["feature_distance"] > 0.5
    assert found["background_entropy"] == 0
