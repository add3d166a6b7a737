"""A contest in a folder: nothing is made twice, what is judged is what is kept, and workers that share prompts measure the same."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from toy import toy_recipe

from didr_core import config as configs
from didr_core.diffusion import sampling
from didr_core.evaluate import contest as contests
from didr_core.evaluate import features
from didr_core.evaluate.contest import Contest, Hand, run
from didr_core.evaluate.contestants import one_step_contestant
from didr_core.evaluate.evaluator import Evaluator, Measured
from didr_core.evaluate.judges import Judges
from didr_core.evaluate.layouts import write_pictures
from didr_core.evaluate.models import parse
from didr_core.evaluate.scores import Scores, win_matrix
from didr_core.types import DIDRError
from tests.evaluate.test_scores import PROMPTS, Brightness, Gain, Toy

CPU = torch.device("cpu")
TEXTS = tuple(f"a picture of {i}" for i in range(7))


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    folder = tmp_path_factory.mktemp("toy")
    config = configs.load(str(toy_recipe(folder)))
    assert config.reward is not None
    models = tuple(parse(text, config) for text in ("start", "teacher,steps=2"))
    return Contest(folder / "out", models, TEXTS, (0, 1), {"reward": config.reward.model_dump()}, batch=3)


@pytest.fixture(scope="module")
def scores(contest: Contest) -> Scores:
    done = list(run(contest, CPU))
    assert done == [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 2)], "the dearest first"
    assert not contest.todo()
    return contest.scores({}, "start")


def test_every_picture_is_a_row_and_measures_are_paired(contest: Contest, scores: Scores) -> None:
    row = scores.tree["models"]["teacher"]
    assert (row["calls"], row["steps"], row["pictures_made"], row["source"]) == (2.0, 2, 14, "pipeline")
    assert scores.arrays["start"]["reward"].shape == (1, 2, 7) and scores.arrays["start"]["diversity"].shape == (
        1,
        1,
        7,
    )
    table = pq.read_table(contest.scores_of((0, 2)))
    assert table.column("index").to_pylist() == [6, 6] and table.column("seed").to_pylist() == [0, 1]
    assert table.column("prompt").to_pylist() == [TEXTS[6]] * 2
    assert table.column("reward").to_pylist() == scores.arrays["start"]["reward"][0, :, 6].tolist()
    matrix = win_matrix(scores.tree, "reward")
    share = (scores.arrays["start"]["reward"] > scores.arrays["teacher"]["reward"]).mean()
    assert matrix["start"]["teacher"]["mean"] == pytest.approx(share, rel=1e-5)
    assert matrix["teacher"]["start"]["mean"] == pytest.approx(1 - share, rel=1e-5)
    assert matrix["teacher"]["start"]["low"] == pytest.approx(1 - matrix["start"]["teacher"]["high"])


def test_only_what_is_missing_is_made(contest: Contest, scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    write = contests._write
    monkeypatch.setattr(contests, "_write", lambda path, *more: (made.append(path), write(path, *more)))
    contest.scores_of((0, 1)).unlink()
    contest.scores_of((1, 2)).unlink()
    contest.pictures((1, 2)).unlink()
    assert list(run(contest, CPU)) == [(1, 2), (0, 1)]
    assert made == [contest.pictures((1, 2)), contest.scores_of((1, 2)), contest.scores_of((0, 1))]
    again = contest.scores({}, "start").arrays
    for model, values in scores.arrays.items():
        for name, value in values.items():
            np.testing.assert_array_equal(again[model][name], value)
    made.clear()
    more = replace(contest, rewards={"reward": contest.rewards["reward"], "reward/x": contest.rewards["reward"]})
    assert len(list(run(more, CPU))) == 6 and all("/scores/" in str(path) for path in made), "pictures are there"
    assert {"reward", "reward/x"} <= set(more.scores({}, "start").tree["measures"])
    others = replace(contest, prompts=(*TEXTS[:6], "another"))
    assert len(others.todo()) == 6 and others.pictures((0, 0)) != contest.pictures((0, 0))


def test_ready_pictures_score_as_the_model_that_drew_them(contest: Contest, scores: Scores, tmp_path: Path) -> None:
    for block in range(3):
        for row in pq.read_table(contest.pictures((0, block))).to_pylist():
            (tmp_path / f"{row['index']:03d}-{row['seed']}.png").write_bytes(row["picture"])
    config = configs.load("tiny")
    ready = replace(contest, models=(parse(f"ready={tmp_path}", config),))
    assert len(list(run(ready, CPU))) == 3
    found = ready.scores({}, "ready").arrays["ready"]
    assert "latent_mean" not in found, "a picture has no latent"
    for name in ("reward", "clipped", "diversity"):
        np.testing.assert_array_equal(found[name], scores.arrays["start"][name])


def test_a_hand_that_finds_pictures_loads_no_model(contest: Contest, scores: Scores) -> None:
    hand = Hand(contest, CPU)
    hand.draw((0, 0))
    assert hand._loaded is None
    shown = contest.shown([0, 5])
    assert list(shown) == ["start", "teacher"] and list(shown["start"]) == [0, 5]


class Together:
    """`Parallel` of threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Sequence[Any]]) -> None:
        self.rank, self.world_size, self.barrier, self.board = rank, size, barrier, board

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        self.board[self.rank] = [t.clone() for t in tensors]
        self.barrier.wait()
        for i, t in enumerate(tensors):
            t.copy_(sum(self.board[rank][i] for rank in range(self.world_size)) / self.world_size)
        self.barrier.wait()


