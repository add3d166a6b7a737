"""The driver of one training group: it starts the pools of rewards and the worker group, and starts the group again when workers die.

Ray Train could restart the group itself, but it cannot tell a dead node from a NaN reward, and would train into the second one again.
What would go wrong again (a NaN reward, a full disk, an exception in a reward's file) is not tried again.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.data import Dataset
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from didr_core.config import Config
from didr_core.data import feed, scales
from didr_core.data.precompute import SAYS, absent, require_room
from didr_core.data.prompts import PromptIndex
from didr_core.data.storage import Store
from didr_core.plan import fit
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines.cluster.members import Members
from pipelines.cluster.pool import Pool
from pipelines.cluster.prompts import execution_options, prompt_stream
from pipelines.cluster.remote import by_name, elsewhere, users_mistake
from pipelines.cluster.resources import ClusterView, Node, encoder_need, reward_need, train_need
from pipelines.cluster.scoring import placed, start_pools


def fitted(config: Config, view: ClusterView, at_once: int = 1) -> tuple[Config, str]:
    """:func:`didr_core.plan.fit.here` where training workers run."""
    found: tuple[Config, str] = elsewhere(train_need(config.workers, view), fit.here, config, at_once)
    return found


def measured_scales(config: Config, view: ClusterView, meanwhile: Callable[[], None] = lambda: None) -> Config:
    """:func:`didr_core.data.scales.resolve` where reward models run: this process may have no GPU."""
    pools = start_pools(config, view) if config.in_actors else []
    resolved: Config = elsewhere(reward_need(config.workers, view), _resolved, config, pools, meanwhile=meanwhile)
    return resolved


def _resolved(config: Config, pools: Sequence[Pool]) -> Config:
    return scales.resolve(config, placed(config, pools) if pools else None)


def fit_until_done(
    members: Members,
    run: RunFolder,
    index: PromptIndex,
    observer: Observer,
    profile: bool = False,
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Fit; after a worker's death again, from the last checkpoint, ``workers.max_failures`` times; whenever a node left or came, too.

    Args:
        members: which nodes, and how many workers; asked before every start. profile: see :func:`didr_core.train.loop.loop`.
        settle: makes the folder what the workers, on whatever machine, left of it, and shows them what is new here.

    Raises:
        DIDRError: what a worker raised, in words, or workers that died too often.
        KeyboardInterrupt: the run was asked to stop, and has.
    """
    failures, pools = 0, list[Pool]()
    nodes: tuple[Node, ...] = ()
    for again in itertools.chain([False], itertools.repeat(True)):
        config, view = members.start(again)
        most = config.workers.max_failures
        if nodes != view.nodes:  # those of an actor that is lost with its node have no room where it was
            for actor in (actor for pool in pools for actor in (*pool.actors, pool.keeper) if actor):
                ray.kill(actor)  # a keeper's own end with it
            pools, nodes = start_pools(config, view, run.calls_path), view.nodes
        if config.precomputed:
            _precompute(config, run, index, observer, view, pools)
        step = run.last_step()
        run.forget_after(step)
        settle()
        observer.stage(f"starting workers again from step {step}" if again else "starting workers")
        try:
            _trainer(config, run, index, view, step, pools, profile).fit()
            settle()
            return
        except TrainingFailedError as error:
            settle()
            if (why := members.why()) and run.info().get("status") != "interrupted":
                observer.note(f"{why}; going on from step {run.last_step()}", style="yellow")
                continue
            if run.stop_path.exists():
                raise KeyboardInterrupt(f"stopped after step {run.last_step()}") from error
            of_ranks = getattr(error, "worker_failures", {}).values()  # an error of the group itself has none
            if said := dict.fromkeys(str(e) for e in of_ranks if isinstance(e, DIDRError)):
                raise DIDRError("\n".join(said)) from error
            last = str(error).strip().splitlines()[-1].partition(". ")[0][:300]
            failures += 1
            if failures > most:
                reached = max((row["step"] for row in read_lines(run.metrics_path)), default=0)
                raise DIDRError(
                    f"training failed {failures} times (workers.max_failures={most}), last at step {reached}; "
                    f"`didr align --resume {run.place}` goes on from step {run.last_step()}. Last: {last}"
                ) from error
            observer.note(f"a worker failed; going on from step {run.last_step()} ({last})", style="yellow")
        finally:
            shutil.rmtree(run.path / "ray", ignore_errors=True)
            if run.address and len(view.nodes) > 1:
                with suppress(OSError):
                    Store(run.address).delete(".ray")


def _precompute(
    config: Config, run: RunFolder, index: PromptIndex, observer: Observer, view: ClusterView, pools: Sequence[Pool]
) -> None:
    """:func:`didr_core.data.precompute.precompute` by the actors of the prompt stream, which are gone when it returns."""
    share, stages = config.sizes.share, feed.stages(config)
    todo = list(absent(config, index, stages, share, run.last_step() * config.train.batch))
    if not todo:
        return
    last = config.sizes.total_prompts // share
    try:
        stream = _stream(config, run, index, view, todo[0] * share, pools).select_columns(["index"])
        stream.context.execution_options = execution_options()
        for number, _ in zip(range(todo[0], last), stream.iter_batches(batch_size=share), strict=True):
            if number == todo[0]:
                require_room(config, stages, feed.samples(config, index, number * share, share), len(todo) - 1)
            observer.stage(SAYS, number + 1 - todo[0], last - todo[0])
    except Exception as error:
        if mistake := users_mistake(error):
            raise mistake from error
        raise


def _stream(
    config: Config, run: RunFolder, index: PromptIndex, view: ClusterView, cursor: int, pools: Sequence[Pool]
) -> Dataset:
    encoder, reward = encoder_need(config.workers, view), reward_need(config.workers, view)
    return prompt_stream(config, index, cursor, encoder, reward, calls=run.calls_path, pools=pools)


def _trainer(
    config: Config,
    run: RunFolder,
    index: PromptIndex,
    view: ClusterView,
    step: int,
    pools: Sequence[Pool],
    profile: bool,
) -> TorchTrainer:
    workers = config.workers
    need = train_need(workers, view)
    datasets = {}
    if step < config.train.steps and not config.precomputed:  # else each worker reads its share itself
        datasets["train"] = _stream(config, run, index, view, step * config.train.batch, pools)
    return TorchTrainer(
        by_name("pipelines.cluster.worker", "train_worker"),
        train_loop_config={
            "config": config,
            "run": run,
            "owner": run.owner,
            "step": step,
            "corpus": index.fingerprint,
            "pools": pools,
            "profile": profile,
        },
        scaling_config=ScalingConfig(
            num_workers=workers.train,
            use_gpu=need.gpus > 0,
            resources_per_worker={"CPU": need.cpus} | need.amounts(),
        ),
        # A new name each time: what we go on from is our own checkpoint, the same with and without Ray.
        run_config=RunConfig(
            name=f"from-step-{step}", failure_config=FailureConfig(max_failures=0), **_storage(run, view)
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=execution_options()),
    )


def _storage(run: RunFolder, view: ClusterView) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: all machines must see it."""
    if len(view.nodes) == 1 or not run.address:
        return {"storage_path": str(run.path / "ray")}
    store = Store(run.address)
    return {"storage_path": f"{store.root}/.ray", "storage_filesystem": store.filesystem}
