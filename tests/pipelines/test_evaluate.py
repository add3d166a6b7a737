"""`didr evaluate` from end to end: killed and gone on with, through Ray, and the page it leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy import toy_recipe

from didr_core.types import DIDRError
from pipelines.evaluate import Options, evaluate

ROOT = Path(__file__).resolve().parents[2]
PACED = """
import sys, time
from didr_core.evaluate.contest import Hand
from pipelines.cli.main import main

judge = Hand.judge
Hand.judge = lambda *given: judge(*given) or time.sleep(0.5)
main(["evaluate", *sys.argv[1:]])
"""
MODELS = ["start", "aligned=world", "teacher,steps=2"]
pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"), tracking={"uri": "", "experiment": "didr"})


def options(recipe: Path, **more: object) -> Options:
    models = ["start", "aligned=" + str(recipe.parent / "pipeline") + ",steps=1,guidance=0", "teacher,steps=2"]
    return Options(models, str(recipe), batch=2, seeds=2, **more)  # type: ignore[arg-type]


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "scores.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing happens to, in this process."""
    return evaluate(
        options(recipe, command="didr evaluate <b>"), str(tmp_path_factory.mktemp("whole") / "out"), local=True
    )


def test_killed_and_gone_on_with_nothing_is_scored_twice(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = [word for text in options(recipe).models for word in ("--model", text)]
    words = ["--recipe", str(recipe), *models, "--batch", "2", "--seeds", "2", "--out", str(out), "--local"]
    words += ["--set", "tracking.uri=none"]
    command = [sys.executable, "-m", "pipelines.evaluate", *words]
    paced = [sys.executable, "-c", PACED, *command[3:]]  # or it might be over before it is killed
    killed = subprocess.Popen(paced, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 900
    while len(list(out.glob("scores/*/[!.]*.parquet"))) < 3:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet") if not path.name.startswith(".")}
    assert not (out / "scores.json").exists() and 3 <= sum("/scores/" in str(p) for p in before) < 12
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"evaluation .*: \d+ of 48 pictures are scored", done.stderr) and "ETA" in done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    expected, got = arrays(whole), arrays(out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_page_stands_alone_and_shows_what_was_measured(whole: Path) -> None:
    page, tree = (whole / "report.html").read_text(), json.loads((whole / "scores.json").read_text())
    assert not re.search(r"""(src|href)=(?!["']?data:)""", page) and "http" not in page
    assert "didr evaluate &lt;b&gt;" in page and str(whole.parent) not in page
    reward = tree["models"]["aligned"]["measures"]["reward"]["mean"]
    wins = next(p for p in tree["pairs"] if (p["a"], p["b"]) == ("aligned", "teacher"))["measures"]["reward"]["wins"]
    assert f"{reward:.3f}" in page and f"{100 * wins['mean']:.1f}" in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("</style>")[2]))
    for part in (
        "Side by side",
        "Worst of aligned",
        "Best of aligned",
        "By training reward",
        "LCMScheduler",
        "8 prompts × 2",
    ):
        assert part in text, part
    assert page.count("<figure>") == 3 * (8 + 4 + 4), "three models beside each other: the first prompts, worst, best"
    for media in ("(prefers-color-scheme: dark)", "(max-width:640px)", "print"):
        assert f"@media {media} {{" in page


def test_pictures_that_are_there_become_sets_and_layouts(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole / "pictures", out / "pictures")
    evaluate(options(recipe, real="teacher", layouts=("plain",)), str(out), local=True)
    tree = json.loads((out / "scores.json").read_text())
    laws = tree["laws"]
    assert (laws["real"], laws["features"]) == ("teacher", "reward") and list(laws["models"]) == [
        "start",
        "aligned",
    ]
    assert f"{laws['models']['aligned']['fid']:.4g}" in (out / "report.html").read_text()
    assert "feature_diversity" in tree["models"]["start"]["measures"]
    assert len(list((out / "layouts" / "plain" / "aligned").glob("*.png"))) == 16
    for wrong, said in (
        ({"real": "nobody"}, "--real 'nobody'.*start, aligned, teacher"),
        ({"features": "judge"}, "--features judge: expected a reward with picture features, reward"),
        ({"real": "start", "rewards": ["toy:Opaque,bad=x"]}, "--features .*none of these has them"),
        ({"layouts": ("geneval",)}, "has no tag, include"),
        ({"layouts": ("hps",)}, "layout 'hps': expected one of plain"),
    ):
        with pytest.raises(DIDRError, match=said):
            evaluate(options(recipe, **wrong), str(tmp_path / "wrong"), local=True)
    assert not (tmp_path / "wrong").exists()


def test_mlflow_keeps_one_run_a_folder(recipe: Path, whole: Path) -> None:
    from mlflow import MlflowClient

    run_id = json.loads((whole / "mlflow.json").read_text())["run_id"]
    evaluate(options(recipe), str(whole), local=True)
    assert json.loads((whole / "mlflow.json").read_text())["run_id"] == run_id
    client = MlflowClient(f"sqlite:///{whole.parent / 'mlflow.db'}")
    assert {"report.html", "scores.json"} <= {file.path for file in client.list_artifacts(run_id)}
    mean = json.loads((whole / "scores.json").read_text())["models"]["teacher"]["measures"]["reward"]["mean"]
    assert client.get_run(run_id).data.metrics["teacher/reward"] == mean


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_generator_and_reward_actors_find_the_same(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = evaluate(options(recipe), str(tmp_path / "out"))
    expected, got = arrays(whole), arrays(out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
