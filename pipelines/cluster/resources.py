"""Is there room on this cluster for all that a run starts? Answered before anything starts, because Ray waits silently for ever when not.

Pure arithmetic, no Ray. Demands are groups of equal processes (training workers, actor pools, Ray Data's listing task), each process with
what it reserves. Every process must fit on one node as a whole, so totals are not enough: two GPUs with four CPUs each cannot hold one
worker of 1 GPU + 8 CPUs.

    room = check(demands_of(config, cluster), cluster)   # NoRoom says what is short and which setting to change
    console.print(room.table())

The role names below are the ones `cluster.yaml` gives its nodes. A process asks for a role only where the cluster knows it
(:func:`role_resources`), so the same recipe runs on one machine without any. What a process reserves is computed once, here:
`train_need(...).amounts()` is Ray Train's `resources_per_worker`, and a pool takes `num_cpus=need.cpus, resources=need.custom`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from didr_core.config import Config, Workers
from didr_core.types import DIDRError

TRAINER_RESOURCE = "trainer"
"""Custom resource of nodes that hold training workers; a worker reserves 1."""
REWARD_RESOURCE = "reward"
"""Custom resource of nodes that hold encoder and reward-model actors; an actor reserves 1."""
ROLE_LABEL = "didr-role"
"""Node label that names the role to people (`ray list nodes`); its values are :data:`ROLES`."""
ROLES = ("head", TRAINER_RESOURCE, REWARD_RESOURCE)

CPU, GPU, MEMORY = "CPU", "GPU", "memory"
_EPS = 1e-6  # Ray counts in 1/10000
_GIB = 2**30


class NoRoom(DIDRError):
    """More is asked for than the cluster has; the message says what, and which setting to change."""


@dataclass(frozen=True)
class Need:
    """What one process reserves. Memory is bytes and optional: 0 asks for nothing."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """The same for `ray.remote` and `map_batches`."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus or None, "resources": dict(self.custom) or None}

    def amounts(self) -> dict[str, float]:
        """Resource name to amount, zeros left out."""
        every = {CPU: self.cpus, GPU: self.gpus, MEMORY: self.memory, **self.custom}
        return {name: float(amount) for name, amount in every.items() if amount > 0}


@dataclass(frozen=True)
class Group:
    """`count` equal processes. `count_setting` and `need_setting` are the config keys an error tells the user to change."""

    name: str
    count: int
    need: Need
    count_setting: str = ""
    need_setting: str = ""


@dataclass(frozen=True)
class Demands:
    """Everything that runs at the same time."""

    groups: tuple[Group, ...]

    def totals(self) -> dict[str, float]:
        """Resource name to the sum over all processes."""
        return _total(group.need.amounts() for group in self.groups for _ in range(group.count))


