"""How near each estimator of the Diffused Reward Score, and the generator trained with it, comes to an exact answer.

    python -m benchmarks.exactness [--dim 2] [--beta 1 0.3] [--schedule vp] \
        [--estimator tweedie hybrid importance:32:64] [--seeds 3] [--updates 1500] [--json FILE] [--seconds 600]

References are Gaussian mixtures, rewards quadratic: the DRS and DIDR's optimum p* have closed forms (:mod:`didr_core.diffusion.mixtures`).
Two parts, each printed as it is measured:

1. pointwise, by noise level, at x_t from the reference's law: bias ``|mean estimate - exact|``, spread (standard deviation of one draw),
   both over the size of the exact DRS (root mean square over points), mean cosine, denoiser calls, seconds and peak bytes;
2. trained: generators from the Diff-Instruct start, through the same Learner as any recipe. Sliced Wasserstein-2 distance of samples to p*,
   reward beside the optimum's, share of samples off the reference's support.

An estimator is NAME or NAME:K:M (steps, particles). `exact` is the closed form itself, `default` the config's own defaults, `none` trains
nothing: the start. With --json, rows that are in FILE (or beside it) already are not made again, and after --seconds no new one is begun:
the same command goes on. Dimensions above 64 are pointwise only; trainings are variance preserving.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import replicas
from benchmarks.exact_world import Exact, distill
from didr_core import config as configs
from didr_core import drs
from didr_core.backbones.gaussian_mixture import GaussianMixture
from didr_core.config import DRP, Config, build
from didr_core.diffusion.mixtures import Mixture, Quadratic, diffused_reward_score
from didr_core.diffusion.schedule import Cosine, RectifiedFlow, coeffs_like
from didr_core.plan.trace import Counter
from didr_core.types import Schedule

TIMES = (0.15, 0.3, 0.5, 0.7, 0.9)
ESTIMATORS = ("exact", "default", "tweedie", "shift", "ode", "truncated", "stochastic", "importance", "hybrid")
SHOWN = (*(name for name in ESTIMATORS if name != "default"), "hybrid:6:7")
SCHEDULES: dict[str, Schedule] = {"vp": Cosine(), "flow": RectifiedFlow()}
TRAINED_UP_TO = 64
SAMPLES = 20_000  # of a trained generator
CACHE = Path("runs/exactness")


@dataclass(frozen=True)
class World:
    """The reference, the reward, and what follows for one beta. In 2 dimensions the recipe's own; else eight modes drawn from N(0, I)."""

    dim: int
    beta: float

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The recipe `exact_2d`, in this dimension; rewards keep their scale, so beta is the plain one."""
        sets = [f"drp.beta={self.beta}", "train.batch=256", "train.assistant_warmup=0"]
        if self.dim != 2:
            generator = torch.Generator().manual_seed(self.dim)
            slope = 2 * torch.randn(self.dim, generator=generator) / math.sqrt(self.dim)
            centre = 0.3 * torch.randn(self.dim, generator=generator)
            sets += [
                "backbone={name: gaussian_mixture, layout: normal, modes: 8, std: 0.5, width: 256}",
                f"backbone.dim={self.dim}",
            ]
            sets += [f"reward.slope={slope.tolist()}", f"reward.centre={centre.tolist()}", "reward.curvature=0.15"]
        return configs.load("exact_2d", [*sets, *overrides])

    @cached_property
    def reference(self) -> Mixture:
        """p_ref."""
        backbone: GaussianMixture = build("backbones", self.config().backbone)
        return backbone.mixture

    @cached_property
    def reward(self) -> Quadratic:
        """r."""
        found: Quadratic = build("rewards", self.config().reward).formula(self.dim)  # type: ignore[arg-type]
        return found

    @cached_property
    def optimum(self) -> Mixture:
        """p*."""
        return self.reference.tilted(self.reward, self.beta)

    @cached_property
    def support(self) -> float:
        """Log-density of the reference below which a point is off support: -6 in 2 dimensions, else the 0.6 % quantile, as -6 is."""
        if self.dim == 2:
            return -6.0
        return (
            self.reference.log_prob(self.reference.sample(20_000, torch.Generator().manual_seed(0)))
            .quantile(0.006)
            .item()
        )

    def drs(self, x: Tensor, t: Tensor, schedule: Schedule = SCHEDULES["vp"]) -> Tensor:
        """The exact ``s_r(x_t)``."""
        alpha, sigma = coeffs_like(schedule, t, x)
        return diffused_reward_score(self.reference, self.optimum, x, alpha, sigma)

    def exact(self, problem: drs.Problem) -> drs.Estimate:
        """The exact answer as an estimator."""
        alpha, sigma = coeffs_like(problem.schedule, problem.t, problem.x)
        score = diffused_reward_score(self.reference, self.optimum, problem.x, alpha, sigma)
        first = self.reference.denoise(problem.x, alpha, sigma)
        return drs.Estimate(score, first, problem.reward(first).detach())


def settings(name: str, beta: float) -> DRP:
    """The DRP section that NAME or NAME:K:M stands for.

    Raises:
        SystemExit: unknown name.
    """
    key, *numbers = name.split(":")
    if key == "default":
        return DRP.model_validate({"beta": beta})
    if key in ("exact", "none"):
        return DRP(estimator="benchmarks.exact_world:Exact" if key == "exact" else "tweedie", beta=beta)  # type: ignore[call-arg]
    if key not in ESTIMATORS:
        raise SystemExit(
            f"--estimator {name!r}: unknown; known: {', '.join((*ESTIMATORS, 'none'))}, each also as NAME:K:M"
        )
    sizes = dict(zip(("steps", "particles"), map(int, numbers), strict=False))
    return DRP(estimator=key, beta=beta, **sizes)  # type: ignore[arg-type]


def pointwise(world: World, name: str, schedule: str = "vp", points: int = 64, draws: int = 64) -> list[dict[str, Any]]:
    """A row a noise level: bias, spread, cosine; denoiser calls, processor seconds a thousand samples and peak bytes a sample."""
    config, rows, forward = settings(name, world.beta), [], SCHEDULES[schedule]
    for at in TIMES:
        generator = torch.Generator().manual_seed(1)
        calls = 0

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += len(x)
            return world.reference.denoise(x, *coeffs_like(forward, t, x))

        def noise(tag: str, particles: int, source: torch.Generator = generator) -> Tensor:
            return torch.randn(particles * points * draws, world.dim, generator=source)

        x0 = world.reference.sample(points, generator)
        alpha, sigma = coeffs_like(forward, torch.full((points,), at), x0)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        exact = world.drs(x, torch.full((points,), at), forward)
        t = torch.full((points * draws,), at)
        problem = drs.Problem(x.repeat(draws, 1), t, forward, denoise, world.reward, noise, world.beta)
        began = time.process_time()
        got = drs.estimate(config, problem).score.view(draws, points, -1)
        seconds, counted = time.process_time() - began, calls
        with Counter() as count:
            drs.estimate(config, problem.take(torch.arange(points)))
        mean, size = got.mean(0), exact.square().sum().sqrt()
        rows.append(
            {
                "dim": world.dim,
                "beta": world.beta,
                "estimator": name,
                "schedule": schedule,
                "t": at,
                "bias": ((mean - exact).square().sum().sqrt() / size).item(),
                "spread": ((got - mean).square().sum((1, 2)).mean().sqrt() / size).item(),
                "cosine": torch.cosine_similarity(got, exact.expand_as(got), dim=-1).mean().item(),
                "calls": counted / len(t),
                "seconds": round(1000 * seconds / len(t), 4),
                "bytes": round(count.phases[""].most / points),
            }
        )
    return rows


def start(world: World, steps: int = 3000) -> str:
    """A file of generator weights at the reference's law, distilled once and kept in ``CACHE``."""
    from safetensors.torch import save_file

    path = CACHE / f"start-{world.dim}-{steps}.safetensors"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(distill(world.config(), steps).state_dict(), path)
    return str(path)


