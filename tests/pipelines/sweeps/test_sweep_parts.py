"""The parts of a sweep without Ray: shared batches, a trial in legs and after a kill, its worth, arithmetic, searches."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy_sweep import STEPS, do, new

from didr_core import config as configs
from didr_core.data.prompts import PromptIndex
from didr_core.train import checkpoint
from didr_core.train.loop import loop, train
from didr_core.train.run_folder import RunFolder, read_lines
from didr_core.types import DIDRError, NonFiniteError
from pipelines import sweep
from pipelines.cluster.resources import ClusterView, Node, NoRoom
from pipelines.sweeps import bench, budget, search, work
from pipelines.sweeps.folder import SweepFolder, SweepOptions
from pipelines.sweeps.monitor import SweepMonitor
from pipelines.sweeps.space import Domain

pytestmark = pytest.mark.slow


def state(run: RunFolder) -> dict[str, Any]:
    return {part: checkpoint.read(run.checkpoint(STEPS), part) for part in ("generator", "ema", "assistant")}


def test_a_trial_killed_between_checkpoints_ends_as_an_undisturbed_training_bit_for_bit(
    swept: SweepFolder, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new(toy, {"drp.beta": {"grid": [0.2, 0.9]}, "drp.steps": 1}, tmp_path)
    number = next(n for n, p in folder.points().items() if p["drp.beta"] == 0.2)
    with monkeypatch.context() as patched:  # a step beyond the checkpoint
        patched.setattr(work, "loop", lambda *args, until: loop(*args, until=until + 1))
        killed = work.legs(folder, number)
        assert next(killed) == {"step": 2}
        killed.close()
    assert [row["step"] for row in read_lines(folder.trial(number).metrics_path)] == [1, 2, 3]
    assert folder.trial(number).checkpoints() == [2]
    assert do(folder, number)["step"] == STEPS
    config = configs.load(str(toy), ["drp.beta=0.2", "workers.train=1", "evaluation.prompts=0"])
    alone = RunFolder.create(config, str(tmp_path / "alone"))
    train(config, alone, PromptIndex.open(config.data.prompts))
    wanted, got = state(alone), state(folder.trial(number))
    for name in ("generator", "assistant", "ema"):
        assert [k for k, v in wanted[name].items() if not torch.equal(v, got[name][k])] == [], name
    assert [row["step"] for row in read_lines(folder.trial(number).metrics_path)] == [1, 2, 3, 4]


def test_a_resumed_sweep_must_have_the_prompts_that_it_began_with(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = new(toy, {"drp.beta": {"grid": [0.2]}}, tmp_path)

    def far_enough(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(sweep, "view_of_this_machine", far_enough)
    with pytest.raises(InterruptedError):
        sweep.sweep(folder.options(), resume=str(folder.path))
    assert len(folder.info()["prompts"]) == 16 and "other versions" not in capfd.readouterr().err
    plan = folder.info()["plan"]
    folder.update(plan=plan | {"facts": {"versions": {"torch": "1.0"}}})
    with pytest.raises(InterruptedError):
        sweep.sweep(folder.options(), resume=str(folder.path))
    assert "began with other versions (torch 1.0 -> " in " ".join(capfd.readouterr().err.split())
    folder.update(prompts="another")
    with pytest.raises(DIDRError, match=f"sweep {folder.path}: data.prompts holds other texts than when it began"):
        sweep.sweep(folder.options(), resume=str(folder.path))


def test_a_half_made_folder_is_made_again(toy: Path, tmp_path: Path) -> None:
    folder = new(toy, {"drp.beta": {"grid": [0.2, 0.9]}}, tmp_path)
    (folder.trial(0).path / "checkpoints").mkdir(parents=True)
    (folder.trial(0).path / "config.yaml").write_text("cut sho")
    with work.opened(folder, 0) as (_, run):
        assert run.info()["status"] == "running"


def test_results_say_what_a_trial_is_worth(swept: SweepFolder) -> None:
    for result in swept.results():
        assert result["status"] == "finished" and result["start_distance"] > 0
        added = result["distance"] - result["start_distance"]
        assert result["score"] == pytest.approx(result["gain"] - added, abs=1e-5)
        assert result["gain_low"] <= result["gain"] <= result["gain_high"]
        assert result["distance_low"] <= result["distance"] <= result["distance_high"]
        logged = sum(row["time/step"] for row in read_lines(swept.trial(result["number"]).metrics_path))
        assert result["train_seconds"] == pytest.approx(logged, abs=0.01)
    scores = json.loads((swept.trial(0).path / "scores.json").read_text())
    assert list(scores["models"]) == ["start", "aligned", "teacher"]


def test_gain_is_the_paired_difference_in_the_starts_deviations(swept: SweepFolder) -> None:
    judge = work.bench_of(swept)
    start = judge.start["judge"]
    worth, measured = judge.judge(judge.evaluator.backbone.load_network("generator"), swept.path / "again", "key")
    assert np.array_equal(measured["judge"], start)  # the same network, captions and noise
    assert worth["gain"] == 0 and worth["distance"] == pytest.approx(judge.own, abs=1e-4) and abs(worth["score"]) < 1e-4
    moved = {**measured, "judge": measured["judge"] + 2 * start.std()}
    assert judge._worth(moved, judge.start, judge.reference, 200)["gain"] == pytest.approx(2, abs=1e-3)


def test_distance_is_in_standard_deviations_of_the_references_features(swept: SweepFolder) -> None:
    judge = work.bench_of(swept)
    features = judge.reference["features"]
    spread = np.sqrt(features.reshape(-1, features.shape[-1]).var(0).sum())
    shift = np.zeros(features.shape[-1], features.dtype)
    shift[0] = 0.5 * spread  # the same law, moved by half its spread
    moved = {**judge.start, "features": features + shift}
    worth = judge._worth(moved, judge.start, judge.reference, 200)
    assert worth["distance"] == pytest.approx(0.5, abs=1e-3)
    assert worth["score"] == pytest.approx(judge.own - 0.5, abs=1e-3)


def test_arithmetic_of_trials_at_once(toy: Path) -> None:
    config = configs.load(str(toy), ["workers.train_gpus=0.5"])
    cluster = ClusterView((Node("a", {"CPU": 8, "GPU": 2}),), local=False)
    assert budget.trials_at_once(config, cluster, 1, 12, None)[0] == 4  # half a GPU each
    whole = configs.load(str(toy), ["workers.train_gpus=1"])
    assert budget.trials_at_once(whole, cluster, 1, 12, None)[0] == 2
    assert budget.trials_at_once(whole, cluster, 1, 1, None)[0] == 1
    with pytest.raises(NoRoom, match="--concurrent"):
        budget.trials_at_once(whole, cluster, 1, 12, 3)
    # two workers each: 2 CPUs, two half-CPU actors and the listing beside them
    many = ClusterView((Node("a", {"CPU": 9}),), local=False)
    at_once, found = budget.trials_at_once(configs.load(str(toy)), many, 2, 12, None)
    assert at_once == 2 and found.demands.totals()["CPU"] == pytest.approx(2 * (0.1 + 2 + 0.5 + 0.5 + 1))


def test_wrong_sweeps_are_refused_at_once(toy: Path, swept: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DIDRError, match="reward is configured"):
        bench.check(configs.load(str(toy), ["judge=null", "reward=null", "algorithm=diff_instruct"]))
    with pytest.raises(DIDRError, match="evaluation.prompts=0"):
        bench.check(configs.load(str(toy), ["evaluation.prompts=0"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DIDRError, match="optuna is not installed"):
        search.need_optuna()
    with pytest.raises(DIDRError, match="that sweep exists"):
        SweepFolder.create(swept.options(), swept.config(), [])
    with pytest.raises(DIDRError, match="Sweeps in .*: s"):
        SweepFolder.find("absent", str(swept.path.parent))


def test_a_diverged_trial_says_why(toy: Path, tmp_path: Path) -> None:
    folder = new(toy, {"generator.lr": {"grid": [1e30, 1e29]}}, tmp_path)
    with pytest.raises(NonFiniteError, match="non-finite"):
        do(folder, 0)
    assert folder.trial(0).info()["status"] == "failed" and "non-finite" in folder.trial(0).info()["message"]


def test_a_trial_that_is_stopped_says_so_and_one_that_is_over_is_not_done_again(
    toy: Path, swept: SweepFolder, tmp_path: Path
) -> None:
    from pipelines.sweeps.trial import Trial

    folder = new(toy, {"drp.beta": {"grid": [0.2, 0.9]}, "drp.steps": 1}, tmp_path)
    actor = Trial({"sweep": str(folder.path), "number": 0})
    reached = actor.step()
    assert (reached["step"], reached["done"]) == (2, False)
    with pytest.raises(DIDRError, match="another process"), folder.trial(0).lock():
        pass
    actor.reset_config({"sweep": str(swept.path), "number": 1})
    info = folder.trial(0).info()
    assert (info["status"], info["message"]) == ("interrupted", "stopped by the sweep")
    with folder.trial(0).lock():  # it is free again
        pass
    known = swept.result(1) or {}
    answer = actor.step()
    assert answer["done"] and (answer["status"], answer["score"]) == ("finished", known["score"])


def test_points_are_those_that_are_missing(swept: SweepFolder) -> None:
    points = search.Points(swept, [0, 1])
    assert points.suggest("a")["number"] == 0
    assert points.suggest("b")["number"] == 1 and points.suggest("c") == search.Searcher.FINISHED
    again = search.Points(swept, [1])  # a driver that comes later
    assert again.suggest("d")["number"] == 1 and again.suggest("e") == search.Searcher.FINISHED


def test_a_resumed_asha_decides_as_the_one_before_would_have(toy: Path, tmp_path: Path) -> None:
    """Killed after any event, with trials over, stopped and under way: all later decisions are the same."""
    steps = ["train.steps=40", "train.assistant_warmup=0", "train.checkpoint_every=5"]
    scores = np.random.default_rng(3).normal(size=(6, 9))
    events = [(n, 5 * k) for k in range(1, 9) for n in range(6)]  # all at once, a checkpoint after the other

    def played(at: Path, killed_after: int | None) -> dict[int, dict[str, Any]]:
        folder = new(toy, {"drp.beta": {"grid": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}}, at, scheduler="asha")
        folder.set_config(configs.recorded(folder.path / "config.yaml", steps))
        asha, trials = search.Asha(folder), {}
        for count, (number, step) in enumerate(events):
            if count == killed_after:
                asha, trials = search.Asha(folder), {}
            if folder.result(number):
                continue
            folder.trial(number).path.mkdir(parents=True, exist_ok=True)
            if number not in trials:
                trials[number] = SimpleNamespace(trial_id=f"{number}-{count}", config={"number": number})
                asha.on_trial_add(None, trials[number])
            result = {"number": number, "step": step, "score": float(scores[number, step // 5])}
            if step == 40:
                folder.end(status="finished", **result)
                asha.on_trial_complete(None, trials[number], result)
            else:
                decision = asha.on_trial_result(None, trials[number], result)
                assert (decision == "STOP") == (folder.result(number) is not None)
        return {r["number"]: {k: r[k] for k in ("status", "step", "score")} for r in folder.results()}

    wanted = played(tmp_path / "whole", None)
    assert {r["status"] for r in wanted.values()} == {"finished", "stopped"}
    for moment in (6, 12, 18, 24):  # between checkpoints: those under way have all been added again
        assert played(tmp_path / str(moment), moment) == wanted


def test_optuna_learns_from_what_has_ended_and_asks_the_same_after_a_resume(toy: Path, tmp_path: Path) -> None:
    tree = {"drp.beta": {"loguniform": [0.05, 1.0]}, "drp.steps": {"choice": [1, 2, 4, 8]}, "drp.estimator": "ode"}
    folder = new(toy, tree, tmp_path, search="optuna", trials=40)
    (folder.path / "points.jsonl").unlink()
    points = search.Points(folder, range(40))
    for number in range(40):
        assert search.ask(folder, number) == search.ask(folder, number)
        assert points.suggest(str(number))["number"] == number
        beta, steps = (folder.points()[number][k] for k in ("drp.beta", "drp.steps"))
        assert 0.05 <= beta <= 1.0 and steps in (1, 2, 4, 8)
        if number == 3:
            folder.end(number, status="failed", reason="NaN", step=1)
        else:  # best by both measures at beta 0.6 and 4 steps
            far = abs(np.log(beta / 0.6)) + 0.5 * (steps != 4)
            folder.end(number, status="finished", gain=-far, distance=far, score=-2 * far, step=4)
    found = folder.points()
    near = [abs(np.log(p["drp.beta"] / 0.6)) + 0.5 * (p["drp.steps"] != 4) for p in found.values()]
    assert np.mean(near[-10:]) < 0.5 * np.mean(near[:10])


def test_a_range_with_ends_of_many_digits_is_never_left(toy: Path, tmp_path: Path) -> None:
    """Optuna refuses the next trial otherwise, and that of every resume."""
    domain = Domain("uniform", (0.123447, 0.123449))
    assert [domain.at(share) for share in (0.0, 0.5, 1.0)] == [0.123447] * 3 and domain.rounded(1) == 0.123449
    folder = new(toy, {"drp.beta": {"uniform": [0.123447, 0.123449]}}, tmp_path, search="optuna", trials=5)
    points = search.Points(folder, range(5))
    for number in range(5):
        points.suggest(str(number))
        folder.end(number, status="finished", gain=1.0, distance=1.0, score=1.0, step=4)
    assert len(folder.points()) == 5


def test_half_a_line_of_a_machine_that_went_down_is_cut_off(swept: SweepFolder, tmp_path: Path) -> None:
    folder = SweepFolder(Path(shutil.copytree(swept.path, tmp_path / "s")))
    before = (folder.path / "glances.jsonl").read_text() if (folder.path / "glances.jsonl").is_file() else ""
    (folder.path / "glances.jsonl").write_text(before + '{"numb')
    folder._append("glances.jsonl", {"number": 4})
    assert (folder.path / "glances.jsonl").read_text() == before + '{"number": 4}\n'


@pytest.mark.parametrize(
    ("tree", "trials"),
    [
        ({"drp.beta": {"loguniform": [0.05, 1.0]}, "drp.steps": {"choice": [1]}}, 2),
        ({"drp.beta": {"grid": [0.2, 0.9]}, "drp.steps": {"grid": [1]}}, 1),
    ],
)
def test_shared_work_does_not_wait_for_points_that_optuna_makes_later(
    toy: Path, tmp_path: Path, tree: dict[str, Any], trials: int
) -> None:
    options = SweepOptions(recipe=str(toy), space=str(tmp_path / "mine.py"), search="optuna", trials=trials, name="s")
    (tmp_path / "mine.py").write_text(f"def space():\n    return {tree}\n")
    folder = sweep._new(options, str(tmp_path / "out"))
    assert folder.points() == {} and folder.options().trials == trials
    assert work.prepare(folder) > 0
    assert folder.points() == {} and folder.missing() == list(range(trials))
    assert search.Points(folder, folder.missing()).suggest("a")["number"] == 0
    assert set(folder.points()[0]) == set(tree)


def test_a_trial_that_an_earlier_driver_followed_gets_its_whole_curve(swept: SweepFolder, tmp_path: Path) -> None:
    """That driver was killed with the last steps in its hands; and one that followed nothing at all."""
    from pipelines.tracking import tracker as tracking

    folder = SweepFolder(Path(shutil.copytree(swept.path, tmp_path / "s")))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with SweepMonitor(folder, uri) as monitor:  # steps 1 and 2 of trial 0 arrive, then it dies
        tracker = monitor._open(0)
        for row in read_lines(folder.trial(0).metrics_path)[:2]:
            tracker.metrics(row["step"], {"time/step": row["time/step"]})
        tracker.flush()  # type: ignore[attr-defined]
    for _ in range(2):  # the second has nothing to do
        with SweepMonitor(folder, uri) as monitor:
            for number in folder.points():
                monitor.settle(number)
    client = tracking.connect(uri)
    for number, run in folder.info()["mlflow"]["trials"].items():
        points = client.get_metric_history(run, "time/step")
        assert [p.step for p in points] == list(range(1, STEPS + 1)), number
        rows = read_lines(folder.trial(int(number)).metrics_path)
        assert [p.value for p in points] == [row["time/step"] for row in rows]


def test_a_lost_trial_that_succeeds_at_last_is_finished_in_mlflow(swept: SweepFolder, tmp_path: Path) -> None:
    from pipelines.tracking import tracker as tracking

    folder = SweepFolder(Path(shutil.copytree(swept.path, tmp_path / "s")))
    uri, result = f"sqlite:///{tmp_path / 'mlflow.db'}", folder.result(0)
    assert result
    folder.end(0, status="lost", reason="died too often")
    with SweepMonitor(folder, uri) as monitor:
        monitor.settle(0)
    folder.forget_lost()
    folder.end(0, **{k: v for k, v in result.items() if k not in ("number", "set")})
    with SweepMonitor(folder, uri) as monitor:
        monitor.settle(0)
    run = tracking.connect(uri).get_run(folder.info()["mlflow"]["trials"]["0"])
    assert run.info.status == "FINISHED" and run.data.tags["didr.status"] == "finished"
    assert run.data.metrics["final/gain"] == pytest.approx(result["gain"])


def test_a_sweep_without_news_gives_up_and_says_how_to_go_on(
    swept: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.sweeps import monitor as monitors

    now = [0.0]
    monkeypatch.setattr(monitors, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    watched = monitors.SweepMonitor(swept, "none")
    assert swept.options().patience == 1.0
    for minute in (0.9, 1.8):
        now[0] = 60 * minute
        watched.on_step_begin(0, [])
        watched.on_trial_result(0, [], None, {})
    now[0] = 60 * 2.9
    with pytest.raises(DIDRError, match=r"no trial moved for 1 minutes.*didr sweep --resume s"):
        watched.on_step_begin(0, [])
    assert type(pickle.loads(pickle.dumps(watched))).__name__ == "Callback"  # as Tune does; it never uses it
