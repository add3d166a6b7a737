"""`didr evaluate`: any checkpoints on the same prompts from the same noise, scored by the same rewards; report, MLflow.

    python -m pipelines.evaluate --model start --model aligned=runs/NAME --model teacher --out runs/contest    # also for `ray job submit`

The folder is a :class:`didr_core.evaluate.contest.Contest`: the same command again goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import queue
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from didr_core import config as configs
from didr_core.config import Component, Config, build
from didr_core.config.files import replace_text
from didr_core.config.registry import configured
from didr_core.data.convert import tables
from didr_core.data.prompts import PromptIndex
from didr_core.data.storage import Store, disk, room
from didr_core.evaluate.contest import NEAREST, Contest, Item, run
from didr_core.evaluate.judges import load_lpips
from didr_core.evaluate.layouts import check_rows, write_pictures
from didr_core.evaluate.models import parse
from didr_core.evaluate.scores import numbers, origin
from didr_core.export.card import public_path
from didr_core.train.ending import stoppable
from didr_core.train.observer import Observer
from didr_core.train.patience import Patience
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError, Reward
from didr_core.world.captions import parse_caption
from pipelines.cluster.disks import check_disks
from pipelines.cluster.leftovers import looked_after
from pipelines.cluster.session import await_room, pulse, ray_session, slots, where_to_run
from pipelines.report.console import Progress, print_summary, warn
from pipelines.report.contest import write_contest_report
from pipelines.tracking import tracker as tracking


@dataclass(frozen=True)
class Options:
    """What is compared, in a person's words."""

    models: Sequence[str]
    recipe: str = "tiny"
    overrides: Sequence[str] = ()
    prompts: str | None = None  # the recipe's held-out ones
    count: int | None = None  # all of `prompts`; of the recipe's, `evaluation.prompts`
    seeds: int | None = None  # the recipe's
    rewards: Sequence[str] = ()  # the recipe's reward and judge
    batch: int | None = None  # 8; the bundled world's small pictures 64
    real: str | None = None  # the model whose pictures the others' distances are from
    features: str | None = None  # the reward they are measured in: the judge, else the first that has picture features
    lpips: bool = False
    layouts: Sequence[str] = ()  # that pictures are written in, too
    command: str = ""


