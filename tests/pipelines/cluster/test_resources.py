"""Do demands fit a cluster: cases by hand, messages, and properties against brute force."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from didr_core import config as configs
from didr_core.config import Workers
from didr_core.types import DIDRError
from pipelines.cluster.resources import (
    REWARD_RESOURCE,
    TRAINER_RESOURCE,
    ClusterView,
    Demands,
    Group,
    Need,
    Node,
    NoRoom,
    Room,
    align_demands,
    check,
    demands_of,
    role_resources,
)

ROOT = Path(__file__).resolve().parents[3]


def cluster(*nodes: dict[str, float], local: bool = False) -> ClusterView:
    return ClusterView(tuple(Node(f"n{i}", resources) for i, resources in enumerate(nodes)), local=local)


def tiny_demands(workers: int = 2, actors: int = 1) -> Demands:
    return Demands(
        (
            Group("training worker", workers, Need(cpus=1), "train.workers", "train.cpus_per_worker"),
            Group("encoder actor", actors, Need(cpus=1), "data.encoders"),
            Group("Ray Data listing task", 1, Need(cpus=1)),
        )
    )


def test_tiny_demands_fit_four_cpus_and_not_three() -> None:
    assert check(tiny_demands(), cluster({"CPU": 4})).placement == ((2, 1, 1),)
    with pytest.raises(NoRoom) as error:
        check(tiny_demands(), cluster({"CPU": 3}, local=True))
    message = str(error.value)
    for part in (
        "needs 4 CPU",
        "has 3",
        "2 x 1 training worker",
        "train.workers",
        "data.encoders",
        "workers.local_cpus",
    ):
        assert part in message


def test_the_hang_of_two_workers_on_two_cpus_is_refused() -> None:
    with pytest.raises(NoRoom, match="needs 3 CPU and the cluster has 2"):
        check(tiny_demands(actors=0), cluster({"CPU": 2}))


def test_the_single_machine_of_the_docs_has_room_on_two_cores() -> None:
    """docs/cluster.md's words for one machine; without them Ray counts the cores, and the error says what to say instead."""
    demands = demands_of(configs.load("tiny"), cluster({"CPU": 4}))
    (slots,) = re.findall(r"ray start --head --num-cpus=([1-9]\d*)", (ROOT / "docs" / "cluster.md").read_text())
    assert check(demands, cluster({"CPU": float(slots)}))
    with pytest.raises(
        NoRoom, match=r"needs 4 CPU and the cluster has 2, 2 short.*`ray start --num-cpus=N` .*\(here 4 are enough\)"
    ):
        check(demands, cluster({"CPU": 2}))


def test_a_cluster_s_table_is_for_people() -> None:
    node = Node(
        "one", {"CPU": 4.0, "memory": 1.71375e10, "trainer": 2.0}, {"didr-role": "trainer", "ray.io/node-id": "ab12"}
    )
    told = Console(width=200)
    with told.capture() as shown:
        told.print(
            ClusterView((node,), local=False, free={"CPU": 1.0, "memory": 2.0**30, "object_store_memory": 7.0}).table()
        )
    lines = [" ".join(re.findall(r"[^\s│]+", line)) for line in shown.get().splitlines() if "│" in line]
    assert lines == [
        "one didr-role=trainer 4 CPU, 16.0 GiB memory, 2 trainer",
        "in all 4 CPU, 16.0 GiB memory, 2 trainer",
        "free now 1 CPU, 1.0 GiB memory, 0 trainer",
    ]


