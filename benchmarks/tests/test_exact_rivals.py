"""The exact rivals: every method trains, what is there is kept, and the table picks the nearest weight."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import exact_rivals, exactness


def test_every_method_trains_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_rivals, "start", lambda world: "null")
    monkeypatch.setattr(exactness, "SAMPLES", 200)
    few = {name: replace(m, weights=m.weights[-1:]) for name, m in exact_rivals.METHODS.items()}
    monkeypatch.setattr(exact_rivals, "METHODS", few)
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments = ["--dim", "2", "--seeds", "1", "--updates", "1", *folders]
    exact_rivals.main([*arguments, "--seconds", "0"])
    assert not (tmp_path / "work").exists(), "nothing is begun after the time is up"
    exact_rivals.main(arguments)
    assert len(list((tmp_path / "work").iterdir())) == len(few)
    assert (tmp_path / "out/exact_rivals.png").stat().st_size > 10_000
    assert (tmp_path / "out/exact_rivals.md").read_text().count("diff_instruct_pp") == len(exact_rivals.BETAS)
    monkeypatch.setattr(exact_rivals, "train", lambda *_: pytest.fail("a training that is there was made again"))
    exact_rivals.main(arguments)


def test_the_table_takes_the_weight_with_the_smallest_median() -> None:
    def row(weight: float, seed: int, distance: float) -> dict[str, object]:
        return {"weight": weight, "seed": seed, "distance": {"1": distance}}

    rows = [row(1.0, 0, 0.1), row(1.0, 1, 0.5), row(1.0, 2, 0.6), row(2.0, 0, 0.3), row(2.0, 1, 0.4), row(2.0, 2, 0.2)]
    weight, best = exact_rivals.nearest(rows, 1.0)
    assert weight == 2.0 and [r["seed"] for r in best] == [0, 1, 2]


def test_a_weight_with_fewer_seeds_is_not_the_nearest_and_one_far_off_gets_no_more() -> None:
    def row(weight: float, seed: int, near: float) -> dict[str, object]:
        return {"weight": weight, "seed": seed, "distance": {f"{beta:g}": near for beta in exact_rivals.BETAS}}

    first = [row(1.0, 0, 0.1), row(2.0, 0, 0.12), row(4.0, 0, 0.2)]
    assert exact_rivals.worth_repeating("dmdr", first) == [1.0, 2.0]
    again = [row(1.0, 1, 0.3), row(2.0, 1, 0.4)]
    assert exact_rivals.nearest([*first, *again], 1.0)[0] == 1.0


def test_a_finer_sweep_looks_beside_the_nearest_weights_of_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(weight: float, near: float) -> dict[str, object]:
        return {"weight": weight, "seed": 0, "distance": {f"{beta:g}": near for beta in exact_rivals.BETAS}}

    for name in ("dmdr", "didr shift"):
        monkeypatch.setitem(exact_rivals.METHODS, name, replace(exact_rivals.METHODS[name], weights=(1.0, 4.0, 16.0)))
    first = [row(1.0, 0.3), row(4.0, 0.1), row(16.0, 0.2)]
    assert exact_rivals.finer("dmdr", first) == [2.0, 8.0]
    assert exact_rivals.finer("dmdr", [*first, row(2.0, 0.05)]) == [2.0, 8.0], "once, and not from where it has been"
    assert exact_rivals.finer("didr shift", first) == [] and exact_rivals.finer("dmdr", first[:2]) == []


def test_the_exact_front_pays_for_reward_with_distance() -> None:
    front = exact_rivals.exact_front(2)
    assert all(b[0] > a[0] and b[1] > a[1] for a, b in pairwise(front[3:]))