@pytest.mark.parametrize(("size", "batch"), [(2, 1), (3, 2), (8, 2)])
def test_workers_that_share_the_prompts_measure_what_one_does(size: int, batch: int) -> None:
    """Eight workers for seven prompts: then each does the whole."""

    def scored(parallel: Any = None) -> tuple[dict[str, Any], Measured]:
        toy = Toy()
        reward = Brightness()
        reward.features = lambda images: images.mean((2, 3))  # type: ignore[attr-defined]
        given: dict[str, Any] = {"batch": batch, "parallel": parallel, "keep": 4}
        evaluator = Evaluator(toy, PROMPTS, (0, 1), reward=reward, features=True, **given)  # type: ignore[arg-type]
        batches.append(sum(len(part.prompts) for part in evaluator._parts))
        row, measured = evaluator._look(one_step_contestant("aligned", toy, Gain(1.5)))  # type: ignore[arg-type]
        return row, {**measured, "kept": evaluator.kept["aligned"].numpy()}

    batches: list[int] = []
    alone, found, barrier, board = scored()[1], dict[int, Any](), threading.Barrier(size), dict[int, Any]()
    batches.clear()
    made = 1.5 * sampling.noise(0, range(4), Toy().latent_shape) + 0.1 * torch.arange(4).view(4, 1, 1, 1)
    np.testing.assert_allclose(alone["kept"], made, rtol=1e-5, atol=1e-6)  # of the first prompts and seed

    def work(rank: int) -> None:
        found[rank] = scored(Together(rank, size, barrier, board))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert sum(batches) == (7 if size < 8 else 56), "each prompt is one worker's"
    for rank in range(size):
        row, measured = found[rank]
        assert (
            row["pictures_made"] == 14
            and measured.keys() == alone.keys()
            and measured["features"].shape == (1, 2, 7, 3)
        )
        for name, value in alone.items():
            assert measured[name].dtype == value.dtype
            np.testing.assert_allclose(measured[name], value, rtol=1e-5, atol=1e-6)


def test_sets_of_pictures_are_compared_in_a_rewards_features(contest: Contest, scores: Scores, tmp_path: Path) -> None:
    judged = replace(contest, features="reward")
    made = [judged.scores_of(item) for item in run(judged, CPU)]
    assert len(made) == 6 and not set(made) & {contest.scores_of((m, b)) for m in (0, 1) for b in range(3)}
    found = judged.scores({}, "start")
    for name in ("reward", "clipped", "diversity"):
        np.testing.assert_array_equal(found.arrays["start"][name], scores.arrays["start"][name])
    tower = Judges.load(judged.judges(), "none").rewards["reward"].features
    assert tower is not None
    rows = {m: [row for block in range(3) for row in _rows(judged.pictures((m, block)))] for m in (0, 1)}
    pictures = {m: torch.stack([contests._image(row["picture"]) for row in drawn]) for m, drawn in rows.items()}
    seen = {m: tower(images).detach().numpy() for m, images in pictures.items()}
    laws = judged.laws("teacher")
    assert list(laws) == ["start"] and laws["start"]["fid"] == pytest.approx(features.fid(seen[1], seen[0]), rel=1e-4)
    expected = features.neighbours(seen[1], seen[0], contests.NEAREST)
    assert {name: laws["start"][name] for name in expected} == pytest.approx(expected)
    first, second = (seen[0][[0, 1, 2, 6, 7, 8, 12]], seen[0][[3, 4, 5, 9, 10, 11, 13]])
    apart = np.linalg.norm(first - second, axis=1)
    np.testing.assert_allclose(found.arrays["start"]["feature_diversity"][0, 0], apart, rtol=1e-4)


def test_lpips_over_pairs_of_seeds(contest: Contest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(contest, lpips=True)
    with pytest.raises(DIDRError, match=r"--lpips: .*pip install lpips"):
        next(run(asked, CPU))

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == b.shape and a.min() < 0, "in [-1, 1]"
            return (a - b).abs().amax((1, 2, 3), keepdim=True) / 2

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    assert len(list(run(asked, CPU))) == 6
    one, two = (contests._image(row["picture"]) for row in _rows(asked.pictures((0, 2))))
    got = asked.scores({}, "start").arrays["start"]["lpips_diversity"][0, 0, 6]
    assert got == pytest.approx(float((one - two).abs().max()), rel=1e-5)


def test_pictures_of_a_contest_in_a_layout(contest: Contest, scores: Scores, tmp_path: Path) -> None:
    told = [{"id": f"p{i}", "metadata": {"tag": "x", "include": [i]}} for i in range(7)]
    assert write_pictures("geneval", tmp_path, contest.rows(0, told)) == 21
    assert json.loads((tmp_path / "00006" / "metadata.jsonl").read_text()) == {
        "tag": "x",
        "include": [6],
        "prompt": TEXTS[6],
    }
    second = next(row["picture"] for row in _rows(contest.pictures((0, 1))) if (row["index"], row["seed"]) == (4, 1))
    written = contests._image((tmp_path / "00004" / "samples" / "0001.png").read_bytes())
    assert torch.equal(written, contests._image(second))


def _rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
