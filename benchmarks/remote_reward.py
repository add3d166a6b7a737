"""What a reward in actors costs a step, and what two actors gain, one that is killed and one that hangs.

    python -m benchmarks.remote_reward                  # two minutes on idle cores; writes benchmarks/results/remote_reward.md
    python -m benchmarks.remote_reward --rounds 2       # a first look

One Ray of this machine, one trainer in this process: `Learner.step` of recipe `tiny` (five TA updates, one of the generator, which asks
twice a micro-batch: the proxy's gradient, and scores for the log). The reward waits (`time.sleep`) and then scores brightness, so that it
needs no core: what is measured is the way there and back, and what is done meanwhile. Steps with the reward here and there take turns, a
ratio is that of steps of one round, tables have medians. Both trainers end with the same weights, bit for bit, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import wait_until_idle
from didr_core import config as configs
from didr_core.config import Component, Config, build
from didr_core.config.provenance import provenance
from didr_core.data.feed import LocalFeed
from didr_core.train.learner import Learner
from didr_core.train.observer import Observer
from didr_core.train.patience import Patience
from didr_core.types import NoAnswerError, Tensors
from pipelines.cluster.session import ray_session

RESULTS = Path("benchmarks/results/remote_reward.md")
CALL_S, PICTURE_S, PATIENCE_S = 0.1, 0.05, 4.0


class Waits:
    """Seconds a call and seconds a picture, then the mean square of a picture; hangs while ``hang`` names a file that is there."""

    differentiable = True

    class Config(Component):
        call_s: float = 0.0
        picture_s: float = 0.0
        hang: str = ""

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing."""

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Nothing is read."""
        return {}

    def score(self, images: Tensor, inputs: Tensors) -> Tensor:
        """``[B]``."""
        time.sleep(self.config.call_s + len(images) * self.config.picture_s)
        while self.config.hang and Path(self.config.hang).exists():
            time.sleep(0.1)
        return images.square().mean((1, 2, 3))


def settings(*more: str, actors: int = 0, **reward: Any) -> Config:
    """Recipe `tiny` at batch 4 with that reward, in ``actors``; 0: here."""
    changes = ["workers.train=1", "train.batch=4", "train.assistant_warmup=0", *more]
    if actors:
        reward |= {"placement": "actors", "actors": {"count": actors, "cpus": 0.5}}
    return configs.load("tiny", changes, {"reward": {"name": "benchmarks.remote_reward:Waits", **reward}})


def timed(work: Callable[[], object]) -> float:
    """Wall seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pooled(config: Config, view: Any, calls: Path | None = None) -> tuple[Any, Any]:
    """The reward in actors that are up, and its pool."""
    from pipelines.cluster.scoring import placed, start_pools

    (pool,) = start_pools(config, view, calls)
    while pool.coming:
        pool.choose()
        time.sleep(0.05)
    return placed(config, [pool]), pool


def steps(view: Any, rounds: int, micro: int) -> tuple[list[float], list[float]]:
    """Seconds of steps with a reward of :data:`CALL_S` here, and in one actor."""
    here = settings(f"train.micro_batch={micro}", call_s=CALL_S)
    there = settings(f"train.micro_batch={micro}", actors=1, call_s=CALL_S)
    remote, _ = pooled(there, view)
    one, two = Learner(here), Learner(there, reward=remote)
    seconds: tuple[list[float], list[float]] = [], []
    batches = list(islice(LocalFeed(here), 2))
    for batch in islice(cycle(batches), rounds + 1):
        for learner, spent in zip((one, two), seconds, strict=True):
            spent.append(timed(lambda learner=learner, batch=batch: learner.step(batch)))
    a, b = one.generator_net.state_dict(), two.generator_net.state_dict()
    if not all(torch.equal(a[name], b[name]) for name in a):
        raise SystemExit("the reward in an actor led to other weights")
    return seconds[0][1:], seconds[1][1:]


