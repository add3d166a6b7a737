"""Whatever a user may hand in, damaged or senseless: it is taken, or refused with an error of ours, and no folder is half made.

Some hundred examples of each by default, always the same; `DIDR_FUZZ=200 pytest tests/test_fuzz.py` looks at 200 times as
many new ones (15 minutes).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from didr_core import config as configs
from didr_core.config.load import _known_keys
from didr_core.data.prompts import PromptIndex, open_prompts
from didr_core.evaluate.finish import export
from didr_core.evaluate.models import Folder, Model, Sampling, parse
from didr_core.export.sample import trained_generator
from didr_core.train import checkpoint
from didr_core.train.loop import train
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError
from pipelines import align as job
from pipelines.evaluate import parse_reward
from pipelines.sweep import _new
from pipelines.sweeps import space
from pipelines.sweeps.folder import SweepOptions

TIMES = float(os.environ.get("DIDR_FUZZ", "1"))
pytestmark = pytest.mark.timeout(1800 * max(1.0, TIMES))


def examples(count: int) -> Callable[[Any], Any]:
    kinds = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=int(count * TIMES),
        derandomize=TIMES <= 1,
        database=None,
        deadline=None,
        suppress_health_check=kinds,
    )


def ours(do: Callable[[], object]) -> None:
    with suppress(DIDRError):
        do()


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["tiny", "didr"])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), v, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(_known_keys()) | st.text(max_size=10)
SECTIONS = st.sampled_from([key for key in _known_keys() if "." not in key])
DAMAGES = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4)


def damaged(data: bytes, damages: list[tuple[int, bytes]], cut: int) -> bytes:
    """``data`` with bytes replaced here and there, and cut short (or not, where ``cut`` is 0)."""
    found = bytearray(data)
    for place, new in damages:
        place %= max(1, len(found))
        found[place : place + len(new)] = new
    return bytes(found[: len(found) - cut % max(1, len(found))])


@examples(60)
@given(
    tree=st.dictionaries(SECTIONS | st.text(max_size=6) | st.integers(), VALUES, max_size=3),
    base=st.sampled_from(["tiny", 3, [], "x"]),
)
def test_recipes_of_any_tree(tmp_path: Path, tree: dict[Any, Any], base: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": base} | tree, allow_unicode=True), encoding="utf-8", errors="replace")
    ours(lambda: configs.load(str(path)))


@examples(100)
@given(text=st.binary(max_size=40) | st.text(alphabet="{}[]:,&*!|>-? \n\t'\"%@`#ab1", max_size=40).map(str.encode))
def test_recipes_of_any_bytes(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    ours(lambda: configs.load(str(path)))


@examples(60)
@given(items=st.lists(st.tuples(KEYS, VALUES.map(lambda v: yaml.safe_dump(v)) | st.text(max_size=10)), max_size=3))
def test_overrides(items: list[tuple[str, str]]) -> None:
    ours(lambda: configs.load("exact_2d", [f"{key}={text}" for key, text in items]))


@examples(60)
@given(
    name=st.text(max_size=12),
    colon=st.sampled_from(["", ":", ":R", ".py:R", "/x.py:R", "..:R", "os:path", "didr_core.types:Batch"]),
)
@pytest.mark.parametrize("key", ["reward.name", "algorithm.name", "drp.estimator"])
def test_plug_ins(key: str, name: str, colon: str) -> None:
    ours(lambda: configs.load("exact_2d", values={key: name + colon}))


KINDS = st.sampled_from(["grid", "choice", "uniform", "loguniform", "x"])
DOMAINS = st.dictionaries(KINDS, st.lists(SCALARS, max_size=3), min_size=1, max_size=1)


@examples(60)
@given(tree=st.dictionaries(KEYS, VALUES | DOMAINS, max_size=3))
def test_spaces(tree: dict[str, Any]) -> None:
    def use() -> None:
        found = space.read("mine", tree)
        for search in ("grid", "random"):
            space.check(found, space.draw(found, search, 3, 0)[:3], "exact_2d", [])
        space.check(found, space.corners(found)[:3], "exact_2d", [])

    ours(use)


@examples(60)
@given(
    text=st.text(max_size=30)
    | st.sampled_from(["def space():\n    return 3", "1 / 0", "def space():\n    raise KeyError(1)", "space = 1"])
)
def test_space_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8", errors="replace")
    ours(lambda: space.find(str(path)))


def shard() -> bytes:
    file = io.BytesIO()
    table = pa.table({"id": [f"p{n}" for n in range(20)], "prompt": [f"a red circle {n}" for n in range(20)]})
    pq.write_table(table, file, row_group_size=8)
    return file.getvalue()


def stream() -> bytes:
    file, table = io.BytesIO(), pa.table({"id": ["a", "b"], "prompt": ["a red circle", "a blue one"]})
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return file.getvalue()


SHARDS = {
    "a.parquet": shard(),
    "a.txt": b"a red circle\n\na blue one\n",
    "a.csv": b'id,prompt\n1,"a ""red"" circle"\n2,b\n',
    "a.tsv": b"id\tPrompt\n1\ta red circle\n",
    "a.json": b'["a red circle", {"id": 3, "prompt": "b"}]',
    "a.jsonl": b'{"prompt": "a red circle"}\n{"prompt": "b", "include": [{"position": ["left of", 0]}]}\n',
    "a.arrow": stream(),
}


@examples(300)
@example(name="a.parquet", damages=[(926, b"\x19")], cut=0)  # a row group of fewer than no rows
@example(name="a.parquet", damages=[(926, b"\x12")], cut=0)  # and of more than there are
@example(name="a.arrow", damages=[(385, b"\x01")], cut=0)  # a buffer of a negative size
@example(name="a.arrow", damages=[(376, b"\x01")], cut=0)  # and a stream that ends in its middle
@given(name=st.sampled_from(list(SHARDS)), damages=DAMAGES, cut=st.integers(0, 400))
def test_shards(name: str, damages: list[tuple[int, bytes]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(damaged(SHARDS[name], damages, cut))

        def use() -> None:
            index = PromptIndex.open(folder)
            list(index.texts())
            index.read(np.arange(25), 0)
            index.first(5)
            assert index.fingerprint

        ours(use)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file({"generator/w": torch.ones(3)}, folder / "generator.0.safetensors")
    save_file({"ema/w": torch.ones(3)}, folder / "ema.0.safetensors")
    (folder / "state.json").write_text('{"layout": 2, "didr": "0.3.0", "extra": {}, "learner": {}}')
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


FILES = ["generator.0.safetensors", "ema.0.safetensors", "state.json", "SHA256SUMS"]


@examples(150)
@given(name=st.sampled_from(FILES), damages=DAMAGES, cut=st.integers(0, 60), summed=st.booleans())
def test_checkpoints(
    written: dict[str, bytes], name: str, damages: list[tuple[int, bytes]], cut: int, summed: bool
) -> None:
    """Damaged after the sums were made; with ``summed``, files of somebody else with right sums."""
    files = dict(written)
    if summed and name in files:
        files[name] = damaged(files[name], damages, cut)
    order = sorted(files, key=lambda file: file == "state.json")
    files["SHA256SUMS"] = "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in order).encode()
    if not summed:
        files[name] = damaged(files[name], damages, cut)
    with tempfile.TemporaryDirectory() as folder:
        step = RunFolder(Path(folder)).checkpoint(1)
        step.mkdir(parents=True)
        for file, data in files.items():
            (step / file).write_bytes(data)
        for part in ("generator", "ema"):
            ours(lambda part=part: checkpoint.read(step, part))  # type: ignore[misc]
        ours(lambda: checkpoint.verify(step))


OPTIONS = st.sampled_from(["steps", "guidance", "timesteps", "scheduler", "size", "dtype", "base", "path"]) | st.text(
    max_size=5
)


@examples(60)
@given(
    head=st.sampled_from(["start", "teacher", "a=", "a=world://generator", "pickscore", "x=hpsv2"])
    | st.text(max_size=12),
    options=st.lists(
        st.tuples(OPTIONS, st.sampled_from(["1", "1/2", "x", "-1", "nan", ""]) | st.text(max_size=4)), max_size=2
    ),
)
def test_models_and_rewards_of_an_evaluation(head: str, options: list[tuple[str, str]]) -> None:
    text, config = ",".join([head, *(f"{key}={value}" for key, value in options)]), configs.load("tiny")
    ours(lambda: parse(text, config))
    ours(lambda: parse_reward(text))


@examples(100)
@given(data=st.binary(max_size=40) | st.text(alphabet='{}[]":,01 \nprompt', max_size=40).map(str.encode))
def test_manifests_of_ready_pictures(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(data)
    ours(lambda: Folder(Model("ready", str(tmp_path), "pictures", Sampling()), ["prompt"], [0]))


def whole_or_absent(do: Callable[[], object], folder: Path, *files: str) -> None:
    """``do`` makes ``folder`` with all ``files`` in it, or refuses and leaves neither it nor a part of it behind."""
    try:
        do()
    except DIDRError:
        assert not folder.exists()
    else:
        assert [name for name in files if not (folder / name).is_file()] == []
    assert list(folder.parent.glob(f".{folder.name}.*")) == []


@examples(25)
@example(items=[("data.prompts", "/")])
@given(items=st.lists(st.tuples(KEYS, VALUES.map(yaml.safe_dump) | st.text(max_size=10)), min_size=1, max_size=2))
def test_refused_runs_leave_no_folder(items: list[tuple[str, str]]) -> None:
    """A run that cannot start: nothing of it is there. What would train is not trained here."""
    overrides = [*(f"{key}={text}" for key, text in items), "tracking.uri=none", "device=cpu"]
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        for name in ("train_and_finish", "write_report", "print_summary"):
            patch.setattr(job, name, lambda *_, **__: None)
        run = Path(home) / "run"
        words: dict[str, Any] = {"output": str(run), "local": True}
        whole_or_absent(lambda: job.align("exact_2d", overrides, **words), run, "run.json", "config.yaml")


@examples(25)
@given(tree=st.dictionaries(KEYS, VALUES | DOMAINS, max_size=2), name=st.text(max_size=8))
def test_refused_sweeps_leave_no_folder(tree: dict[str, Any], name: str) -> None:
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "find", lambda _: space.read("mine", tree))
        options = SweepOptions(recipe="exact_2d", trials=2, name=name, overrides=["tracking.uri=none"])
        folder = Path(home) / "out"
        ours(lambda: _new(options, str(folder)))
        made = [path.parent for path in folder.rglob("*") if path.name in ("sweep.json", "config.yaml")]
        assert all((path / "sweep.json").is_file() and (path / "config.yaml").is_file() for path in made)
        assert made or not list(folder.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = configs.load("exact_2d", ["train.steps=1", "train.batch=4", "tracking.uri=none"])
    run = RunFolder.create(config, str(tmp_path_factory.mktemp("trained") / "run"))
    train(config, run, open_prompts(config))
    return run


@examples(40)
@given(choice=st.integers(0, 99), damages=DAMAGES, cut=st.integers(0, 60))
def test_exports_of_damaged_runs(trained: RunFolder, choice: int, damages: list[tuple[int, bytes]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as home:
        run = RunFolder(Path(shutil.copytree(trained.path, Path(home) / "run")))
        files = sorted(path for path in run.path.rglob("*") if path.is_file())
        file = files[choice % len(files)]
        file.write_bytes(damaged(file.read_bytes(), damages, cut))

        def use() -> None:
            config = run.config()
            backbone, network, _ = trained_generator(config, run)
            export(config, run, backbone, network, Path(home) / "export")

        whole_or_absent(use, Path(home) / "export", "model_index.json", "README.md", "config.yaml")


@examples(100)
@given(data=st.binary(max_size=60) | st.text(alphabet='{}[]":,0123 \nstep', max_size=40).map(str.encode))
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl"])
def test_files_of_a_run(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    run = RunFolder(tmp_path)
    ours({"run.json": run.info, "config.yaml": run.config, "metrics.jsonl": lambda: read_lines(run.metrics_path)}[name])
