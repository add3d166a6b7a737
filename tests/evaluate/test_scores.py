"""Scoring: paired noise, measures against direct computation, the cache, the world's checker, and files that can be pooled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from didr_core.diffusion import sampling
from didr_core.diffusion.schedule import VariancePreserving
from didr_core.evaluate.contestants import Contestant, fingerprint, one_step_contestant, teacher_contestant
from didr_core.evaluate.evaluator import Evaluator
from didr_core.evaluate.scores import Scores, origin, pool, read_scores, table
from didr_core.types import Condition, DIDRError, NonFiniteError

PROMPTS = [f"prompt {i}" for i in range(7)]


class Toy:
    """A backbone whose answers are known: the condition is the prompt's number, a network is one gain, a picture is a sigmoid."""

    schedule = VariancePreserving.scaled_linear()
    latent_shape: tuple[int, ...] = (3, 8, 8)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, prompts: Sequence[str]) -> Condition:
        return Condition({"number": torch.tensor([[float(p.split()[-1])] for p in prompts])})

    def null(self, like: Condition) -> Condition:
        return like.map(torch.zeros_like)

    def _number(self, condition: Condition) -> Tensor:
        return condition.tensors["number"].view(-1, 1, 1, 1)

    def x0(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Denoiser of N(number, 0.25): posterior mean."""
        self.batches.append(len(x))
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in self.schedule.coeffs(t))
        mean = self._number(condition)
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return mean + gain * (x - alpha * mean)

    def generate(self, network: nn.Module, z: Tensor, condition: Condition) -> Tensor:
        return network.weight * z + 0.1 * self._number(condition)

    def decode(self, latent: Tensor) -> Tensor:
        return latent.sigmoid()


class Gain(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(gain))


class Brightness:
    """A reward: mean brightness plus the prompt's number."""

    differentiable = True

    def prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"number": torch.tensor([float(p.split()[-1]) for p in prompts])}

    def score(self, images: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return images.flatten(1).mean(1) + inputs["number"]


def score(
    backbone: Any, models: list[Contestant], prompts: Sequence[str], *, facts: Any = None, **options: Any
) -> Scores:
    return Evaluator(backbone, prompts, options.pop("seeds", (0,)), **options).compare(models, facts=facts)


def contest(**changes: Any) -> Scores:
    toy = Toy()
    models = [one_step_contestant(n, toy, Gain(g)) for n, g in (("start", 0.5), ("aligned", 1.5))]  # type: ignore[arg-type]
    arguments = {"seeds": (0, 1), "reward": Brightness()} | changes
    return score(toy, models, PROMPTS, **arguments)  # type: ignore[arg-type]


def test_noise_depends_on_seed_and_position_alone() -> None:
    whole = sampling.noise(3, range(6), (2, 2))
    assert torch.equal(sampling.noise(3, [4, 1], (2, 2)), whole[[4, 1]])
    assert not torch.equal(sampling.noise(4, range(6), (2, 2)), whole)
    toy = Toy()
    sampler = sampling.one_step(toy, Gain(1.0))  # type: ignore[arg-type]
    rows = [slice(0, 7), slice(0, 3), slice(3, 7)]
    all_, first, rest = (
        sampler(toy.encode(PROMPTS[r]), sampling.noise(5, range(r.start, r.stop), toy.latent_shape)) for r in rows
    )
    assert torch.equal(torch.cat([first, rest]), all_)


def test_reference_sampler_reaches_the_known_answer() -> None:
    """DDIM on N(m, 0.25) is a known map: from z to about m + 0.5 z (exact as steps grow and abar_1 goes to 0)."""
    toy, z = Toy(), sampling.noise(0, range(4), Toy.latent_shape)
    condition = toy.encode(PROMPTS[:4])
    many = sampling.sample_reference(toy, Gain(1.0), condition, z, steps=400, guidance=1.0)  # type: ignore[arg-type]
    exact = condition.tensors["number"].view(-1, 1, 1, 1) + 0.5 * z
    assert (many - exact).abs().max() < 0.12
    few = sampling.sample_reference(toy, Gain(1.0), condition, z, steps=3, guidance=1.0)  # type: ignore[arg-type]
    assert (few - exact).abs().mean() > 3 * (many - exact).abs().mean(), "more steps come nearer"


def test_guidance_extrapolates_from_the_unconditional_and_costs_twice() -> None:
    toy, z = Toy(), torch.zeros(2, *Toy.latent_shape)
    condition, t = toy.encode(["prompt 1", "prompt 2"]), torch.full((2,), 0.999)
    plain = sampling.guided_x0(toy, Gain(1.0), z, t, condition, 1.0)  # type: ignore[arg-type]
    none = toy.x0(Gain(1.0), z, t, toy.null(condition))
    guided = sampling.guided_x0(toy, Gain(1.0), z, t, condition, 4.0)  # type: ignore[arg-type]
    assert torch.allclose(guided, none + 4 * (plain - none), atol=1e-6)
    assert toy.batches == [2, 2, 4]
    with pytest.raises(ValueError, match="at least one step"):
        sampling.sample_reference(toy, Gain(1.0), condition, z, steps=0)  # type: ignore[arg-type]


def test_measures_equal_a_direct_computation() -> None:
    scores, toy = contest(), Toy()
    numbers = torch.arange(7.0)
    for name, gain in (("start", 0.5), ("aligned", 1.5)):
        latents = [gain * sampling.noise(s, range(7), (3, 8, 8)) + 0.1 * numbers.view(-1, 1, 1, 1) for s in (0, 1)]
        images = [toy.decode(x) for x in latents]
        row = scores.tree["models"][name]["measures"]
        reward = torch.stack([i.flatten(1).mean(1) + numbers for i in images])
        assert row["reward"]["mean"] == pytest.approx(reward.mean().item(), rel=1e-5)
        assert row["latent_std"]["mean"] == pytest.approx(
            torch.stack([x.flatten(1).std(1) for x in latents]).mean().item(), rel=1e-5
        )
        apart = (images[0] - images[1]).square().flatten(1).mean(1).sqrt().mean().item()
        assert row["diversity"]["mean"] == pytest.approx(apart, rel=1e-5)
        assert scores.arrays[name]["reward"].shape == (1, 2, 7)
    (pair,) = scores.tree["pairs"]
    assert (pair["a"], pair["b"]) == ("aligned", "start")
    a, b = (scores.arrays[n]["reward"] for n in ("aligned", "start"))
    assert pair["measures"]["reward"]["difference"]["mean"] == pytest.approx((a - b).mean(), rel=1e-5)
    assert pair["measures"]["reward"]["wins"]["mean"] == pytest.approx((a > b).mean(), rel=1e-5)
    assert pair["measures"]["latent_std"]["difference"]["low"] > 0.5, "the watch sees a larger spread"


def test_batch_size_changes_nothing() -> None:
    one, other = contest(batch=2), contest(batch=64)
    for model, values in one.arrays.items():
        for name, value in values.items():
            np.testing.assert_allclose(value, other.arrays[model][name], rtol=1e-5, atol=1e-6)


def test_clipped_and_saturated_pictures_are_seen() -> None:
    toy = Toy()
    toy.decode = lambda latent: latent.clamp(0, 1)  # type: ignore[method-assign]
    half = torch.zeros(1, 3, 8, 8)
    half[:, 0], half[:, 1], half[:, 2] = 1.7, 0.5, 0.25
    model = Contestant("aligned", lambda condition, z: half.expand(len(z), -1, -1, -1))
    row = score(toy, [model], PROMPTS).tree["models"]["aligned"]["measures"]  # type: ignore[arg-type]
    assert row["clipped"]["mean"] == pytest.approx(1 / 3, rel=1e-4)
    assert row["saturation"]["mean"] == pytest.approx(0.75)
    assert "diversity" not in row, "one seed says nothing of diversity"


def test_a_non_finite_reward_names_its_prompts() -> None:
    class Broken(Brightness):
        def score(self, images: Tensor, inputs: dict[str, Tensor]) -> Tensor:
            return torch.where(inputs["number"] == 4, torch.nan, inputs["number"])

    with pytest.raises(NonFiniteError, match=r"judge: not finite for 1 prompts.*prompt 4"):
        contest(judge=Broken(), batch=3)


def test_nothing_to_score_is_an_error() -> None:
    toy = Toy()
    model = one_step_contestant("a", toy, Gain(1.0))  # type: ignore[arg-type]
    for models, prompts, seeds in (([model], [], [0]), ([model, model], PROMPTS, [0]), ([model], PROMPTS, [])):
        with pytest.raises(ValueError, match="nothing to score"):
            score(toy, models, prompts, seeds=seeds)  # type: ignore[arg-type]


def test_teacher_latents_are_made_once(tmp_path: Path) -> None:
    toy = Toy()

    def run(prompts: Sequence[str] = PROMPTS, steps: int = 4, gain: float = 1.0, seeds: Sequence[int] = (0,)) -> Scores:
        teacher = teacher_contestant(toy, Gain(gain), steps=steps, guidance=2.0)  # type: ignore[arg-type]
        return score(toy, [teacher], prompts, seeds=seeds, reward=Brightness(), cache=tmp_path, batch=3)  # type: ignore[arg-type]

    def made(scores: Scores) -> int:
        return int(scores.tree["models"]["teacher"]["pictures_made"])

    first = run()
    assert made(first) == 7 and len(list(tmp_path.iterdir())) == 1
    again = run()
    assert made(again) == 0
    np.testing.assert_array_equal(again.arrays["teacher"]["reward"], first.arrays["teacher"]["reward"])
    assert made(run(seeds=(0, 1))) == 7, "only the new seed"
    assert made(run([*PROMPTS, "prompt 9"])) == 1, "only the new prompt"
    assert made(run(["prompt 5", *PROMPTS[1:]])) == 1, "another prompt at the place"
    assert made(run(steps=5)) == 7 and made(run(gain=1.1)) == 7, "other settings, other weights"
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:40])
    assert made(run()) == 7, "a damaged cache is an empty one"
    assert not list(tmp_path.rglob("*.part*"))


