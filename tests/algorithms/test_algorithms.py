"""The rivals against hand-computed cases, finite differences, an exact divergence, each other's limits, and one real step of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_learner import saved
from torch import Tensor
from toy import toy_recipe

from didr_core import config
from didr_core.algorithms import losses
from didr_core.config.registry import find, names
from didr_core.data.feed import LocalFeed
from didr_core.train import checkpoint
from didr_core.train.learner import GeneratorPass, Learner
from didr_core.types import Batch, DIDRError, GeneratorContext
from pipelines.cli.show import show

RIVALS = ("diff_instruct_pp", "diff_instruct_star", "dmd2", "dmdr", "reward_only")
Function = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """A :class:`GeneratorContext` of known tensors; networks and reward are plain functions."""

    x0: Tensor
    assistant_of: Function
    reference_of: Function
    reward_of: Function
    eps: Tensor
    alpha: Tensor
    sigma: Tensor
    s_r: Tensor
    t: Tensor

    @property
    def x_t(self) -> Tensor:
        return self.alpha * self.x0 + self.sigma * self.eps

    def assistant(self, grad: bool = False) -> Tensor:
        return self.assistant_of(self.x_t if grad else self.x_t.detach())

    def reference(self, grad: bool = False) -> Tensor:
        return self.reference_of(self.x_t if grad else self.x_t.detach())

    def drs(self) -> Tensor:
        return self.s_r

    def reward(self, latent: Tensor) -> Tensor:
        return self.reward_of(latent)


def double(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def constant(*values: float) -> Function:
    return lambda x: double(*values) + 0 * x


def by_hand(**changes: Any) -> Case:
    """N = 2: W = 1 / mean(|2 - 0|, |3 - 1|) = 1/2, D_psi - D_ref = (2, -1), r = 3 * 2 - 3 = 3."""
    given: dict[str, Any] = {
        "x0": double(2, 3),
        "assistant_of": constant(2, 0),
        "reference_of": constant(0, 1),
        "reward_of": lambda x: 3 * x[:, 0] - x[:, 1],
        "eps": double(0.5, -1),
        "alpha": double(0.8),
        "sigma": double(0.6),
        "s_r": double(1, 2),
        "t": torch.zeros(1),
    }
    return Case(**(given | changes))


def nonlinear(seed: int = 0) -> Case:
    """Curved networks and reward, B = 3, N = 8, float64."""
    torch.manual_seed(seed)
    a, b, c = (torch.randn(8, 8, dtype=torch.float64) / 3 for _ in range(3))
    shape = (3, 2, 2, 2)

    def network(mix: Tensor) -> Function:
        return lambda x: torch.tanh(x.flatten(1) @ mix).view_as(x)

    return Case(
        x0=torch.randn(shape, dtype=torch.float64),
        assistant_of=network(a),
        reference_of=network(b),
        reward_of=lambda x: torch.sin(x.flatten(1) @ c).sum(1),
        eps=torch.randn(shape, dtype=torch.float64),
        alpha=torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64).view(3, 1, 1, 1),
        sigma=torch.tensor([0.4, 0.8, 0.95], dtype=torch.float64).view(3, 1, 1, 1),
        s_r=torch.randn(shape, dtype=torch.float64),
        t=torch.zeros(3),
    )


def evaluate(name: str, case: Case, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss ``[B]``, its gradient in x0, and metrics."""
    method = find("algorithms", name)
    case.x0 = case.x0.detach().requires_grad_()
    context: GeneratorContext = case
    loss, metrics = method(method.Config(name=name, **options)).generator_loss(context)
    (gradient,) = torch.autograd.grad(loss.sum(), case.x0)
    return loss.detach(), gradient, metrics


HALF_C = math.sqrt(1.5)  # mean y^2 + c^2 = 2.5 + 1.5 = 2^2


