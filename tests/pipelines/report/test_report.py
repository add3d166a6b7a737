"""Grid, curves and page: what is shown is what was measured, and the page stands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from didr_core.evaluate.paired import Bootstrap
from didr_core.evaluate.scores import Scores
from pipelines.report import figures
from pipelines.report.figures import running_mean, save_curves, save_grid
from pipelines.report.page import read_history, steps_told, write_report

CAPTIONS = ["a red circle", "two blue rings on a white background that goes on and on and on", "x" * 90]


def pictures(value: float, size: int = 32) -> torch.Tensor:
    return torch.full((3, 3, size, size), value)


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    aligned, start = rng.normal(1.0, 1.0, (1, 2, 40)), rng.normal(0.0, 1.0, (1, 2, 40))
    arrays = {"start": {"judge": start, "strict": start > 0}, "aligned": {"judge": aligned, "strict": aligned > 0}}
    models = {name: {"steps": 1} for name in arrays}
    scores = Scores.build(models, arrays, [str(i) for i in range(40)], [0, 1], facts={"commands": ["didr evaluate r"]})
    scores.write(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "<b>run</b>", "seed": 3, "backbone": {"name": "sdxl"}}))
    (folder / "run.json").write_text(json.dumps({"command": "didr align --set a=<script>", "commit": "0123abcd"}))
    rows = [
        {"step": s, "time": 1.0, "reward/gain": s / 10, "loss/assistant": 0.2, "time/step": 2.0} for s in range(1, 31)
    ]
    for row in rows[10:]:  # the first ten are the assistant's warm-up
        row["loss/generator"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "alarms.jsonl").write_text(json.dumps({"step": 7, "alarm": "drs-silent"}) + "\n")
    save_grid({"start": pictures(0.2), "aligned": pictures(0.8)}, CAPTIONS, folder / "grid.png")
    (folder / "export").mkdir()
    (folder / "export" / "model_index.json").write_text("{}")
    return folder


def test_grid_shows_every_picture_in_its_place(tmp_path: Path) -> None:
    path = save_grid(
        {"start": pictures(0.2), "aligned": pictures(0.8), "teacher": pictures(0.5)},
        CAPTIONS,
        tmp_path / "g.png",
        title="now",
    )
    shown = np.asarray(Image.open(path).convert("L"))
    for value in (51, 204, 128):
        area = (np.abs(shown.astype(int) - value) <= 1).sum()
        assert area == pytest.approx(3 * 160 * 160, rel=0.06), f"three pictures of grey {value}, five times enlarged"
    columns = [np.flatnonzero((shown == v).any(0)).min() for v in (51, 204)]
    assert columns[0] < columns[1], "before stands left of after"


def test_small_pictures_are_enlarged_without_blur_and_large_ones_shrunk(tmp_path: Path) -> None:
    checker = torch.zeros(1, 3, 32, 32)
    checker[..., ::2, ::2] = 1
    tile = np.asarray(figures._tile(checker[0]))
    assert tile.shape == (160, 160, 3) and set(np.unique(tile)) == {0, 255}
    assert figures._tile(torch.rand(3, 1024, 768)).size == (240, 320)


def test_grid_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    for rows, captions in (
        ({}, CAPTIONS),
        ({"start": pictures(0.1)}, CAPTIONS[:2]),
        ({"start": pictures(0.1)[:0]}, []),
    ):
        with pytest.raises(ValueError, match="save_grid"):
            save_grid(rows, captions, tmp_path / "g.png")


def test_curves_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    history = [{"step": s, "loss/assistant": 0.3, "grad/generator": None} for s in range(1, 4)]
    one = Image.open(save_curves(history, tmp_path / "one.png"))
    rows = [
        {"step": s, "reward/gain": s, "reward/raw": s, "loss/assistant": 1.0, "drs/ratio": 0.1} for s in range(1, 90)
    ]
    four = Image.open(save_curves(rows, tmp_path / "four.png", [{"step": 3, "alarm": "x"}]))
    assert four.width > 2 * one.width and four.height > 1.8 * one.height
    with pytest.raises(ValueError, match="no known metric"):
        save_curves([{"step": 1, "time": 3.0}], tmp_path / "none.png")


def test_running_mean_keeps_level_and_length() -> None:
    assert np.allclose(running_mean(np.full(20, 3.0), 4), 3.0)
    assert running_mean(np.array([1.0]), 5).tolist() == [1.0]
    values = np.arange(10.0)
    assert running_mean(values, 1)[5] == 5.0 and running_mean(values, 1)[0] == 0.5


def test_page_stands_alone_and_says_what_was_measured(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r")
    page = write_report(run).read_text()
    assert not re.search(r"""(src|href)=(?!["']?data:)""", page) and "http" not in page and "@import" not in page
    assert page.count("data:image/png;base64,") == 2, "grid and curves"
    judge = next(p for p in json.loads((run / "scores.json").read_text())["pairs"])["measures"]["judge"]["wins"]
    assert f"<b>{100 * judge['mean']:.0f} %</b>" in page and f"{100 * judge['mean']:.1f} %" in page
    for part in ("0123abcd", "didr evaluate r", "drs-silent", "timesteps=[399]", "r/export", "+2.95 sd", "30</b>"):
        assert part in page, part
    assert str(tmp_path) not in page, "no paths of this machine"


def test_a_control_that_is_kept_as_numbers_has_no_pictures_and_the_page_says_so(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r")
    tree = yaml.safe_load((run / "config.yaml").read_text()) | {"evaluation": {"control": "world://control.json"}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    told = "control has no pictures"
    assert told not in write_report(run).read_text(), "it has no row either"
    scores = json.loads((run / "scores.json").read_text())
    scores["models"]["control"] = scores["models"]["start"]
    (run / "scores.json").write_text(json.dumps(scores))
    assert told in write_report(run).read_text()
    (run / "config.yaml").write_text(yaml.safe_dump(tree | {"evaluation": {"control": "runs/control"}}))
    assert told not in write_report(run).read_text()


def test_page_escapes_what_users_wrote(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path / "r")).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<b>run</b>" not in page and "&lt;b&gt;run&lt;/b&gt;" in page


def test_a_run_without_results_still_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    page = write_report(folder).read_text()
    for part in ("No grid was made", "Not scored", "No step has been logged", "Not exported yet"):
        assert part in page, part
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "loss/assistant": 0.5}\n{"step": 2, "ti')
    assert [row["step"] for row in read_history(folder)] == [1], "a line cut by a kill is left out"
    assert "training curves" in write_report(folder).read_text()


def test_table_numbers_are_the_bootstrap_of_the_values(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r")
    scores = Scores.read(run)
    expected = Bootstrap(40).means(scores.arrays["aligned"]["judge"])[0]
    assert f"{expected:.3f}" in write_report(run).read_text()


def words(page: str) -> str:
    """What a reader sees of a page, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("</style>")[2]))


def test_the_verdict_and_tiles_carry_their_intervals_and_say_what_fell(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r")
    tree = json.loads((run / "scores.json").read_text())
    measures = tree["pairs"][0]["measures"]
    measures["diversity"] = {"difference": {"mean": -0.5, "low": -0.8, "high": -0.2}}
    measures["judge"]["wins"] = {"mean": 0.75, "low": 0.25, "high": 1.0}
    (run / "scores.json").write_text(json.dumps(tree))
    text = words(write_report(run).read_text())
    assert "75 % (25 to 100) against the generator it started from, its mean +" in text and ": no clear winner" in text
    assert "75 % 25 to 100 wins against the start, held-out judge" in text
    assert "Worse than the start beyond the interval: diversity over seeds -0.500 (-0.800 to -0.200)." in text
    assert "95 % intervals, 40 held-out prompts" in text
    assert "Strict accuracy: share of pictures with every fact" in text and "True utility" not in text, "what is shown"


def test_warm_up_is_told_from_updates_and_the_time_is_the_whole_runs(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r")
    assert steps_told(read_history(run)) == "30 steps: 10 of assistant warm-up, 20 generator updates"
    assert steps_told([{"loss/generator": 1.0}] * 3) == "3 steps: 3 generator updates"
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"status": "finished", "seconds": 4000.0, "since": 1.0}))
    text = words(write_report(run).read_text())
    assert "30 steps: 10 of assistant warm-up, 20 generator updates, 2.00 s each" in text
    assert "1:06:40 in all: 1:00 of steps" in text
    warm = [row for row in read_history(run) if "loss/generator" not in row]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in warm))
    assert "The generator was not trained: all steps were warm-up" in words(write_report(run).read_text())


def test_repeat_it_prints_every_command_that_made_the_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r")
    info = json.loads((run / "run.json").read_text())
    again = "didr align --resume r --set train.steps=12"
    (run / "run.json").write_text(json.dumps(info | {"command": "didr align --recipe tiny", "resumed": [again]}))
    assert f"<pre>didr align --recipe tiny\n{again}\ndidr evaluate r</pre>" in write_report(run).read_text()


def test_page_is_made_for_dark_narrow_and_paper(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path / "r")).read_text()
    for media in ("(prefers-color-scheme: dark)", "(max-width:640px)", "print"):
        assert f"@media {media} {{" in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>') == 3, "each in a box that scrolls"
    widths = [int(w) for w in re.findall(r"--wide:(\d+)px", page)]
    assert len(widths) == 2 and min(widths) > 600, "captions and curves keep a size that can be read"