def evaluate(
    options: Options, out: str, *, local: bool = False, address: str | None = None, verbose: bool = False
) -> Path:
    """Draw and judge what is missing in the folder ``out``, then compare; returns the folder.

    Args:
        out: a path, or an address whose copy on this machine is worked in, and returned.
        local: one process, no Ray. address: a Ray cluster; see :func:`pipelines.cluster.session.ray_session`.

    Raises:
        DIDRError: anything the user can mend. What is done stays.
        SystemExit: Ctrl-C or SIGTERM.
    """
    began = time.monotonic()
    config = configs.load(options.recipe, options.overrides)
    folder = RunFolder.at("--out", out)
    if folder.address:
        Store(folder.address, "--out").probe()
    contest = plan(options, config, folder.path)
    told = told_of_prompts(options, config, contest)
    with disk("--out", folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    room("--out", folder.path)
    check_disks(config.tracking, folder.path, ray=not local and where_to_run(address).kind == "here")
    with stoppable(), folder.mirrored(1, warn), folder.lock("evaluating"), ExitStack() as stack:
        record = looked_after(folder.path)
        progress = stack.enter_context(ContestProgress(contest))
        uri = tracking.preflight(config.tracking, folder.path.parent)
        if progress.todo:
            work = (
                _here(config, contest)
                if local
                else _on_ray(config, folder, contest, address, verbose, record, progress)
            )
            for item in work:
                progress.did(item)
        progress.phase("comparing")
        focus = next((m.name for m in contest.models if m.name == "aligned"), contest.models[0].name)
        source = public_path(options.prompts or config.data.heldout or config.data.prompts)
        scores = contest.scores(origin(source, [options.command] if options.command else []), focus)
        if options.real:
            scores.tree["laws"] = {
                "real": options.real,
                "features": contest.features,
                "models": contest.laws(options.real),
            }
        scores.write(folder.path)
        write_contest_report(contest, scores, focus)
        for layout in options.layouts:
            progress.phase(f"writing layout {layout}")
            for place, model in enumerate(contest.models):
                write_pictures(layout, folder.path / "layouts" / layout / model.name, contest.rows(place, told))
        _track(config, folder.path, scores.tree, focus, uri)
    print_summary(scores.tree, folder.path, focus=focus, seconds=time.monotonic() - began)
    return folder.path


def plan(options: Options, config: Config, folder: Path) -> Contest:
    """What the options mean, with everything looked at that can be known to be wrong before a weight is loaded.

    Raises:
        DIDRError: a model, reward or prompt that is not what it should be.
    """
    models = tuple(parse(text, config) for text in options.models)
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names) or any("/" in name for name in names):
        raise DIDRError(f"--model: expected models of different names without '/', got {names}; say NAME=PATH")
    source = options.prompts or config.data.heldout or config.data.prompts
    index = PromptIndex.open(source, config.data.column, config.data.id_column, "--prompts")
    count = options.count or (0 if options.prompts else config.evaluation.prompts) or len(index)
    prompts = tuple(prompt.prompt for prompt in index.first(count))
    rewards: Mapping[str, Component | None] = {"reward": config.reward, "judge": config.judge}
    if options.rewards:
        rewards = dict(map(parse_reward, options.rewards))
    built = {name: build("rewards", reward) for name, reward in rewards.items() if reward is not None}
    for reward in built.values():
        reward.check()
    kept = {name: reward.model_dump(mode="json") for name, reward in rewards.items() if reward is not None}
    world = config.evaluation.world
    if world == "tiny":
        try:
            for prompt in prompts:
                parse_caption(prompt)
        except ValueError as error:
            warn(f"evaluation.world=tiny: its checker is left out, {error}")
            world = "none"
    seeds = tuple(range(options.seeds or config.evaluation.seeds))
    for model in models:
        if model.kind == "pictures":
            model.load(torch.device("cpu"), prompts, seeds)
    batch = options.batch or (64 if config.evaluation.world == "tiny" else 8)
    features = ""
    if options.real or options.features:
        features = _tower(options, names, built, len(prompts) * len(seeds))
    if options.lpips:
        load_lpips("cpu")
    return Contest(folder, models, prompts, seeds, kept, world, batch, features, options.lpips)


def _tower(options: Options, models: Sequence[str], rewards: Mapping[str, Reward], pictures: int) -> str:
    """The name of the reward whose picture features are kept."""
    if options.real and (options.real not in models or len(models) < 2 or pictures <= NEAREST):
        raise DIDRError(
            f"--real {options.real!r}: expected the name of one of at least two models ({', '.join(models)}), "
            f"and more than {NEAREST} pictures of each, got {pictures}"
        )
    able = sorted((name for name, reward in rewards.items() if reward.features), key=lambda name: name != "judge")
    if not able or (options.features or able[0]) not in able:
        raise DIDRError(
            f"--features {options.features or 'of the judge'}: expected a reward with picture features, "
            f"{', '.join(able) or 'none of these has them'}. One is added by e.g. --reward clip_score,path=FOLDER"
        )
    return options.features or able[0]


def told_of_prompts(options: Options, config: Config, contest: Contest) -> list[dict[str, Any]]:
    """``id`` and ``metadata`` of every prompt, where layouts want them.

    Raises:
        DIDRError: a layout that cannot hold these prompts, or so many seeds; said before anything is drawn.
    """
    if not options.layouts:
        return []
    source = options.prompts or config.data.heldout or config.data.prompts
    rows = (row for part in tables(source, config.data.column, config.data.id_column) for row in part.to_pylist())
    told = [
        {"id": row["id"] or str(number), "metadata": json.loads(row["metadata"] or "{}")}
        for number, row in enumerate(itertools.islice(rows, len(contest.prompts)))
    ]
    for layout in options.layouts:
        check_rows(layout, contest.prompts, told, len(contest.seeds))
    return told


def parse_reward(text: str) -> tuple[str, Component]:
    """``[NAME=]KEY[,option=value...]`` to the name of its measure and its config.

    Raises:
        DIDRError: an unknown key or option.
    """
    head, *options = text.split(",")
    name, _, key = head.rpartition("=")
    try:
        made = configured("rewards", {"name": key, **dict(o.partition("=")[::2] for o in options)})
    except ValueError as error:
        raise DIDRError(f"--reward {text!r}: {error}") from error
    return f"reward/{name or key}", made