@pytest.mark.parametrize(
    ("name", "options", "loss", "gradient"),
    [
        # direction W (2, -1) = (1, -1/2); loss 0.5 mean direction^2, gradient direction / 2
        ("diff_instruct", {}, 0.3125, (0.5, -0.25)),
        ("dmd2", {}, 0.3125, (0.5, -0.25)),
        # ... - 0.1 r, with grad r = (3, -1)
        ("diff_instruct_pp", {"weight": 0.1}, 0.3125 - 0.3, (0.2, -0.15)),
        ("diff_instruct_pp", {"weight": 0.1, "normalize": False}, 1.25 - 0.3, (0.7, -0.4)),
        # ... + 0.1 max(0, margin - 3)
        ("dmdr", {"weight": 0.1, "margin": 5.0}, 0.3125 + 0.2, (0.2, -0.15)),
        ("dmdr", {"weight": 0.1, "margin": 2.0}, 0.3125, (0.5, -0.25)),
        # mean(y (x0 - D_psi)) / 2 = mean(2 * 0, -1 * 3) / 2; gradient y / (2 * 2), networks are flat here
        ("diff_instruct_star", {"weight": 0.0, "c": HALF_C}, -0.75, (0.5, -0.25)),
        ("diff_instruct_star", {"weight": 0.1, "c": HALF_C}, -0.75 - 0.3, (0.2, -0.15)),
        ("reward_only", {"weight": 2.0}, -6.0, (-6.0, 2.0)),
        ("reward_only", {"weight": 2.0, "margin": 4.0}, 2.0, (-6.0, 2.0)),
        ("reward_only", {"weight": 2.0, "margin": 1.0}, 0.0, (0.0, 0.0)),
    ],
)
def test_loss_and_gradient_by_hand(
    name: str, options: dict[str, float], loss: float, gradient: tuple[float, float]
) -> None:
    got, slope, _ = evaluate(name, by_hand(), **options)
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert slope[0].tolist() == pytest.approx(gradient, abs=1e-12)


def test_di_star_by_hand_with_sloping_networks() -> None:
    """x_t = 0.8 + 0.6 = 1.4, D_psi = 0.7, y = 0.35, sqrt(y^2 + c^2) = 0.91 (5-12-13): u = 5/13, du/dx0 = c^2 / 0.91^3 * 0.25 * 0.8."""
    case = by_hand(x0=double(1), eps=double(1), assistant_of=lambda x: x / 2, reference_of=lambda x: x / 4)
    loss, gradient, _ = evaluate("diff_instruct_star", case, weight=0.0, c=0.84)
    assert loss.item() == pytest.approx(5 / 13 * 0.3, abs=1e-12)
    assert gradient.item() == pytest.approx(0.84**2 / 0.91**3 * 0.2 * 0.3 + 5 / 13 * (1 - 0.4), abs=1e-12)


def test_di_star_follows_the_divergence_it_names() -> None:
    """1-D Gaussians, all in closed form: the gradient of SIM's loss at a fixed TA equals that of E d(D_theta - D_ref) by quadrature."""
    alpha, sigma, spread, c, point = 0.7, 0.6, 0.5, 0.3, 0.4
    nodes, mass = np.polynomial.hermite_e.hermegauss(48)
    z, eps = (torch.from_numpy(v).reshape(-1, 1) for v in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(mass, mass) / mass.sum() ** 2).reshape(-1)

    def denoiser(x: Tensor, mean: float | Tensor, variance: float) -> Tensor:
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    def divergence(mean: float) -> float:  # the sampling law is held: only the scores follow the mean
        x = alpha * (point + spread * z) + sigma * eps
        y = denoiser(x, mean, spread**2) - denoiser(x, 0.0, 1.0)
        return float((weight * losses.pseudo_huber(y, c)).sum())

    case = by_hand(
        x0=(point + spread * z),
        eps=eps,
        alpha=double(alpha),
        sigma=double(sigma),
        assistant_of=lambda x: denoiser(x, point, spread**2),
        reference_of=lambda x: denoiser(x, 0.0, 1.0),
    )
    _, gradient, _ = evaluate("diff_instruct_star", case, weight=0.0, c=c)  # d x0 / d mean = 1
    h = 1e-5
    exact = (divergence(point + h) - divergence(point - h)) / (2 * h)
    assert abs(exact) > 0.1
    assert float((weight * gradient[:, 0]).sum()) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diff_instruct_star", {"weight": 0.0}),
        ("diff_instruct_star", {"weight": 0.3, "c": 0.2}),
        ("reward_only", {}),
        ("reward_only", {"margin": 0.3}),
    ],
)
def test_gradients_equal_finite_differences(name: str, options: dict[str, float]) -> None:
    case = nonlinear()
    x0, h = case.x0.clone(), 1e-6
    _, gradient, _ = evaluate(name, case, **options)
    for place in np.ndindex(*x0.shape):
        moved = []
        for sign in (1, -1):
            case.x0 = x0.clone()
            case.x0[place] += sign * h
            moved.append(evaluate(name, case, **options)[0].sum().item())
        assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(gradient[place].item(), abs=1e-7)