def test_a_worker_needs_its_gpu_and_its_cpus_on_one_node() -> None:
    demands = Demands((Group("training worker", 1, Need(cpus=8, gpus=1), "train.workers", "train.cpus_per_worker"),))
    with pytest.raises(NoRoom, match=r"no node can hold one process of training worker.*train\.cpus_per_worker"):
        check(demands, cluster({"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}))
    with pytest.raises(NoRoom, match="no node can hold one"):  # each amount exists, but not together
        check(demands, cluster({"CPU": 8}, {"CPU": 4, "GPU": 1}))
    assert check(demands, cluster({"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 1})).placement == ((0,), (1,))


def test_fragments_do_not_add_up() -> None:
    demands = Demands((Group("training worker", 3, Need(cpus=4), "train.workers"),))
    with pytest.raises(NoRoom, match="large enough in sum"):
        check(demands, cluster({"CPU": 6}, {"CPU": 6}))


def test_a_group_fills_a_node_before_the_next_begins() -> None:
    """Two nodes of 6: 3+3 and 2+2+2. Smallest first puts 2+2+2 apart and is stuck."""
    demands = Demands((Group("a", 2, Need(cpus=3)), Group("b", 3, Need(cpus=2))))
    room = check(demands, cluster({"CPU": 6}, {"CPU": 6}))
    assert sorted(room.placement) == [(0, 3), (2, 0)]
    assert room.tight


def test_small_actors_that_could_take_a_gpu_workers_cpus_are_told_of() -> None:
    demands = Demands((Group("training worker", 1, Need(cpus=4, gpus=1)), Group("actor", 2, Need(cpus=1))))
    assert check(demands, cluster({"CPU": 4, "GPU": 1}, {"CPU": 4})).tight
    roles = Demands(
        (
            Group("training worker", 1, Need(cpus=4, gpus=1, custom={TRAINER_RESOURCE: 1})),
            Group("actor", 2, Need(cpus=1, custom={REWARD_RESOURCE: 1})),
        )
    )
    room = check(roles, cluster({"CPU": 4, "GPU": 1, TRAINER_RESOURCE: 1}, {"CPU": 4, REWARD_RESOURCE: 4}))
    assert not room.tight
    assert room.placement == ((1, 0), (0, 2))


def test_roles_are_asked_for_only_where_offered() -> None:
    assert role_resources(cluster({"CPU": 4}), TRAINER_RESOURCE) == {}
    assert role_resources(cluster({"CPU": 0}, {"CPU": 4, TRAINER_RESOURCE: 4}), TRAINER_RESOURCE) == {
        TRAINER_RESOURCE: 1.0
    }


def test_align_plan_of_the_default_workers_fits_the_default_local_ray() -> None:
    workers = Workers(train=2)
    here = cluster({"CPU": float(workers.local_cpus)}, local=True)
    room = check(align_demands(workers, here), here)
    assert room.demands.totals() == {"CPU": 4.0}
    with pytest.raises(NoRoom, match=r"needs 5 CPU and the cluster has 4.*workers\.train.*workers\.local_cpus"):
        check(align_demands(Workers(train=3), here), here)
    assert "reward actor" not in {g.name for g in align_demands(workers, here, with_rewards=False).groups}


def test_a_reward_in_actors_has_room_of_its_own() -> None:
    view = cluster({"CPU": 16, "GPU": 2, REWARD_RESOURCE: 4})
    plain = configs.load("tiny")
    moved = configs.load("tiny", ["reward.placement=actors", "reward.actors.count=3", "reward.actors.gpus=0.5"])
    pool = demands_of(moved, view).groups[-1]
    assert demands_of(moved, view).groups[:-1] == demands_of(plain, view).groups
    assert (pool.name, pool.count, pool.count_setting) == ("scoring actor", 3, "reward.actors.count")
    assert pool.need.amounts() == {"CPU": plain.workers.reward_cpus, "GPU": 0.5, REWARD_RESOURCE: 1.0}
    ranged = configs.load("tiny", ["reward.placement=actors", "reward.actors.count=[2,3]"])
    assert demands_of(ranged, view).groups[-1].count == 2 and ranged.pool("reward").counts == (2, 3)
    assert configs.Config(**ranged.model_dump(mode="json")).pool("reward") == ranged.pool("reward")
    assert configs.load("tiny", ["reward.placement=actors", "workers.rewards=3"]).pool("reward").counts == (3, 3)
    for wrong in ("[1,2,3]", "[0,2]", "many"):
        with pytest.raises(DIDRError, match="actors.count"):
            configs.load("tiny", [f"reward.actors.count={wrong}"])
    with pytest.raises(NoRoom, match=r"needs 1\.5 GPU.*3 x 0\.5 scoring actor.*Lower reward\.actors\.count"):
        check(demands_of(moved, view), cluster({"CPU": 16, "GPU": 1, REWARD_RESOURCE: 9}))
    assert demands_of(configs.load("tiny_blackbox"), view).groups[-1].name == "scoring actor"


def test_align_plan_sends_processes_to_the_nodes_of_their_role() -> None:
    view = cluster({"CPU": 0}, {"CPU": 16, "GPU": 2, TRAINER_RESOURCE: 2}, {"CPU": 16, "GPU": 1, REWARD_RESOURCE: 16})
    workers = Workers(train=2, train_cpus=4, train_gpus=1, encoders=4, rewards=2, actor_resources={"big_memory": 1})
    demands = align_demands(workers, view)
    train, encoder, reward, listing = demands.groups
    assert train.need.amounts() == {"CPU": 4.0, "GPU": 1.0, TRAINER_RESOURCE: 1.0}
    assert encoder.need.custom == reward.need.custom == {REWARD_RESOURCE: 1.0, "big_memory": 1}
    assert listing.need.amounts() == {"CPU": 1.0}
    placement = check(align_demands(workers.model_copy(update={"actor_resources": {}}), view), view).placement
    assert placement[0] == (0, 0, 0, 0)
    assert placement[1][:3] == (2, 0, 0)
    assert placement[2][:3] == (0, 4, 2)


def test_missing_role_and_memory_are_named() -> None:
    demands = Demands((Group("actor", 1, Need(custom={"reward": 1}), need_setting="cluster.roles"),))
    with pytest.raises(NoRoom, match=r"short of reward.*cluster\.roles.*ray status"):
        check(demands, cluster({"CPU": 4}))
    demands = Demands((Group("training worker", 2, Need(memory=3 * 2**30), "train.workers"),))
    with pytest.raises(NoRoom, match="needs 6.0 GiB memory and the cluster has 4.0 GiB"):
        check(demands, cluster({"CPU": 4, "memory": 4 * 2**30}))


def test_names_ray_makes_up_are_no_capacity() -> None:
    node = Node(
        "n", {"CPU": 4.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0, "object_store_memory": 1e9, "GPU": 1.0}
    )
    assert node.capacity() == {"CPU": 4.0, "GPU": 1.0}


def test_negative_count_and_no_node() -> None:
    with pytest.raises(NoRoom, match=r"train\.workers to 0 or more"):
        check(Demands((Group("training worker", -1, Need(), "train.workers"),)), cluster({"CPU": 4}))
    with pytest.raises(NoRoom, match="no node can hold"):
        check(tiny_demands(), cluster())
    assert check(Demands(()), cluster()).placement == ()


def test_table_shows_every_node_and_the_sum() -> None:
    room = check(tiny_demands(), cluster({"CPU": 3}, {"CPU": 2}))
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(room.table())
    text = console.export_text()
    assert "n0" in text and "n1" in text and "in all" in text and "training worker" in text and "4 CPU" in text


def test_large_cluster_is_quick() -> None:
    """64 nodes of 8 GPUs, as many workers as fit, actors beside them: no explosion."""
    nodes = [{"CPU": 96.0, "GPU": 8.0}] * 64 + [{"CPU": 64.0}] * 16
    demands = Demands(
        (
            Group("training worker", 512, Need(cpus=8, gpus=1)),
            Group("encoder actor", 128, Need(cpus=4)),
            Group("reward actor", 128, Need(cpus=4)),
            Group("listing", 1, Need(cpus=1)),
        )
    )
    assert sum(map(sum, check(demands, cluster(*nodes)).placement)) == 769


amounts = st.integers(0, 3)
nodes_st = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(0, 6), "GPU": amounts, "reward": amounts}), min_size=0, max_size=3
)
needs_st = st.builds(
    lambda c, g, r: Need(cpus=c, gpus=g, custom={"reward": r}), st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)
)
plans_st = st.lists(
    st.builds(lambda i, n, need: Group(f"g{i}", n, need), st.integers(0, 9), st.integers(0, 3), needs_st), max_size=3
).map(lambda groups: Demands(tuple(groups)))


def by_hand(demands: Demands, view: ClusterView) -> bool:
    """Every assignment of every process to a node."""
    processes = [g.need.amounts() for g in demands.groups for _ in range(g.count)]
    for choice in itertools.product(range(len(view.nodes)), repeat=len(processes)):
        left = [dict(n.capacity()) for n in view.nodes]
        for node, need in zip(choice, processes, strict=True):
            for name, amount in need.items():
                left[node][name] = left[node].get(name, 0) - amount
        if all(v >= 0 for free in left for v in free.values()):
            return True
    return False


def fits(demands: Demands, view: ClusterView) -> Room | None:
    try:
        return check(demands, view)
    except NoRoom:
        return None


@settings(max_examples=300, deadline=None)
@given(plans_st, nodes_st)
def test_what_brute_force_cannot_place_is_refused(demands: Demands, nodes: list[dict[str, float]]) -> None:
    if sum(g.count for g in demands.groups) > 6:
        demands = Demands(demands.groups[:2])
    view = cluster(*nodes)
    assert fits(demands, view) is None or by_hand(demands, view)


def test_nearly_all_that_brute_force_can_place_is_found() -> None:
    """Greedy: the exact answer is wider by 2 in 10,000 of such small cases. Always the same cases here, drawn from a seed."""
    draw, there, found = random.Random(0), 0, 0
    for _ in range(2000):
        nodes = [{"CPU": draw.randint(0, 6), "GPU": draw.randint(0, 3), "reward": draw.randint(0, 3)} for _ in range(3)]
        needs = [Need(draw.randint(0, 3), draw.randint(0, 2), custom={"reward": draw.randint(0, 1)}) for _ in range(2)]
        demands = Demands(tuple(Group("group", draw.randint(0, 3), need) for need in needs))
        if by_hand(demands, cluster(*nodes)):
            there, found = there + 1, found + (fits(demands, cluster(*nodes)) is not None)
    assert there > 500 and found >= 0.99 * there


@pytest.mark.parametrize(
    ("groups", "nodes"),
    [
        ([(2, 4, 1), (2, 1, 0)], [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 2}]),
        ([(1, 1, 2), (2, 1, 1)], [{"CPU": 2, "GPU": 2}, {"CPU": 2, "GPU": 2}]),
        ([(4, 8, 1), (2, 4, 0.5), (3, 2, 0), (1, 1, 0)], [{"CPU": 48, "GPU": 5}]),
        ([(8, 8, 1), (4, 4, 0), (2, 4, 1)], [{"CPU": 64, "GPU": 8}, {"CPU": 32, "GPU": 2}]),
        ([(3, 5, 0), (3, 2, 0)], [{"CPU": 7}] * 3),
        ([(1, 0.1, 0), (2, 4, 1), (3, 1, 0)], [{"CPU": 5, "GPU": 1}, {"CPU": 7, "GPU": 1}]),
    ],
)
def test_what_fits_by_hand_is_found(groups: list[tuple[int, float, float]], nodes: list[dict[str, float]]) -> None:
    demands = Demands(tuple(Group(f"g{i}", n, Need(cpus=c, gpus=g)) for i, (n, c, g) in enumerate(groups)))
    assert sum(map(sum, check(demands, cluster(*nodes)).placement)) == sum(n for n, _, _ in groups)


@settings(max_examples=200, deadline=None)
@given(plans_st, nodes_st)
def test_a_placement_holds_every_process_and_overloads_no_node(demands: Demands, nodes: list[dict[str, float]]) -> None:
    view = cluster(*nodes)
    room = fits(demands, view)
    if room is None:
        return
    for g, group in enumerate(demands.groups):
        assert sum(row[g] for row in room.placement) == group.count
    for node, row in zip(view.nodes, room.placement, strict=True):
        used = Demands(tuple(Group(g.name, n, g.need) for g, n in zip(demands.groups, row, strict=True))).totals()
        assert all(amount <= node.capacity().get(name, 0) + 1e-6 for name, amount in used.items())