def test_fingerprint_and_cache_tell_networks_and_shapes_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(200, 200)
    before = fingerprint(net)
    assert fingerprint(net) == before
    with torch.no_grad():
        net.weight += 1e-3
    assert fingerprint(net) != before
    toy, z = Toy(), sampling.noise(0, range(2), Toy.latent_shape)
    known = teacher_contestant(toy, Gain(1.0), steps=2)  # type: ignore[arg-type]
    condition, names = toy.encode(PROMPTS[:2]), ["a", "b"]
    assert [known.latents(condition, z, names, tmp_path)[1] for _ in range(2)] == [2, 0]
    toy.latent_shape = (3, 4, 4)
    other = teacher_contestant(toy, Gain(1.0), steps=2)  # type: ignore[arg-type]
    assert other.latents(condition, z[..., :4, :4], names, tmp_path)[1] == 2
    assert [known.latents(condition, z, names)[1] for _ in range(2)] == [2, 2], "no folder"
    unknown = Contestant("teacher", known.sampler)
    assert [unknown.latents(condition, z, names, tmp_path)[1] for _ in range(2)] == [2, 2], "no fingerprint"


def test_files_come_back_and_hold_no_machine_paths(tmp_path: Path) -> None:
    scores = contest(facts=origin("world://prompts/heldout", ["didr align --recipe tiny"]))
    path = scores.write(tmp_path)
    back = Scores.read(tmp_path)
    assert back.tree == scores.tree == json.loads(path.read_text())
    np.testing.assert_array_equal(back.arrays["start"]["reward"], scores.arrays["start"]["reward"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json", "scores.npz"]
    assert str(Path.cwd()) not in path.read_text() and str(Path.home()) + "/" not in path.read_text()
    assert back.tree["facts"]["commands"] == ["didr align --recipe tiny"]
    assert {"date", "commit", "hardware", "versions", "prompts_source"} <= set(back.tree["facts"])
    header, rows = table(back.tree)
    assert header[:3] == ["model", "steps", "training reward"] and [r[0] for r in rows] == ["start", "aligned"]
    assert rows[0][2].startswith(f"{scores.tree['models']['start']['measures']['reward']['mean']:.3f} ± ")


def test_broken_or_foreign_scores_are_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": 99}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(DIDRError, match=r"scores\.json"):
            read_scores(tmp_path / "scores.json")
    with pytest.raises(DIDRError, match="cannot read"):
        read_scores(tmp_path / "none.json")


def test_pool_pairs_training_by_training(tmp_path: Path) -> None:
    toy = Toy()

    def trained(gain: float) -> Scores:
        models = [one_step_contestant(n, toy, Gain(g)) for n, g in (("start", 0.5), ("aligned", gain))]  # type: ignore[arg-type]
        return score(toy, models, PROMPTS, seeds=(0, 1))  # type: ignore[arg-type]

    runs = [trained(g) for g in (0.8, 1.0, 1.2)]
    both = pool(runs)
    assert both.tree["counts"] == {"prompts": 7, "seeds": 2, "trainings": 3, "pictures_per_model": 42}
    assert both.tree["prompts_sha256"] == runs[0].tree["prompts_sha256"]
    mean = np.mean([r.tree["models"]["aligned"]["measures"]["latent_std"]["mean"] for r in runs])
    assert both.tree["models"]["aligned"]["measures"]["latent_std"]["mean"] == pytest.approx(mean, rel=1e-4)
    pair = both.tree["pairs"][0]["measures"]["latent_std"]["difference"]
    single = runs[1].tree["pairs"][0]["measures"]["latent_std"]["difference"]
    assert pair["high"] - pair["low"] > 3 * (single["high"] - single["low"]), (
        "trainings differ, and the interval says so"
    )
    other = score(toy, [one_step_contestant("start", toy, Gain(1.0))], PROMPTS[:3], seeds=(0, 1))  # type: ignore[arg-type]
    with pytest.raises(DIDRError, match="prompts_sha256"):
        pool([runs[0], other])


class Painter(Toy):
    """The tiny world's own renderer as a backbone: latents are pictures."""

    latent_shape = (3, 32, 32)

    def encode(self, prompts: Sequence[str]) -> Condition:
        return Condition({"row": torch.arange(len(prompts))})

    def decode(self, latent: Tensor) -> Tensor:
        return latent


def test_the_tiny_world_is_judged_by_its_checker() -> None:
    from didr_core.world.captions import draw_scenes, sample_facts, write_caption
    from didr_core.world.scenes import render

    rng = np.random.default_rng(0)
    facts = [sample_facts(rng, held_out=True) for _ in range(80)]
    captions = [write_caption(f, rng) for f in facts]
    right = torch.from_numpy(render(draw_scenes(facts, rng)))
    collapsed = draw_scenes(facts, rng)
    free = np.array([f.background is None for f in facts])
    collapsed.background[free] = 0
    white = torch.from_numpy(render(collapsed))
    wrong = right.roll(1, 0)
    models = [Contestant(n, lambda _, z, p=p: p) for n, p in (("start", right), ("aligned", white), ("wrong", wrong))]  # type: ignore[misc]
    scores = score(Painter(), models, captions, world="tiny", batch=200)  # type: ignore[arg-type]
    rows = {name: row["measures"] for name, row in scores.tree["models"].items()}
    assert rows["start"]["strict"]["mean"] > 0.97 and rows["wrong"]["strict"]["mean"] < 0.05
    assert rows["start"]["utility"]["mean"] > 7 > rows["wrong"]["utility"]["mean"]
    assert rows["start"]["background_entropy"]["mean"] > 1.85 and rows["aligned"]["background_entropy"]["mean"] < 0.2
    pair = next(p for p in scores.tree["pairs"] if (p["a"], p["b"]) == ("aligned", "start"))["measures"]
    assert pair["background_entropy"]["difference"]["high"] < -1.5, "the collapse is seen, with certainty"
    assert abs(pair["strict"]["difference"]["mean"]) < 0.03, "though accuracy does not notice"
    assert "wins" in pair["utility"] and "wins" not in pair["strict"]
    asked = sum(f.relation is not None for f in facts)
    assert np.isfinite(scores.arrays["start"]["right_relation"]).sum() == asked, "only captions that ask for one"