@pytest.mark.parametrize("name", ["diff_instruct_pp", "dmdr", "diff_instruct_star"])
def test_the_reward_adds_its_own_gradient_in_proportion_to_its_weight(name: str) -> None:
    """DI++ minus DI, DMDR minus DMD2 and DI* minus SIM are -weight grad r, with grad r from finite differences."""
    case = nonlinear()
    far = {"margin": 1e3} if name == "dmdr" else {}
    x0, h = case.x0.clone(), 1e-6
    plain = evaluate(name, case, weight=0.0, **far)[1]
    for weight in (1e-3, 0.7):
        _, gradient, _ = evaluate(name, case, weight=weight, **far)
        extra = (gradient - plain) / -weight
        for place in [(0, 0, 0, 0), (1, 1, 0, 1), (2, 0, 1, 1)]:
            shift = torch.zeros_like(x0)
            shift[place] = h
            slope = (case.reward_of(x0 + shift) - case.reward_of(x0 - shift)).sum().item() / (2 * h)
            assert extra[place].item() == pytest.approx(slope, abs=1e-7)


def test_limits_without_reward() -> None:
    """DI++ and DMDR become DI and DMD2 exactly; DIDR becomes DI as its DRS vanishes, linearly; DI* becomes SIM in score space."""
    di, slope, _ = evaluate("diff_instruct", nonlinear())
    for name in ("diff_instruct_pp", "dmdr"):
        loss, gradient, metrics = evaluate(name, nonlinear(), weight=0.0)
        assert torch.equal(loss, di) and torch.equal(gradient, slope)
        assert list(metrics) == ["matching/rms"]
    assert torch.equal(evaluate("dmd2", nonlinear())[1], slope)
    far = []
    for beta in (1.0, 100.0):
        case = nonlinear()
        case.s_r = case.s_r / beta
        far.append(evaluate("didr", case)[1] - slope)
    assert torch.allclose(far[0], 100 * far[1], rtol=1e-9)

    case = nonlinear()
    loss, gradient, _ = evaluate("diff_instruct_star", case, weight=0.0, c=0.1)
    x0 = case.x0.detach().requires_grad_()
    x_t = case.alpha * x0 + case.sigma * case.eps
    s_psi, s_ref = ((case.alpha * d(x_t) - x_t) / case.sigma**2 for d in (case.assistant_of, case.reference_of))
    y = case.sigma**2 / case.alpha * (s_psi - s_ref)
    slope_d = y / (8 * (y.square().flatten(1).mean(1) + 0.01).sqrt().view(-1, 1, 1, 1))
    forward = -case.eps / case.sigma  # grad log q(x_t | x0): no gradient of its own
    sim = (-slope_d * case.sigma**2 / case.alpha * (s_psi - forward)).flatten(1).sum(1)
    assert torch.allclose(loss, sim)
    assert torch.allclose(gradient, torch.autograd.grad(sim.sum(), x0)[0])


def test_di_star_with_a_large_c_is_the_fisher_divergence() -> None:
    case = nonlinear()
    _, gradient, _ = evaluate("diff_instruct_star", case, weight=0.0, c=1e6)
    x0 = case.x0.detach().requires_grad_()
    x_t = case.alpha * x0 + case.sigma * case.eps
    assistant, reference = case.assistant_of(x_t), case.reference_of(x_t)
    squared = ((assistant - reference) * (x0 - assistant)).flatten(1).mean(1)
    assert torch.allclose(1e6 * gradient, torch.autograd.grad(squared.sum(), x0)[0], rtol=1e-6)


def test_metrics_are_in_the_latents_unit() -> None:
    """W = 1/2 and N = 2: a push of 0.1 (3, -1) a sample is 0.1 (3, -1) * 2 / (1/2) against D_psi - D_ref = (2, -1)."""
    _, _, metrics = evaluate("diff_instruct_pp", by_hand(), weight=0.1)
    assert metrics["matching/rms"].item() == pytest.approx(math.sqrt(2.5))
    assert metrics["reward/rms"].item() == pytest.approx(0.4 * math.sqrt(5))
    assert metrics["reward/cosine"].item() == pytest.approx(-7 / math.sqrt(5 * 10))
    reached = [evaluate("dmdr", by_hand(), margin=m)[2]["reward/reached"].item() for m in (2.0, 5.0)]
    assert reached == [1.0, 0.0]


