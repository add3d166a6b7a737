"""Calls of a reward's pool, on a Ray that is scripted here: how they are dealt out, what a lost actor costs. With Ray: test_scoring.py."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RuntimeEnvSetupError,
)

from didr_core import config as configs
from didr_core.config import Actors
from didr_core.data import feed as feed_stages
from didr_core.data.feed import LocalFeed
from didr_core.train.learner import Learner
from didr_core.types import DIDRError
from pipelines.cluster import pool as pools
from pipelines.cluster.pool import Pool

PICTURES = np.arange(5.0)


class Actor:
    """Answers with ten times what it is asked, or with the next of ``script``: an error, or "late"."""

    def __init__(self, number: int, ready: list[Any]) -> None:
        self.number, self.script, self.asked = number, list[Any](), list[list[float]]()
        self.ready = SimpleNamespace(remote=lambda: ready.pop(0) if ready else "ready")
        self.score = SimpleNamespace(remote=self._score)
        self.prepare = SimpleNamespace(remote=lambda prompts: {"length": np.array([len(p) for p in prompts])})

    def _score(self, images: Any, inputs: Any, weight: Any) -> Any:
        self.asked.append(images.tolist())
        assert inputs["twice"].tolist() == (2 * images).tolist()
        return self.script.pop(0) if self.script else (10 * images, None if weight is None else images * weight)


def make(
    monkeypatch: pytest.MonkeyPatch, count: int = 2, ready: Any = (), **settings: Any
) -> tuple[Pool, list[Actor], list[str]]:
    killed: list[Any] = []

    def get(ref: Any, timeout: float | None = None) -> Any:
        if isinstance(ref, str) and ref == "late" and timeout is not None:
            raise GetTimeoutError
        if isinstance(ref, Exception):
            raise ref
        return ref

    there = itertools.count()
    fake = SimpleNamespace(
        get=get,
        wait=lambda refs, timeout: ([r for r in refs if not isinstance(r, str) or r != "slow" or next(there) > 3], []),
        kill=lambda actor, no_restart: killed.append(actor) if not no_restart else None,
    )
    monkeypatch.setattr(pools, "ray", fake)
    actors, said = [Actor(n, list(ready)) for n in range(count)], list[str]()
    pool = Pool("reward", "toy", Actors(**settings), actors)
    pool.share_with(0, 1, said.append)
    pool.killed = killed  # type: ignore[attr-defined]
    return pool, actors, said


def score(pool: Pool, weight: Any = None) -> Any:
    return pool.score(PICTURES, {"twice": 2 * PICTURES}, weight)


def test_pictures_are_dealt_out_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, (one, two), said = make(monkeypatch, ready=["slow"])
    answers = score(pool, np.full(5, 3.0))
    assert (one.asked, two.asked) == ([[0, 1, 2]], [[3, 4]]) and pool.busy == {one: 1, two: 1}
    scores, gradients = zip(*answers(), strict=True)
    assert np.concatenate(scores).tolist() == [0, 10, 20, 30, 40] and np.concatenate(gradients).tolist() == [
        0,
        3,
        6,
        9,
        12,
    ]
    assert not pool.busy.total() and not said and pool.prepare(["a", "bcd"])["length"].tolist() == [1, 3]
    pool.share_with(1, 2)  # the second of two trainers: its half of the pool, whole calls
    score(pool)()
    assert len(one.asked) == 1 and two.asked[1] == PICTURES.tolist()
    pool.share_with(2, 3)  # more trainers than actors
    score(pool)()
    assert two.asked[2] == PICTURES.tolist()


def test_a_lost_actor_costs_its_part_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, (one, two), said = make(monkeypatch, timeout_s=9.0)
    one.script, two.script = [ActorUnavailableError("gone", None)], ["late"]
    answers = score(pool)
    one.ready = two.ready = SimpleNamespace(remote=lambda: "ready")
    assert np.concatenate([scores for scores, _ in answers()]).tolist() == [0, 10, 20, 30, 40]
    assert said == [
        "a scoring actor of 'toy' was lost in a call; another one is asked (1 of 3)",
        "a scoring actor of 'toy' gave no answer for 9 s (reward.actors.timeout_s); another one is asked (1 of 3)",
    ]
    assert pool.killed == [two] and not pool.busy.total()  # type: ignore[attr-defined]


def test_the_last_actor_that_a_call_may_lose_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, (one,), said = make(monkeypatch, count=1, tries=2)
    one.script = [OutOfMemoryError("full"), ActorUnavailableError("gone", None), "never"]
    with pytest.raises(
        DIDRError,
        match=r"reward 'toy'.*the last of 2 that a call has lost \(reward.actors.tries=2\). Look at its memory",
    ):
        score(pool)()
    assert len(said) == 1 and one.script == ["never"]


def test_a_pool_is_who_its_keeper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows: calls are dealt out anew. It shrinks in the middle of a call: nobody waits for it. Its keeper dies, with its actors."""
    pool, (one,), said = make(monkeypatch, count=1)
    pool.settings = Actors(count=(1, 2), tries=2)
    two, told, there = Actor(1, []), list[float](), [[one]]
    pool.keeper = SimpleNamespace(tell=SimpleNamespace(remote=lambda waited: told.append(waited) or there[-1]))
    pool.share_with(0, 1, said.append)
    score(pool)()
    assert one.asked == [PICTURES.tolist()] and told == [0.0] and not said
    there.append([one, two])
    pool.prepare(["a"])
    assert told[1] > 0
    answers = score(pool)
    assert two.asked == [[3, 4]] and said.pop() == "scoring actors of 'toy': 2, 1 before"
    assert np.concatenate([scores for scores, _ in answers()]).tolist() == [0, 10, 20, 30, 40]
    for gone in ([one], ActorDiedError()):
        two.script, there[:], pool.actors = [ActorDiedError()], [[one, two]], [one, two]
        answers = score(pool)
        there.append(gone)  # type: ignore[arg-type]
        assert np.concatenate([scores for scores, _ in answers()]).tolist() == [0, 10, 20, 30, 40]
        assert pool.actors == [one] and not pool.busy.total()
        assert "scoring actors of 'toy': 1, 2 before" in said
        said.clear()
    assert pool.keeper is None and len(score(pool)()) == 1


