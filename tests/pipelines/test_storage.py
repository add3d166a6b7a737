"""A run whose folder and prompts lie on an S3 server (moto's, on 127.0.0.1): trained, killed, and gone on with from what lies there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from toy import toy_recipe

from didr_core import config as configs
from didr_core.config.files import expanded
from didr_core.data.prompts import PromptIndex
from didr_core.data.storage import Store
from didr_core.train.mirror import OWNER, SUMS
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError
from pipelines.align import align
from pipelines.evaluate import Options, evaluate
from pipelines.sweep import sweep
from pipelines.sweeps.folder import SweepOptions
from tests.pipelines.ray_head import free_ports

ROOT = Path(__file__).resolve().parents[2]
RUN, PROMPTS = "s3://bucket/runs/one", "s3://bucket/prompts"
SETS = ("train.checkpoint_every=5", "train.batch=16", "evaluation.prompts=0", "evaluation.grid=4", "tracking.uri=none")
HOME = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """moto's S3 on a port of its own; what it holds outlives :meth:`stop`."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.start()

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found = Server()
    bucket = urllib.request.Request(f"http://127.0.0.1:{found.port}/bucket", method="PUT")
    urllib.request.urlopen(bucket, timeout=60).close()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def home(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (HOME | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DIDR_CACHE", str(tmp_path / "cache"))


PACED = """
import sys, time
from didr_core.train.learner import Learner
from pipelines.cli.main import main

step = Learner.step
Learner.step = lambda *given: time.sleep(0.4) or step(*given)
main(["align", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_run_survives_a_server_that_is_gone_and_a_kill(server: Server, tmp_path: Path) -> None:
    store = Store("s3://bucket")
    prompts = configs.load("exact_2d").data.prompts
    with expanded(configs.locate(prompts)).open("rb") as file:
        store.put("prompts/shard-0.parquet", file)
    sets = [*SETS, f"data.prompts={PROMPTS}"]
    words = [word for item in (*sets, "train.steps=1000000") for word in ("--set", item)]
    # few steps while the server is gone: what is reached is trained once more, below
    command = [sys.executable, "-c", PACED, "--recipe", "exact_2d", "--local", "--output", RUN, *words]
    log, here = tmp_path / "log", Store(RUN)
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)

    def newest() -> int:
        return max((int(name.split("/")[1][5:]) for name in here.files() if name.endswith(SUMS)), default=0)

    def until(reached: Callable[[], object], seconds: float = 300.0) -> None:
        late = time.monotonic() + seconds
        while not reached():
            assert process.poll() is None and time.monotonic() < late, log.read_text()
            time.sleep(0.1)

    try:
        until(newest)
        server.stop()
        run = RunFolder.at("--output", RUN)
        before = run.last_step()
        until(lambda: "does not answer" in log.read_text())  # when the client inside of pyarrow has given up
        until(lambda: run.last_step() > before)  # training goes on
        server.start()
        until(lambda: newest() > before)
    finally:
        process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert "Traceback" not in log.read_text(), log.read_text()

    shutil.rmtree(run.path)  # as on another machine
    here.delete(OWNER)  # who was killed there is known to be dead
    step = newest()
    resumed = align(resume=RUN, overrides=[f"train.steps={step + 15}"], local=True)
    whole = align("exact_2d", [*sets, f"train.steps={step + 15}"], output=str(tmp_path / "whole"), local=True)
    name = f"checkpoints/step-{step + 15:06d}/{SUMS}"
    assert (here.read(name) or b"").decode() == (whole.path / name).read_text(), "of every tensor, and of state.json"
    assert sorted(int(n.split("/")[1][5:]) for n in here.files() if n.endswith(SUMS)) == resumed.checkpoints()
    assert metrics((here.read("metrics.jsonl") or b"").decode()) == metrics(whole.metrics_path.read_text())
    assert json.loads(here.read("run.json") or b"")["status"] == "finished"
    assert {"report.html", "config.yaml", "grid.png", "export/generator.safetensors"} <= here.files().keys()
    assert not [name for name in here.files() if "/." in f"/{name}"], "no lock, no half file"
    with pytest.raises(DIDRError, match="belongs to run 'one'"):
        align("exact_2d", sets, output=RUN, local=True)


def metrics(text: str) -> list[dict[str, float]]:
    rows = map(json.loads, text.splitlines())
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


def test_an_endpoint_in_the_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyarrow writes it: endpoint and keys hold for every shard, and are in none of their names."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = f"?endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1"
    for number, text in enumerate(("a cat", "a dog")):
        Store(f"s3://k:topsecret@bucket/texts{options}").put(f"{number}.txt", text.encode())
    index = PromptIndex.open(f"s3://k:topsecret@bucket/texts{options}")
    assert [prompt.prompt for prompt in index.first(2)] == ["a cat", "a dog"]
    assert index.shards == ("s3://bucket/texts/0.txt", "s3://bucket/texts/1.txt")
    with pytest.raises(DIDRError, match="no such file or folder"):
        PromptIndex.open(f"s3://k:topsecret@bucket/nothing{options}")


@pytest.mark.slow
def test_an_evaluation_at_an_address_goes_on_on_another_machine(server: Server, tmp_path: Path) -> None:
    """Which has none of its files, and finds all but one block there."""
    recipe = toy_recipe(tmp_path, tracking={"uri": "none"})
    asked, store = Options(["start"], str(recipe), count=4, batch=2, seeds=1), Store("s3://bucket/contest")
    out = evaluate(asked, "s3://bucket/contest", local=True)
    scores = (out / "scores.npz").read_bytes()
    assert store.read("scores.npz") == scores and {"report.html", "scores.json"} <= store.files().keys()
    kept, lost = sorted(name for name in store.files() if name.startswith("scores/"))
    store.delete(lost)
    before = store.version(kept), store.files().keys()
    shutil.rmtree(tmp_path / "cache")
    assert (evaluate(asked, "s3://bucket/contest", local=True) / "scores.npz").read_bytes() == scores
    assert store.version(lost)[0] > 0 and (store.version(kept), store.files().keys() - {lost}) == before


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match="s3://nobucket/run'.* cannot be used .*AWS_ACCESS_KEY_ID"):
        align("exact_2d", SETS, output="s3://nobucket/run", local=True)
    with pytest.raises(DIDRError, match="Expected s3, gs, abfs"):
        align("exact_2d", SETS, output="ftp://host/run", local=True)
    with pytest.raises(DIDRError, match="--out='s3://nobucket/contest': this storage"):
        evaluate(Options(["start"], "exact_2d"), "s3://nobucket/contest", local=True)
    with pytest.raises(
        DIDRError, match="output='s3://bucket/runs': expected a folder on a file system.*mount the bucket"
    ):
        sweep(SweepOptions(space="smoke"), output="s3://bucket/runs")
    assert os.listdir(tmp_path) == []