@pytest.mark.parametrize("name", RIVALS)
def test_the_recipe_takes_the_name_and_config_show_describes_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert name in names("algorithms")
    assert config.load("tiny", [f"algorithm={name}"]).algorithm.name == name
    show("tiny", [f"algorithm={name}"])
    said = capsys.readouterr().out
    assert f"algorithm {name}: " in said and "arXiv" in said
    for key, info in find("algorithms", name).Config.model_fields.items():
        if key != "name":
            assert f"algorithm.{key}" in said and info.description in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm=dmdr", "algorithm.weight=-1"],
            r"algorithm: dmdr: weight: .*greater than or equal to 0 \(got -1\)",
        ),
        (
            ["algorithm=diff_instruct_pp", "algorithm.weight=.inf"],
            r"algorithm: diff_instruct_pp: weight: .*finite number \(got inf\)",
        ),
        (
            ["algorithm=diff_instruct_star", "algorithm.c=0"],
            r"algorithm: diff_instruct_star: c: .*greater than 0 \(got 0\)",
        ),
        (
            ["algorithm=reward_only", "algorithm.weight=0"],
            r"algorithm: reward_only: weight: .*greater than 0 \(got 0\)",
        ),
        (["algorithm=dmdr", "algorithm.margin=high"], r"algorithm: dmdr: margin: .*valid number.*\(got 'high'\)"),
        (["algorithm=dmd2", "algorithm.weight=1"], r"dmd2 has no key 'weight' \(value 1\)\. It has "),
        (["algorithm=dmdd"], r"algorithms: unknown name 'dmdd'.*Did you mean 'dmdr'"),
        (["algorithm=reward_only", "reward=null"], r"algorithm 'reward_only' needs one, got none"),
        (
            ["algorithm=dmdr", "reward=toy:Opaque", "reward.bad=x"],
            r"reward\.name='toy:Opaque': has no gradient, which algorithm 'dmdr' needs",
        ),
    ],
)
def test_bad_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(DIDRError, match=message):
        config.load("tiny", overrides)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_recipe(tmp_path_factory.mktemp("toy"))


def started(recipe: Path, name: str, *more: str) -> tuple[Learner, list[Batch]]:
    sets = [f"algorithm={name}", "workers.train=1", "train.batch=4", "train.steps=2", *more]
    chosen = config.load(str(recipe), sets)
    return Learner(chosen), list(LocalFeed(chosen))


def weights(of: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in of.parameters()])


@pytest.mark.parametrize("name", RIVALS)
def test_a_real_step_changes_the_generator_and_resumes_exactly(recipe: Path, name: str, tmp_path: Path) -> None:
    straight, batches = started(recipe, name)
    start, tracker = weights(straight.generator_net), weights(straight.assistant_net)
    metrics = straight.step(batches[0]).metrics
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert (weights(straight.generator_net) - start).abs().max() > 1e-5
    needs_assistant = name != "reward_only"
    assert ("loss/assistant" in metrics) == needs_assistant
    assert torch.equal(weights(straight.assistant_net), tracker) != needs_assistant
    assert ("reward/ratio" in metrics) == (name in ("diff_instruct_pp", "diff_instruct_star", "dmdr"))
    saved(straight, tmp_path, {})
    straight.step(batches[1])
    second, _ = started(recipe, name)
    checkpoint.load(tmp_path, second)
    second.step(batches[1])
    for a, b in ((straight.generator_net, second.generator_net), (straight.ema_net, second.ema_net)):
        assert torch.equal(weights(a), weights(b))


def test_di_star_gives_the_networks_weights_no_gradient(recipe: Path) -> None:
    subject, batches = started(recipe, "diff_instruct_star")
    loss, _ = subject.algorithm.generator_loss(GeneratorPass(subject, batches[0]))
    loss.sum().backward()
    assert all(p.grad is None for p in subject.assistant_net.parameters())
    assert all(p.grad is None for p in subject.reference_net.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in subject.generator_net.parameters())


def test_the_algorithm_in_the_readme_is_one_file(recipe: Path, tmp_path: Path) -> None:
    """README of didr_core/algorithms: named by its path, it trains, and its weight acts."""
    readme = Path(__file__).resolve().parents[2] / "didr_core" / "algorithms" / "README.md"
    source = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert source
    (tmp_path / "mine.py").write_text(source[1])
    ends = []
    for weight in (0.0, 5.0):
        subject, batches = started(recipe, f"{tmp_path}/mine.py:Mine", f"algorithm.weight={weight}")
        before = weights(subject.generator_net)
        subject.step(batches[0])
        ends.append(weights(subject.generator_net))
        assert not torch.equal(ends[-1], before)
    assert not torch.equal(*ends)
