"""The scaling benchmark: formulas against values by hand, the simulation where the answer is known, inputs against their sources."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, scaling_calibration, scaling_formulas, scaling_tables
from benchmarks.scaling_simulation import Cluster, simulate
from didr_core import config as configs

INPUTS = scaling_formulas.usual_inputs()
ROWS = json.loads((scaling.RESULTS / "gpu_step.json").read_text())["rows"]
ONE = Cluster(assistant_s=1.0, generator_s=2.0)


def cluster(**changes: Any) -> Cluster:
    return dataclasses.replace(ONE, **changes)


def test_a_ring_sends_twice_what_is_averaged_but_for_ones_own_part() -> None:
    assert scaling_formulas.ring_bytes(800.0, 8) == 2 * 800 * 7 / 8
    assert scaling_formulas.ring_bytes(800.0, 8, passes=1) == 700
    assert scaling_formulas.ring_bytes(800.0, 1) == 0


def test_averaging_takes_the_slowest_links_time_and_a_latency_for_each_call() -> None:
    given = INPUTS | {"nvlink_gbs": 100, "network_gbs": 10, "hop_us": 10, "bucket_mib": 128, "machine_gpus": 8}
    size = 2 * 128 * 2**20
    assert scaling_formulas.collective_s(size, 8, given) == pytest.approx(2 * size * 7 / 8 / 100e9 + 2 * 2 * 3 * 10e-6)
    assert scaling_formulas.collective_s(size, 16, given) == pytest.approx(
        2 * size * 15 / 16 / 10e9 + 2 * 2 * 4 * 10e-6
    )
    assert scaling_formulas.collective_s(size, 1, given) == 0


def test_what_split_networks_send_counts_only_where_it_outlasts_the_passes() -> None:
    model = {"adapter_parameters": [0, 0], "split_parameters": 10**9}
    given = INPUTS | {"nvlink_gbs": 1, "hop_us": 0}
    gather, scatter = 2 * 7 / 8, 4 * 7 / 8  # seconds for 1e9 bfloat16 and float32 numbers at 1 GB/s
    assert scaling_formulas.averaging(model, 8, (100.0, 100.0, 3), given) == (0, 0)
    assert scaling_formulas.averaging(model, 8, (1.0, 2.0, 3), given) == pytest.approx(
        (3 * gather - 1, 3 * (2 * gather + scatter) - 2)
    )


def test_a_call_waits_for_what_its_window_does_not_hide() -> None:
    assert scaling_formulas.exposed_s(0.5, 0.25, 0.5, overlap=True) == 0.25
    assert scaling_formulas.exposed_s(0.5, 0.25, 0.5, overlap=False) == 0.75
    assert scaling_formulas.exposed_s(0.125, 0.25, 0.5, overlap=True) == 0


@pytest.mark.parametrize(
    ("reward", "actors"),
    [(0.25, 32), (0.3, 64), (0.5, 64), (0.75, 128), (1.0, 128), (2.1, None)],
)
def test_reward_actors_that_hide_a_call(reward: float, actors: int | None) -> None:
    """0.5 s to spare: two calls of 0.25 s in a row, one of 0.3 s; what is longer is shared by up to four, a picture each."""
    assert scaling_formulas.actors_to_hide(64, reward, transfer_s=0.25, window_s=0.75, pictures=4) == actors
    assert scaling_formulas.actors_to_hide(64, reward, transfer_s=0.75, window_s=0.75, pictures=4) is None


def test_with_the_actors_that_hide_a_call_the_simulation_waits_for_none() -> None:
    settings = {"workers": 8, "before": 0.4, "window": 0.5, "transfer_s": 0.25, "pictures": 4}  # window: 1 s
    for reward in (0.25, 0.7, 1.4):
        least = scaling_formulas.actors_to_hide(8, reward, 0.25, 1.0, 4)
        assert least is not None
        assert simulate(cluster(**settings, reward_s=reward, reward_actors=least)).step_s == pytest.approx(7.0)
        if least % 8:  # fewer would be shared otherwise, too
            assert simulate(cluster(**settings, reward_s=reward, reward_actors=least - 1)).step_s > 7.01


def test_one_worker_takes_the_sum_of_its_phases() -> None:
    alone = cluster(reward_s=0.25, micro_batches=2, assistant_averaging_s=0.5, generator_averaging_s=0.125)
    out = simulate(alone)
    whole = 5 * (1 + 0.5) + 2 + 2 * 0.25 + 0.125
    assert out.step_s == pytest.approx(whole)
    assert out.shares["passes"] == pytest.approx(7 / whole)
    assert out.shares["reward"] == pytest.approx(0.5 / whole)
    assert out.shares["averaging"] == pytest.approx(2.625 / whole)
    assert sum(out.shares.values()) == pytest.approx(1)


def test_a_pool_that_is_asked_for_more_than_it_can_paces_training() -> None:
    """Nothing but calls: 16 workers at 2 s on 4 actors. Below its limit each waits for its own call alone."""
    calls = cluster(assistant_updates=0, generator_s=0.0, reward_s=2.0, workers=16)
    busy = simulate(dataclasses.replace(calls, reward_actors=4, steps=40))
    assert busy.step_s == pytest.approx(16 * 2 / 4)
    assert busy.busy["reward pool"] == pytest.approx(1.0, abs=0.02)
    idle = simulate(dataclasses.replace(calls, reward_actors=16, generator_s=6.0, overlap=False))
    assert idle.step_s == pytest.approx(6 + 2)
    assert idle.busy["reward pool"] == pytest.approx(2 / 8)
    one = simulate(dataclasses.replace(calls, workers=1, reward_actors=1, generator_s=6.0, overlap=False))
    assert one.step_s == pytest.approx(idle.step_s)


def test_two_actors_for_each_worker_halve_a_call() -> None:
    calls = cluster(assistant_updates=0, generator_s=0.0, reward_s=2.0, workers=4, pictures=2)
    assert simulate(dataclasses.replace(calls, reward_actors=4)).step_s == pytest.approx(2.0)
    assert simulate(dataclasses.replace(calls, reward_actors=8)).step_s == pytest.approx(1.0)
    assert simulate(dataclasses.replace(calls, reward_actors=12)).step_s == pytest.approx(1.0)  # two pictures


def test_the_slowest_prompt_stage_paces_training_or_nobody_waits_for_it() -> None:
    """Stages in a row overlap: neither their sum nor, while it is faster than training, any of them shows."""
    assert simulate(cluster(workers=3, stages_s=(3.0, 6.5))).step_s == pytest.approx(7.0)
    assert simulate(cluster(workers=3, stages_s=(3.0, 9.0))).step_s == pytest.approx(9.0)
    slow = simulate(cluster(workers=3, stages_s=(9.0, 3.0)))
    assert slow.step_s == pytest.approx(9.0)
    assert slow.shares["prompts"] == pytest.approx(2 / 9)


def test_the_further_prompts_are_ahead_the_less_their_jitter_shows() -> None:
    """A stage as fast as training, with jitter in both: waiting falls with the buffer."""
    bursty = cluster(stages_s=(7.0,), steps=100, jitter=0.3)
    waits = [simulate(dataclasses.replace(bursty, buffer=n)).shares["prompts"] for n in (1, 2, 8)]
    assert waits[0] > waits[1] > waits[2]


def test_a_checkpoint_costs_its_copy_until_its_writing_outlasts_the_steps_between() -> None:
    often = cluster(checkpoint_every=3, copy_s=0.5)
    assert simulate(dataclasses.replace(often, write_s=20.0)).step_s == pytest.approx(7 + 0.5 / 3)
    # 21 s of steps between two: at 30 s of writing the next one waits 9 s
    assert simulate(dataclasses.replace(often, write_s=30.0)).step_s == pytest.approx((30 + 0.5) / 3)


def test_all_wait_for_the_slowest_and_the_more_the_longer() -> None:
    steps = [simulate(cluster(workers=n, jitter=0.05, steps=40)).step_s for n in (1, 2, 8, 64)]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(7.0, rel=0.02)
    # the larger of two normal draws is sd / sqrt(pi) above their mean
    assert steps[1] == pytest.approx(7.0 * (1 + 0.05 / math.sqrt(math.pi)), rel=0.02)


def test_a_seed_decides_everything() -> None:
    noisy = cluster(workers=8, jitter=0.05, reward_actors=3, reward_s=0.5, stages_s=(3.0, 5.0))
    assert simulate(noisy) == simulate(noisy)
    assert simulate(noisy) != simulate(dataclasses.replace(noisy, seed=1))


@pytest.mark.parametrize("kind", scaling_formulas.KINDS)
@pytest.mark.parametrize("rate", scaling_formulas.RATES)
@pytest.mark.parametrize("model", scaling_formulas.MODELS)
def test_more_gpus_make_more_pictures_and_are_used_less_well(model: str, rate: str, kind: str) -> None:
    cases = [scaling.case_of(model, rate, kind, n, INPUTS, ROWS) for n in (1, 8, 64)]
    made, used = ([getattr(case, what) for case in cases] for what in ("pictures_a_s", "efficiency"))
    assert made == sorted(made)
    assert used == sorted(used, reverse=True) and used[-1] > 0.8 and used[0] <= 1.001
    assert all(case.pictures_a_s * case.step_s == pytest.approx(case.batch) for case in cases)


def test_rent_is_gpus_times_hours_times_price() -> None:
    case = scaling.case_of("zimage", "goal", "batch", 8, INPUTS | {"gpu_dollars": 3.0}, ROWS)
    assert case.hours == pytest.approx(2000 * case.step_s / 3600)
    assert case.dollars == pytest.approx(case.hours * (8 + 1) * 3)  # a GPU for the actors' 0.7
    assert case.dollars_a_1000 == pytest.approx(case.dollars / (2000 * 128) * 1000)
    assert scaling.case_of("zimage", "goal", "batch", 256, INPUTS, ROWS).workers == 128


def test_measured_seconds_are_those_of_one_micro_batch() -> None:
    found = scaling_formulas.measured_passes(ROWS, "zimage")
    row = next(r for r in ROWS if r["name"] == "zimage micro 1, as first measured")  # 2 pictures, 2 TA updates
    assert 2 * (2 * found[1][0] + found[1][1]) == pytest.approx(row["s_per_update"], rel=0.01)
    assert scaling_formulas.passes(scaling_formulas.MODELS["zimage"], "measured", 16, INPUTS, found) == (
        pytest.approx(16 * found[1][0]),
        pytest.approx(16 * found[1][1]),
        16,
    )


@pytest.mark.parametrize("model", scaling_formulas.MODELS)
def test_what_is_called_planned_or_a_recipes_is(model: str) -> None:
    known = scaling_formulas.MODELS[model]
    plans = json.loads((scaling.RESULTS / "gpu_step_plans.json").read_text())
    row = known["plan"]
    tflop = row["updates"] * sum(known["assistant"].values()) + sum(known["generator"].values())
    assert row["pictures"] * tflop == pytest.approx(plans[f"full: {row['row']}"]["tflop"], rel=1e-4)
    recipe = configs.load(f"{model}_8gpu")
    assert recipe.train.batch == INPUTS["batch"] and recipe.sizes.share == INPUTS["share"]
    assert (
        recipe.train.steps == INPUTS["iterations"]
        and recipe.train.checkpoint_every == scaling_formulas.CHECKPOINT_EVERY
    )
    assert recipe.sizes.assistant_updates == scaling_formulas.ASSISTANT_UPDATES
    assert recipe.roles.fsdp == (known["split_parameters"] > 0)
    assert recipe.workers.rewards * recipe.workers.reward_gpus / recipe.workers.train == known["actor_share"]
    assert recipe.baseline.samples == 2  # pictures of the start a prompt, in `prompt_s`


def test_the_simulation_is_held_to_two_measured_workers() -> None:
    """The committed measurement: within a fifth of the step that two processes took."""
    made = json.loads((scaling.RESULTS / "scaling.json").read_text())["calibration"]
    assert 0.8 <= made["predicted from side by side"]["ratio"] <= 1.2
    averaging = (made["averaging"][0], made["averaging"][1])
    again = scaling_calibration.predict((made["side by side"][0], made["side by side"][1]), averaging, made["jitter"])
    assert again == pytest.approx(made["predicted from side by side"]["step_s"])


def test_a_burst_is_no_jitter() -> None:
    draw = random.Random(0)
    steady = [draw.gauss(2.0, 0.1) for _ in range(400)]
    assert scaling_calibration.spread(steady) == pytest.approx(0.05, rel=0.1)
    assert scaling_calibration.spread([*steady, 90.0]) == pytest.approx(scaling_calibration.spread(steady), rel=0.02)


def test_tables_are_written_with_and_without_a_calibration(tmp_path: Path) -> None:
    report = json.loads((scaling.RESULTS / "scaling.json").read_text())
    assert scaling_tables.markdown(report) == (scaling.RESULTS / "scaling.md").read_text()
    assert "Not measured yet" in scaling_tables.markdown(report | {"calibration": None})
    changed = report | {"inputs": report["inputs"] | {"gpu_dollars": 2.0}}
    assert "| `gpu_dollars` | 2 US dollars an hour | given (usually 2.5) |" in scaling_tables.markdown(changed)


def test_the_page_for_planners_says_what_the_tables_say() -> None:
    report = json.loads((scaling.RESULTS / "scaling.json").read_text())
    page = Path("docs/scaling.md").read_text()
    for case in report["cases"]:
        if case["kind"] == "batch" and case["gpus"] <= 128:
            row = next(line for line in page.splitlines() if line.startswith(f"| {case['gpus']} | `_"))
            assert f"| {scaling_tables.number(case['hours'])}, {case['dollars']:,.0f} |" in row
    for row in report["remote"]:
        assert f"| {row['faster']['overlapped']:.3f}x | {row['faster']['in turn']:.3f}x | {row['actors']}" in page
    assert f"the host alone needs {report['host_floor_s']:.1f} s" in page


def test_an_unknown_input_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--set", "gpu_dollar=2"])
    assert "gpu_dollar=2: no input of that name; there are: peak_tflops" in capsys.readouterr().err
