"""One case of `benchmarks.overhead`, in a process of its own: `python -m benchmarks.overhead_case CASE FOLDER STEPS BATCH PREPARED`.

Writes FOLDER/case.json: when the first step ended, the profile of the steps, and what the prompts took of Ray's object store.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from didr_core import config as configs
from didr_core.config import Config
from didr_core.data.feed import LocalFeed
from didr_core.train.distributed import ProcessGroup
from didr_core.train.learner import Learner
from didr_core.train.profile import Profile
from didr_core.train.run_folder import read_lines

OF_TRAIN_AND_DATA = 7
"""Actors beside the workers: controller, synchronization, placement groups, statistics, autoscaling, location of actors, datasets."""


def settings(steps: int, batch: int, workers: int, prepared: bool) -> list[str]:
    """Recipe `tiny` with short steps, of which all are whole, and with no scores at the end."""
    changes = {
        "train.steps": steps,
        "train.batch": batch,
        "train.assistant_warmup": 0,
        "train.checkpoint_every": 10 * steps,
    }
    changes |= {"workers.precompute": str(prepared).lower()}
    changes |= {"workers.train": workers, "evaluation.prompts": 0, "evaluation.every": 0, "evaluation.grid": 1}
    return [f"{key}={value}" for key, value in changes.items()]


def plain(rank: int, config: Config, folder: Path) -> None:
    """The bare loop, as one of ``workers.train`` processes."""
    torch.set_num_threads(1)
    workers = config.workers.train
    if workers > 1:
        meeting = f"file://{folder.resolve()}/meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    profile = Profile()
    learner = Learner(config, parallel=ProcessGroup() if workers > 1 else None, phase=profile)
    batches = list(islice(LocalFeed(config, rank=rank, world_size=workers), config.train.steps))
    first_at = 0.0
    for batch in batches:
        with profile("step"):
            learner.step(batch)
        first_at = first_at or time.time()
    if rank == 0:
        (folder / "case.json").write_text(json.dumps({"first_at": first_at, "profile": profile.summary()}))
    if workers > 1:
        torch.distributed.destroy_process_group()


def aligned(case: str, folder: Path, changes: list[str]) -> None:
    """`didr align`, its MLflow database beside the run."""
    from pipelines.align import align

    stored: dict[str, float] = {}
    if case != "local":
        threading.Thread(target=watch_object_store, args=(stored,), daemon=True).start()
    changes.append(f"tracking.uri=sqlite:///{folder.resolve()}/mlflow.db")
    run = align("tiny", changes, output=str(folder / "run"), local=case == "local", address="local", profile=True)
    told = {"first_at": read_lines(run.metrics_path)[0]["time"], "profile": json.loads(run.profile_path.read_text())}
    (folder / "case.json").write_text(json.dumps({**told, "bytes_a_prompt": stored}))


@contextmanager
def idle_ray(actors: int) -> Iterator[None]:
    """Ray on this machine as `align` starts it, with ``actors`` that wait to be asked."""
    import ray

    from pipelines.cluster.session import ray_session

    class Waiting:
        def here(self) -> bool:
            return True

    with ray_session("local"):
        waiting = [ray.remote(num_cpus=0)(Waiting).remote() for _ in range(actors)]
        ray.get([actor.here.remote() for actor in waiting])
        yield


def watch_object_store(found: dict[str, float]) -> None:
    """Keep ``found``, bytes a prompt by stage, at what Ray's metrics say, until Ray ends. For a thread.

    Waits for this process to start Ray, and imports nothing: Ray's libraries read their environment when they are imported.
    """
    while not ("ray" in sys.modules and getattr(sys.modules["ray"], "is_initialized", lambda: False)()):
        time.sleep(0.2)
    port = sys.modules["ray"].nodes()[0]["MetricsExportPort"]
    while True:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            found |= bytes_a_prompt(answer.read().decode())
        time.sleep(5.0)  # answering costs Ray's agent CPU time


def bytes_a_prompt(metrics: str) -> dict[str, float]:
    """Bytes that each stage of the prompt stream put into the object store, a prompt: from Ray's metrics in Prometheus's text format."""
    made: dict[str, dict[str, float]] = {"bytes": {}, "rows": {}}
    for what, labels, value in re.findall(
        r"^ray_data_(bytes|rows)_task_outputs_generated\{(.*)\} (\S+)$", metrics, re.MULTILINE
    ):
        stage = re.search(r'operator="(\w+)', labels)
        if stage and float(value):
            found = re.search(r"\((\w+)\)", labels)
            name = found[1] if found else stage[1]
            made[what][name] = made[what].get(name, 0.0) + float(value)
    return {name: made["bytes"][name] / rows for name, rows in made["rows"].items() if name in made["bytes"]}


def main() -> int:
    """The command line; returns the exit code."""
    case, folder, steps, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    workers = 2 if case.endswith("2") else 1
    changes = settings(steps, batch, workers, prepared=sys.argv[5] == "1")
    if not case.startswith(("plain", "idle")):
        aligned(case, folder, changes)
        return 0
    arguments: Any = (configs.load("tiny", changes), folder)
    with idle_ray(OF_TRAIN_AND_DATA) if case.startswith("idle") else nullcontext():
        if workers > 1:
            torch.multiprocessing.spawn(plain, arguments, workers)
        else:
            plain(0, *arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