class ContestProgress(Progress):
    """Pictures done of all, and when the rest will be, by what each model costs."""

    def __init__(self, contest: Contest) -> None:
        super().__init__(0, title="evaluate")
        self.contest, self.todo = contest, contest.todo()
        self.pictures = len(contest.models) * len(contest.prompts) * len(contest.seeds)
        self.missing = sum(self._pictures(item) for item in self.todo)
        self.cost, self.spent, self.began = sum(map(contest.cost, self.todo)), 0, time.monotonic()
        done = self.pictures - self.missing
        self.note(f"evaluation {contest.folder}" + (f": {done} of {self.pictures} pictures are scored" if done else ""))

    def did(self, item: Item) -> None:
        """One more block."""
        self.missing -= self._pictures(item)
        self.spent += self.contest.cost(item)
        left = (time.monotonic() - self.began) * (self.cost - self.spent) / max(1, self.spent)
        self.phase("pictures scored", self.pictures - self.missing, self.pictures, left)

    def _pictures(self, item: Item) -> int:
        return len(self.contest.places(item[1])) * len(self.contest.seeds)


NEWS = "a block was scored"


class _Hangs(Observer):
    """Onto the progress line: who does not answer."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """See :class:`Observer`."""
        if text != NEWS:
            self.progress.phase(text)


def _here(config: Config, contest: Contest) -> Iterator[Item]:
    torch.set_num_threads(config.train.threads)
    return run(contest, config.torch_device)


def _on_ray(
    config: Config,
    folder: RunFolder,
    contest: Contest,
    address: str | None,
    verbose: bool,
    record: Callable[[], None],
    progress: ContestProgress,
) -> Iterator[Item]:
    """By actors, which a thread of this process waits for while it looks whether all are alive."""
    progress.phase("starting Ray")
    calls = folder.calls_path
    shutil.rmtree(calls, ignore_errors=True)
    with ray_session(address, slots(config), verbose) as view:
        record()
        if folder.address and len(view.nodes) > 1:
            nodes = f"actors on {len(view.nodes)} nodes need a folder that all of them see"
            raise DIDRError(f"--out {folder.place}: {nodes}. Mount one and give its path, or add --local.")
        # Ray's libraries read their environment when they are imported: the session has set it
        from pipelines.cluster.pictures import contest_on_ray, demands
        from pipelines.cluster.remote import in_thread
        from pipelines.cluster.watch import POLL_S

        placed = await_room(lambda v: demands(config, v), view, progress.phase)
        patience, check_alive = Patience(_Hangs(progress), config.workers.patience_s, calls), pulse()
        done: queue.Queue[Item] = queue.Queue()

        def work() -> None:
            for item in contest_on_ray(config, contest, placed.cluster, calls):
                done.put(item)

        progress.phase("starting generator and reward actors")
        working = in_thread(work)
        while not working.done() or not done.empty():
            with suppress(queue.Empty):
                yield done.get(timeout=POLL_S)
                patience.stage(NEWS)
            check_alive()
            patience.look()
            record()
        working.result()
    shutil.rmtree(calls, ignore_errors=True)


def _track(config: Config, folder: Path, tree: Mapping[str, Any], focus: str, uri: str) -> None:
    """One MLflow run a folder: means of all measures, the report and the numbers it shows."""
    note = folder / "mlflow.json"
    known = json.loads(note.read_text()) if note.is_file() else {}
    with tracking.open_tracker(
        config, folder, run_id=known.get("run_id"), uri=uri, tags={"didr.kind": "evaluation"}
    ) as kept:
        if kept.run_id:
            replace_text(note, json.dumps({"run_id": kept.run_id}))
        kept.final(numbers(tree, focus))
        for name in ("report.html", "scores.json", "scores.npz"):
            kept.artifact(folder / name)


if __name__ == "__main__":
    from pipelines.cli.main import main

    main(["evaluate", *sys.argv[1:]], prog=f"python -m {Path(__file__).parent.name}.evaluate")
