"""A training cluster as a small discrete-event simulation: workers that wait for each other, a pool of rewards, prompts, checkpoints.

What it knows: every worker makes its passes with some jitter; an update ends for all when the slowest has arrived and gradients are
averaged; pictures wait in the pool's queue for a free reward actor; prompt stages work ahead by a bounded number of batches; a checkpoint
is copied while training waits and written while it does not, one at a time. What it does not: memory, failures, starting up.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

Process = Generator[Any, None, None]
"""What happens to somebody, in order: it yields seconds to pass, or an :class:`Event` to wait for."""


@dataclass(frozen=True)
class Cluster:
    """All times in seconds. The usual values are those of one worker alone, with everything beside training for nothing."""

    assistant_s: float
    """Passes of one TA update, all micro-batches of a worker."""
    generator_s: float
    """Passes of the generator's update, all micro-batches, without the reward model's."""
    workers: int = 1
    assistant_updates: int = 5
    micro_batches: int = 1
    before: float = 0.4
    """Share of `generator_s` until the pictures are there that the reward is asked about."""
    window: float = 0.3
    """Share of it that needs no answer: the reference's and the TA's calls."""
    reward_s: float = 0.0
    """The reward model's work on one micro-batch, wherever it is done."""
    reward_actors: int = 0
    """0: the reward is computed beside each trainer. With several for each worker, a call is dealt out to them."""
    pictures: int = 1
    """Of a micro-batch."""
    transfer_s: float = 0.0
    """To the pool and back, a micro-batch."""
    overlap: bool = True
    """Whether `window` passes while the pool works."""
    assistant_averaging_s: float = 0.0
    generator_averaging_s: float = 0.0
    stages_s: tuple[float, ...] = ()
    """Prompt stages in a row: seconds of each for a whole batch, with all its actors."""
    buffer: int = 2
    """Batches that a stage may be ahead of the next."""
    checkpoint_every: int = 0
    copy_s: float = 0.0
    write_s: float = 0.0
    jitter: float = 0.0
    """Relative standard deviation of an update's passes."""
    steps: int = 12
    warm_up: int = 3
    seed: int = 0

    @property
    def parts(self) -> int:
        """Actors that share a call."""
        return min(self.pictures, max(1, self.reward_actors // self.workers))


@dataclass(frozen=True)
class Outcome:
    """Means over the steps after the warm-up."""

    step_s: float
    shares: dict[str, float]
    """Of a worker's time: passes, reward, averaging, waiting for others, for prompts, for a checkpoint."""
    busy: dict[str, float]
    """Of the reward pool's and the slowest prompt stage's time."""


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._next: list[tuple[float, int, Process]] = []
        self._order = itertools.count()  # what happens at the same time happens in the order in which it was said

    def after(self, seconds: float, process: Process) -> None:
        heapq.heappush(self._next, (self.now + seconds, next(self._order), process))

    def run(self) -> None:
        while self._next:
            self.now, _, process = heapq.heappop(self._next)
            asked = next(process, None)
            if isinstance(asked, Event):
                asked.wait(process)
            elif asked is not None:
                self.after(asked, process)


class Event:
    """Happens once; who waits for it afterwards goes on at once."""

    def __init__(self, clock: _Clock) -> None:
        self.clock, self.happened = clock, False
        self.waiting: list[Process] = []

    def wait(self, process: Process) -> None:
        if self.happened:
            self.clock.after(0.0, process)
        else:
            self.waiting.append(process)

    def happen(self) -> None:
        self.happened = True
        for process in self.waiting:
            self.clock.after(0.0, process)
        self.waiting = []


class _Meeting:
    """All of ``count`` arrive before anyone goes on."""

    def __init__(self, clock: _Clock, count: int) -> None:
        self.clock, self.count, self.here, self.event = clock, count, 0, Event(clock)

    def arrive(self) -> Event:
        self.here, event = self.here + 1, self.event
        if self.here == self.count:
            self.here, self.event = 0, Event(self.clock)
            event.happen()
        return event


class _Pool:
    """``count`` actors behind one queue: first come, first served."""

    def __init__(self, clock: _Clock, count: int) -> None:
        self.clock, self.free, self.worked = clock, [0.0] * count, 0.0

    def ask(self, service: float, transfer: float, parts: int) -> Event:
        """An answer: half of ``transfer``, the queue and ``service`` of each of equal ``parts``, the other half."""
        done, clock, end = Event(self.clock), self.clock, 0.0
        for _ in range(parts):
            end = max(clock.now + transfer / 2, heapq.heappop(self.free)) + service / parts
            heapq.heappush(self.free, end)
        self.worked += service

        def answered() -> Process:
            done.happen()
            yield from ()

        clock.after(end + transfer / 2 - clock.now, answered())
        return done


@dataclass
class _Run:
    """One simulation: the processes and what they share."""

    cluster: Cluster
    clock: _Clock = field(default_factory=_Clock)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ended: list[float] = field(default_factory=list)  # when rank 0 ended each step
    worked: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        c, clock = self.cluster, self.clock
        self.random: dict[str, random.Random] = {}
        self.meeting, self.pool = _Meeting(clock, c.workers), _Pool(clock, max(c.reward_actors, 1))
        self.made: dict[tuple[int, int], Event] = defaultdict(lambda: Event(clock))  # by stage and step
        self.taken: dict[tuple[int, int], Event] = defaultdict(lambda: Event(clock))
        self.takers: dict[int, int] = defaultdict(int)
        self.written = 0.0  # when the last checkpoint is on the disk
        self.warm = math.inf if c.warm_up else 0.0  # when the warm-up ended

    def draw(self, who: str, seconds: float) -> float:
        """``seconds`` on average, log-normal. Everybody draws numbers of their own: the same ones whatever the others do."""
        jitter = self.cluster.jitter
        if not jitter or not seconds:
            return seconds
        spread = math.sqrt(math.log1p(jitter**2))
        if who not in self.random:
            self.random[who] = random.Random(f"{self.cluster.seed}/{who}")
        return seconds * self.random[who].lognormvariate(-(spread**2) / 2, spread)

    def take(self, what: str, asked: float | Event) -> Process:
        """Whatever passes until ``asked`` is over counts as ``what``, in steps after the warm-up."""
        since = self.clock.now
        yield asked
        if since >= self.warm:
            self.spent[what] += self.clock.now - since

    def stage(self, number: int) -> Process:
        c = self.cluster
        for step in range(c.steps):
            if number:
                yield self.made[number - 1, step]
                self.taken[number - 1, step].happen()
            if step >= c.buffer:
                yield self.taken[number, step - c.buffer]
            seconds = self.draw(f"stage {number}", c.stages_s[number])
            self.worked[f"prompt stage {number}"] += seconds
            yield seconds
            self.made[number, step].happen()

    def worker(self, rank: int) -> Process:
        c, last = self.cluster, len(self.cluster.stages_s) - 1
        for step in range(c.steps):
            if last >= 0:
                yield from self.take("prompts", self.made[last, step])
                self.takers[step] += 1
                if self.takers[step] == c.workers:
                    self.taken[last, step].happen()
            for _ in range(c.assistant_updates):
                yield from self.take("passes", self.draw(f"worker {rank}", c.assistant_s))
                yield from self.together(c.assistant_averaging_s)
            yield from self.generator(rank)
            yield from self.together(c.generator_averaging_s)
            if c.checkpoint_every and step % c.checkpoint_every == 0:
                yield from self.take("checkpoint", max(0.0, self.written - self.clock.now) + c.copy_s)
                if rank == 0:
                    self.written = self.clock.now + c.write_s
            if rank == 0:
                self.ended.append(self.clock.now)
                self.warm = self.clock.now if step + 1 == c.warm_up else self.warm

    def generator(self, rank: int) -> Process:
        c, seconds = self.cluster, self.draw(f"worker {rank}", self.cluster.generator_s)
        if not c.reward_actors:
            yield from self.take("passes", seconds)
            yield from self.take("reward", c.micro_batches * c.reward_s)
            return
        for _ in range(c.micro_batches):
            part = seconds / c.micro_batches
            yield from self.take("passes", c.before * part)
            answer = self.pool.ask(self.draw("pool", c.reward_s), c.transfer_s, c.parts)
            if c.overlap:
                yield from self.take("passes", c.window * part)
            yield from self.take("reward", answer)
            yield from self.take("passes", (1 - c.before - c.window * c.overlap) * part)

    def together(self, seconds: float) -> Process:
        yield from self.take("others", self.meeting.arrive())
        yield from self.take("averaging", seconds)


def simulate(cluster: Cluster) -> Outcome:
    """The same cluster and seed give the same outcome."""
    run = _Run(cluster)
    for number in range(len(cluster.stages_s)):
        run.clock.after(0.0, run.stage(number))
    for rank in range(cluster.workers):
        run.clock.after(0.0, run.worker(rank))
    run.clock.run()
    ended = [0.0, *run.ended]
    whole = ended[-1] - ended[cluster.warm_up]
    total = sum(run.spent.values())
    names = ("passes", "reward", "averaging", "others", "prompts", "checkpoint")
    busy = {name: worked / ended[-1] for name, worked in run.worked.items()}
    if cluster.reward_actors:
        busy["reward pool"] = run.pool.worked / cluster.reward_actors / ended[-1]
    return Outcome(
        step_s=whole / (cluster.steps - cluster.warm_up),
        shares={name: run.spent[name] / total for name in names},
        busy=busy,
    )