@dataclass(frozen=True)
class Node:
    """One machine: a name for people, its total resources as Ray counts them, its labels."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    def capacity(self) -> dict[str, float]:
        """Its resources without the names Ray makes up for every node (`node:10.0.0.1`, `accelerator_type:...`)."""
        return {k: float(v) for k, v in self.resources.items() if ":" not in k and k != "object_store_memory"}


@dataclass(frozen=True)
class ClusterView:
    """The nodes that are up, whether this process started them itself, and whether somebody else may be starting more."""

    nodes: tuple[Node, ...]
    local: bool = True
    grows: bool = False
    free: Mapping[str, float] | None = None
    """What nobody has reserved just now, over all nodes; None where that is everything."""

    def totals(self) -> dict[str, float]:
        """Resource name to the sum over all nodes."""
        return _total(node.capacity() for node in self.nodes)

    def table(self) -> Table:
        """Nodes, their labels, what they have; what all have together, and what of that is free."""
        table = Table(title="cluster", title_justify="left", title_style="bold")
        for heading in ("node", "labels", "has"):
            table.add_column(heading, overflow="fold")
        for node in self.nodes:
            own = ", ".join(f"{k}={v}" for k, v in sorted(node.labels.items()) if not k.startswith("ray.io/node-id"))
            table.add_row(node.name, own or "-", _amounts(node.capacity()))
        table.add_section()
        there = self.totals()
        table.add_row("in all", "", _amounts(there))
        if self.free is not None:
            table.add_row("free now", "", _amounts({name: self.free.get(name, 0.0) for name in there}))
        return table


@dataclass(frozen=True)
class Room:
    """What found room: one way to place it, and whether Ray could place it so badly that it would wait for ever."""

    demands: Demands
    cluster: ClusterView
    placement: tuple[tuple[int, ...], ...]
    """`placement[node][group]` = processes of that group on that node."""
    tight: bool

    def table(self) -> Table:
        """What each node has and what runs on it; the last row is all of it against the whole cluster."""
        table = Table(title="plan and cluster", title_justify="left", title_style="bold", caption_justify="left")
        for heading in ("node", "has", "runs", "reserving"):
            table.add_column(heading)
        for node, row in zip(self.cluster.nodes, self.placement, strict=True):
            here = [(g, n) for g, n in zip(self.demands.groups, row, strict=True) if n]
            reserved = Demands(tuple(Group(g.name, n, g.need) for g, n in here)).totals()
            name = f"{node.labels[ROLE_LABEL]} {node.name}" if ROLE_LABEL in node.labels else node.name
            runs = ", ".join(f"{n} x {g.name}" for g, n in here) or "-"
            table.add_row(name, _amounts(node.capacity()), runs, _amounts(reserved) if here else "-")
        table.add_section()
        table.add_row("in all", _amounts(self.cluster.totals()), "", _amounts(self.demands.totals()))
        if self.tight:
            table.caption = "It only just fits: another job here, or an unlucky placement, would make it wait."
        return table


def role_resources(cluster: ClusterView, role: str) -> dict[str, float]:
    """The custom resources a process of `role` reserves: `{role: 1}` where some node offers the role, else nothing."""
    return {role: 1.0} if any(node.resources.get(role, 0) > 0 for node in cluster.nodes) else {}


def train_need(workers: Workers, cluster: ClusterView) -> Need:
    """What one training worker reserves."""
    custom = role_resources(cluster, TRAINER_RESOURCE) | workers.train_resources
    return Need(workers.train_cpus, workers.train_gpus, custom=custom)


def encoder_need(workers: Workers, cluster: ClusterView) -> Need:
    """What one prompt-encoder actor reserves."""
    return Need(workers.encoder_cpus, workers.encoder_gpus, custom=_actor_resources(workers, cluster))


def reward_need(workers: Workers, cluster: ClusterView) -> Need:
    """What one reward-model actor reserves."""
    return Need(workers.reward_cpus, workers.reward_gpus, custom=_actor_resources(workers, cluster))


def _actor_resources(workers: Workers, cluster: ClusterView) -> dict[str, float]:
    return role_resources(cluster, REWARD_RESOURCE) | workers.actor_resources


def align_demands(workers: Workers, cluster: ClusterView, with_rewards: bool = True) -> Demands:
    """All that `didr align` runs at once, but for pools of rewards that are scored in actors.

    Args:
        with_rewards: False for an algorithm without a reward, which has no reward actors.
    """

    def group(name: str, need: Need, count: int, setting: str, of: str) -> Group:
        return Group(name, count, need, f"workers.{setting}", f"workers.{of}_cpus or .{of}_gpus")

    groups = [
        group("training worker", train_need(workers, cluster), workers.train, "train", "train"),
        group("encoder actor", encoder_need(workers, cluster), workers.encoders, "encoders", "encoder"),
    ]
    if with_rewards:
        groups.append(group("reward actor", reward_need(workers, cluster), workers.rewards, "rewards", "reward"))
    return Demands((*groups, Group("listing of the shards", 1, Need(cpus=1))))


def demands_of(config: Config, cluster: ClusterView, most: bool = False) -> Demands:
    """:func:`align_demands` of what this config's algorithm and reward ask for; pools have their fewest actors, or their ``most``."""
    demands = align_demands(config.workers, cluster, with_rewards=config.needs_reward)
    return Demands((*demands.groups, *(pool_group(config, key, cluster, most) for key in config.pools)))


def pool_group(config: Config, key: str, cluster: ClusterView, most: bool = False) -> Group:
    """The pool of the reward ``key`` of :attr:`Config.pools`, with its fewest actors or its ``most``."""
    reward, asked = config.pools[key], config.pool(key)
    need = replace(reward_need(config.workers, cluster), cpus=asked.cpus or 0.0, gpus=asked.gpus or 0.0)
    name = "scoring actor" if len(config.pools) == 1 else f"scoring actor of {reward.name!r}"
    return Group(name, asked.counts[most], need, f"{key}.actors.count", f"{key}.actors.cpus or .gpus")


def check(demands: Demands, cluster: ClusterView) -> Room:
    """Find room for every process: greedy, so that an odd mix on odd nodes may be refused although some placement exists.

    Raises:
        NoRoom: naming the first thing that is short, how much there is, and the setting to change.
    """
    for group in demands.groups:
        if group.count < 0:
            raise NoRoom(
                f"{group.name}: {group.count} processes. Set {group.count_setting or 'its size'} to 0 or more."
            )
    _each_fits_somewhere(demands, cluster)
    _totals_suffice(demands, cluster)
    friendly, unlucky = (_place(demands, cluster, biggest_first) for biggest_first in (True, False))
    placement = unlucky if friendly is None else friendly
    if placement is None:
        needs = [f"  {g.count} x {g.name}, each {_amounts(g.need.amounts())}" for g in demands.groups if g.count]
        nodes = [f"  {node.name}: {_amounts(node.capacity())}" for node in cluster.nodes]
        raise NoRoom(
            "the cluster is large enough in sum, but no way of placing the processes on single nodes was found.\n"
            + "\n".join(["needed:", *needs, "there is:", *nodes])
            + f"\nLower {_settings(demands.groups)}, or use fewer and larger nodes."
        )
    return Room(demands, cluster, placement, tight=friendly is None or unlucky is None)