def calls(
    view: Any, rounds: int, count: int, side: int, actors: int, **reward: float
) -> tuple[list[float], list[float]]:
    """Seconds of a call with gradient, of ``count`` pictures of ``side`` x ``side``, here and in a pool of ``actors``."""
    config = settings(actors=actors, **reward)
    assert config.reward is not None
    here, (there, _) = build("rewards", config.reward), pooled(config, view)
    images = torch.rand(count, 3, side, side).requires_grad_()
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        for judge, spent in zip((here, there), seconds, strict=True):
            spent.append(timed(lambda judge=judge: torch.autograd.grad(judge.score(images, {}).sum(), images)))
    return seconds[0][1:], seconds[1][1:]


def lost(view: Any, folder: Path) -> tuple[float, str]:
    """Seconds of a step in which one of two actors is killed in mid-call, and what is said."""
    config, said = settings("train.micro_batch=4", actors=2, call_s=0.5), list[str]()
    remote, pool = pooled(config, view, folder)
    pool.share_with(0, 1, said.append)
    learner, batch = Learner(config, reward=remote), next(iter(LocalFeed(settings())))
    learner.step(batch)
    victims = [path for path in folder.iterdir() if path.suffix != ".new"]

    def kill() -> None:
        while not all(path.read_text() for path in victims):  # at a call
            time.sleep(0.01)
        os.kill(int(victims[0].name.rpartition("-")[2]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    seconds = timed(lambda: learner.step(batch))
    return seconds, said[0] if learner.step_count == 2 and said else "nothing was lost"


def hung(view: Any, folder: Path) -> str:
    """What the run would end with."""
    config = settings(actors=1, hang=str(folder / "hang"))
    remote, _ = pooled(config, view, folder / "calls")
    (folder / "hang").touch()
    wait = remote.begin(torch.rand(4, 3, 32, 32).requires_grad_(), {}, None)
    patience = Patience(Observer(), PATIENCE_S, folder / "calls")
    try:
        while True:
            time.sleep(0.1)
            patience.look()
    except NoAnswerError as error:
        return str(error)
    finally:
        (folder / "hang").unlink()
        wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for idle cores")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    busy, made, machine = wait_until_idle(given.patience), provenance(), platform.processor() or platform.machine()
    rows: list[tuple[str, list[float], list[float], str]] = []
    with TemporaryDirectory() as folder, ray_session("local", 6) as view:
        for micro in (4, 2):
            told = f"a step, {CALL_S * 1000:.0f} ms a call, {4 // micro} micro-batch{'es' * (micro < 4)}, one actor"
            rows.append((told, *steps(view, given.rounds, micro), "at most 1.15"))
        rows.append(
            ("a call, 100 ms, one picture of 12.6 MB", *calls(view, given.rounds, 1, 1024, 1, call_s=CALL_S), "")
        )
        spent = {}
        for actors in (1, 2):
            spent[actors] = calls(view, given.rounds, 8, 32, actors, picture_s=PICTURE_S)[1]
        rows.append(
            ("a call, 50 ms a picture, 8 pictures: one actor, two", spent[1], spent[2], "at most 0.59 (1 / 1.7)")
        )
        seconds, said = lost(view, Path(folder))
        named = hung(view, Path(folder))
    text = [
        "# A reward in actors\n",
        f"`python -m benchmarks.remote_reward --rounds {given.rounds}`, {os.cpu_count()} CPU cores ({machine}; {busy:.1f} busy before), "
        f"{datetime.date.today()}, commit {made['commit']}. Medians (lowest to highest); the module says what is compared.\n",
        "| what | s, the reward here | s, in actors | ratio | wanted |",
        "|---|---|---|---|---|",
    ]
    for what, one, two, wanted in rows:
        ratio = [b / a for a, b in zip(one, two, strict=True)]
        text.append(f"| {what} | {_spread(one)} | {_spread(two)} | {_spread(ratio)} | {wanted} |")
    text += [
        f"\nIn the last row the columns are the pools. An actor killed in mid-call cost no step: that step took {seconds:.2f} s, and the "
        f'progress line said "{said}".\n',
        f'A hung one, with workers.patience_s={PATIENCE_S:g}: "{named}"',
    ]
    given.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))
    return 0


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    raise SystemExit(main())