def train(dim: int, name: str, cases: Sequence[tuple[float, int]], updates: int) -> list[dict[str, Any]]:
    """Generators of one estimator trained from the start, at every (beta, seed) of ``cases``, as rows of the table."""
    worlds = [World(dim, beta) for beta, _ in cases]
    config = worlds[0].config([f"backbone.generator={start(worlds[0])}", f"train.steps={max(updates, 1)}"])
    config = config.model_copy(update={"drp": settings(name, 1.0)})
    twins = [replicas.Replica(seed, 1 / beta) for beta, seed in cases]
    made, half, calls, seconds = finished(worlds, config, twins, 0 if name == "none" else updates)
    return [
        {
            "dim": dim,
            "beta": world.beta,
            "estimator": name,
            "seed": twin.seed,
            "updates": updates,
            **measured(world, own),
            "distance": distance(own, world),
            "halfway": distance(before, world),
            "reward_star": world.optimum.expected(world.reward),
            "evaluations": calls,
            "seconds": seconds,
        }
        for world, twin, own, before in zip(worlds, twins, made, half, strict=True)
    ]


def finished(
    worlds: Sequence[World], config: Config, twins: Sequence[replicas.Replica], updates: int
) -> tuple[Tensor, Tensor, float, float]:
    """Trains; ``SAMPLES`` samples ``[R, N, D]`` at the end and halfway, reference calls a sample of an update, processor seconds each."""

    def exact(problem: drs.Problem) -> drs.Estimate:
        rows = torch.arange(len(problem.x)).chunk(len(worlds))
        return replicas.together([w.exact(problem.take(own)) for w, own in zip(worlds, rows, strict=True)])

    Exact.answer = exact
    made: list[Tensor] = []
    began = time.process_time()
    keep = lambda learner: made.append(replicas.samples(learner, len(twins), SAMPLES))  # noqa: E731
    learner, calls = replicas.train(config, twins, updates, keep)
    keep(learner)
    return made[-1], made[0], calls, round((time.process_time() - began) / len(twins), 1)