def taken(demands: Demands, cluster: ClusterView) -> str:
    """What of that which ``demands`` need others hold just now, in words; empty where enough is free."""
    there = cluster.totals()
    free = there if cluster.free is None else cluster.free
    needs = sorted(demands.totals().items())
    short = [
        f"{_one(name, amount)} {name} needed, {_one(name, free.get(name, 0.0))} of {_one(name, there.get(name, 0.0))} free"
        for name, amount in needs
        if amount > free.get(name, 0.0) + _EPS
    ]
    return f"other jobs hold it: {'; '.join(short)} (`ray status`, `ray job list`)" if short else ""


def _each_fits_somewhere(demands: Demands, cluster: ClusterView) -> None:
    for group in demands.groups:
        need = group.need.amounts()
        if group.count == 0 or any(_fits(need, node.capacity()) for node in cluster.nodes):
            continue
        best = {name: max((node.capacity().get(name, 0.0) for node in cluster.nodes), default=0.0) for name in need}
        short = [name for name, amount in need.items() if amount > best[name] + _EPS] or list(need)
        setting = group.need_setting or "what it reserves"
        raise NoRoom(
            f"no node can hold one process of {group.name}: it needs {_amounts(need)} on one node;"
            f" the most any node has is {_amounts(best)}"
            f" (short of {', '.join(short)}). Lower {setting}, or add a node with that much." + _hint(cluster, short)
        )


def _totals_suffice(demands: Demands, cluster: ClusterView) -> None:
    there = cluster.totals()
    for name, amount in demands.totals().items():
        if amount <= there.get(name, 0.0) + _EPS:
            continue
        users = [g for g in demands.groups if g.count and name in g.need.amounts()]
        parts = " + ".join(f"{g.count} x {_one(name, g.need.amounts()[name])} {g.name}" for g in users)
        raise NoRoom(
            f"the plan needs {_one(name, amount)} {name} and the cluster has {_one(name, there.get(name, 0.0))},"
            f" {_one(name, amount - there.get(name, 0.0))} short: {parts}."
            f" Lower {_settings(users)}, or add {name}." + _hint(cluster, [name], math.ceil(amount))
        )


def _hint(cluster: ClusterView, short: Sequence[str], enough: int = 0) -> str:
    """What else may be the matter, by the kind of cluster; ``enough``: what a single node would have to have."""
    if cluster.local and CPU in short:
        return (
            " On one machine these CPUs are slots that Ray hands out, not cores: `--set workers.local_cpus=N` gives it more."
            " One is for Ray Data's listing of the shards."
        )
    if cluster.local:
        return ""
    more = " These CPUs are slots, not cores: `ray start --num-cpus=N` gives a node more" if CPU in short else ""
    more += f" (here {enough} are enough)." if more and enough and len(cluster.nodes) == 1 else "." if more else ""
    return more + " Nodes that are still starting do not count yet: `ray status` shows them."


def _settings(groups: Iterable[Group]) -> str:
    keys = [g.count_setting for g in groups if g.count_setting and g.count > 0]
    return " or ".join(dict.fromkeys(keys)) or "the number of processes"


def _one(name: str, amount: float) -> str:
    return f"{amount / _GIB:.1f} GiB" if name == MEMORY else f"{amount:g}"


def _amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{_one(name, amount)} {name}" for name, amount in amounts.items()) or "nothing"


def _total(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for each in amounts:
        total.update(each)  # floats, too
    return dict(total)


def _fits(need: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(amount <= free.get(name, 0.0) + _EPS for name, amount in need.items())


def _size(amounts: Mapping[str, float]) -> tuple[float, int, float]:
    """What makes a process big, or a node roomy: GPUs, then kinds of resources, then CPUs."""
    return amounts.get(GPU, 0.0), len(amounts), amounts.get(CPU, 0.0)


def _place(demands: Demands, cluster: ClusterView, biggest_first: bool) -> tuple[tuple[int, ...], ...] | None:
    """Greedy placement, group after group, or None where a process finds no room.

    `biggest_first` is the friendly order: GPUs, then many CPUs, each on the node with the fewest GPUs that can hold it. The other order is
    Ray on a bad day: small processes first, on the nodes with the most room, where they take the CPUs a GPU worker would need.
    """
    left = [node.capacity() for node in cluster.nodes]
    rows = [[0] * len(demands.groups) for _ in left]
    order = sorted(enumerate(demands.groups), key=lambda item: _size(item[1].need.amounts()), reverse=biggest_first)
    for g, group in order:
        need = group.need.amounts()
        for _ in range(group.count):
            able = [n for n, free in enumerate(left) if _fits(need, free)]
            if not able:
                return None
            best = (min if biggest_first else max)(able, key=lambda n: _size(left[n]))
            left[best] |= {name: left[best].get(name, 0.0) - amount for name, amount in need.items()}
            rows[best][g] += 1
    return tuple(map(tuple, rows))