def test_what_would_go_wrong_again_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, (one,), said = make(monkeypatch, count=1)
    one.script = [ValueError("the reward broke")]
    with pytest.raises(ValueError, match="the reward broke"):
        score(pool)()
    assert len(one.asked) == 1 and not said
    failed = type("ConstructorRaised", (ActorDiedError,), {"actor_init_failed": True})()
    for error, kind, words in (
        (failed, ActorDiedError, ""),
        (
            ActorDiedError(),
            DIDRError,
            r"(?s)a scoring actor is not started again \(at most 20 times.*Look at its memory",
        ),
        (
            RuntimeEnvSetupError("no such package"),
            DIDRError,
            r"(?s)reward.actors.runtime_env=\{\}: no actor of 'toy'.*no such package",
        ),
    ):
        pool, _, _ = make(monkeypatch, count=1, ready=[error, error])
        with pytest.raises(kind, match=words or None):
            score(pool)


def test_a_run_over_a_pool_is_the_run_with_the_reward_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors' own code, called directly: baselines and three steps, two actors, two micro-batches in flight; bit for bit."""
    from pipelines.cluster.scoring import Scorer, placed

    changes = ["train.batch=8", "train.micro_batch=4", "train.assistant_warmup=0", "data.cache=null"]
    config = configs.load("exact_2d", [*changes, "reward.placement=actors", "reward.actors.count=2"])
    pool, actors, _ = make(monkeypatch)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # they share this process
    for actor in actors:
        scorer = Scorer(config, "reward")
        actor.score, actor.prepare = (SimpleNamespace(remote=method) for method in (scorer.score, scorer.prepare))
    here = Learner(configs.load("exact_2d", changes))
    there = Learner(config, reward=placed(config, [pool]))
    feed = LocalFeed(config)
    plain = list(itertools.islice(feed, 3))
    feed._stages = [feed_stages.PromptEncoder(config), feed_stages.RewardPreparer(config, placed(config, [pool]))]
    for one, two in zip(plain, feed, strict=False):
        assert one.spread is not None and two.spread is not None and torch.equal(one.spread, two.spread)
        assert here.step(one).metrics == there.step(two).metrics
    a, b = (v.generator_net.state_dict() for v in (here, there))
    assert all(torch.equal(a[key], b[key]) for key in a)