def measured(world: World, made: Tensor) -> dict[str, float]:
    """What can be said of samples without a beta."""
    return {
        "distance_to_reference": distance(made, world, "reference"),
        "reward": world.reward(made).mean().item(),
        "off_support": (world.reference.log_prob(made) < world.support).float().mean().item(),
    }


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-2 distance of one-dimensional projections, root mean square over directions; ``a, b [N, D]``."""
    return (_slices(a) - _slices(b)).square().mean().sqrt().item()


def distance(made: Tensor, world: World, law: Literal["optimum", "reference"] = "optimum") -> float:
    """:func:`sliced_wasserstein` to as many samples of p* or of the reference."""
    return (_slices(made) - _slices_of(world, law, len(made))).square().mean().sqrt().item()


@functools.cache
def _slices_of(world: World, law: str, count: int) -> Tensor:
    seed = {"optimum": 7, "reference": 8}[law]
    return _slices(getattr(world, law).sample(count, torch.Generator().manual_seed(seed)))


def _slices(a: Tensor, slices: int = 128) -> Tensor:
    """``[N, slices]`` sorted projections."""
    directions = torch.randn(a.shape[1], slices, generator=torch.Generator().manual_seed(3))
    return (a @ (directions / directions.norm(dim=0))).sort(0).values


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--dim", type=int, nargs="+", default=[2])
    parser.add_argument("--beta", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=["vp"], help="of the pointwise part")
    parser.add_argument("--estimator", nargs="+", default=list(SHOWN), metavar="NAME[:K:M]")
    parser.add_argument("--seeds", type=int, default=3, help="trainings an estimator; 0 = pointwise only")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these, nothing new is begun")
    parser.add_argument(
        "--json", type=Path, help="file of training rows, read first and added to; pointwise rows lie beside it"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    until = time.monotonic() + given.seconds
    beside = given.json and given.json.with_name(given.json.stem + "-pointwise.json")
    points, rows = _read(beside), _read(given.json)
    worlds = [World(dim, beta) for dim in given.dim for beta in given.beta]
    at = " ".join(f"{t:g}" for t in TIMES)
    print(
        f"{'pointwise':24s} dim  beta  bias (spread) cosine at t = {at}; calls, s a 1,000, kB at {TIMES[-1]}",
        flush=True,
    )
    names = [n for n in given.estimator if n not in ("exact", "none")]
    for world, schedule, name in itertools.product(worlds, given.schedule, names):
        key = {"dim": world.dim, "beta": world.beta, "estimator": name, "schedule": schedule}
        found = [r for r in points if key.items() <= r.items()]
        if not found and time.monotonic() < until:
            found = pointwise(world, name, schedule, draws=64 if world.dim <= TRAINED_UP_TO else 16)
            points += found
            _write(beside, points)
        if found:
            cells, last = "  ".join(f"{r['bias']:.2f} ({r['spread']:.2f}) {r['cosine']:.2f}" for r in found), found[-1]
            cost = f"{last['calls']:.0f}, {last['seconds']:.3f}, {last['bytes'] / 1000:.1f}"
            print(f"{name:24s} {world.dim:4d} {world.beta:4g} {schedule:4s} {cells}; {cost}", flush=True)
    print(
        "\ntrained: distance to p*, reward (optimum), share off support, reference calls a sample, seconds", flush=True
    )
    for dim, name in itertools.product([d for d in given.dim if d <= TRAINED_UP_TO], given.estimator):
        cases = list(itertools.product(given.beta, range(given.seeds)))
        key = {"dim": dim, "estimator": name, "updates": given.updates}
        there = {(r["beta"], r["seed"]): r for r in rows if key.items() <= r.items()}
        missing = [case for case in cases if case not in there]
        if missing and time.monotonic() < until:
            made = train(dim, name, missing, given.updates)
            there |= dict(zip(missing, made, strict=True))
            rows += made
            _write(given.json, rows)
        for row in (there[case] for case in cases if case in there):
            print(
                f"{name:24s} {row['dim']:4d} {row['beta']:4g} seed {row['seed']}: {row['distance']:.3f}  {row['reward']:.2f}"
                f" ({row['reward_star']:.2f})  {100 * row['off_support']:.1f} %  {row['evaluations']:.1f}  {row['seconds']:.0f} s",
                flush=True,
            )


def _read(path: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path and path.is_file() else []
    return rows


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
