"""How much of the tilt's gradient is signal? For rewards without a gradient: at which M, batch and beta can `importance` be followed?

    python -m benchmarks.signal --particles 8 32 64 --batches 12

For the starting generator, each batch gives the gradient of the generator's loss that comes from ``s_r`` alone. Products of gradients of
different batches are free of their noise, so ``|E g|^2`` is their mean, and the noise of one batch is ``E |g|^2 - |E g|^2``. Each batch is
taken twice, with other random numbers in the proxy alone: how far the two differ is the estimator's share of the noise, the rest is that of
prompts, pictures and times, which no estimator can lower. Reported by setting:

- signal to noise of a batch, ``|E g|^2 / noise``, and its inverse: batches until the mean gradient is as much signal as noise;
- the estimator's share of the noise;
- the same predicted for other M: the estimator's part falls as 1 / M, and with the number of samples everything does.

`taste, tweedie` is the yardstick: a recipe whose training works. Beta scales signal and noise of weak tilts alike. Finished rows are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from didr_core import config as configs
from didr_core.algorithms import losses
from didr_core.algorithms.didr import DIDR
from didr_core.config import Config
from didr_core.config.files import replace_text
from didr_core.data.feed import LocalFeed
from didr_core.diffusion.noise import Noise
from didr_core.evaluate.scores import origin
from didr_core.export.card import markdown
from didr_core.train.learner import Learner
from didr_core.types import Batch, GeneratorContext


class Tilt(DIDR):
    """DIDR's loss without its matching part."""

    def generator_loss(self, ctx: GeneratorContext) -> tuple[Tensor, dict[str, Tensor]]:
        """``0.5 mean (x0 - sg(x0 + W (sigma^2/alpha) s_r))^2``, per sample ``[B]``."""
        tilt = ctx.sigma.square() / ctx.alpha * ctx.drs()
        return losses.matching(ctx.x0, -losses.normalizer(ctx.x0.detach(), ctx.reference()) * tilt), {}


class ProxyNoise(Noise):
    """The same numbers but for the proxy's own, which hang on ``salt``."""

    salt = 0

    def normal(self, index: Tensor | Sequence[int], shape: Sequence[int], tag: str) -> Tensor:
        """``[B, *shape]`` standard normal."""
        return super().normal(index, shape, f"{tag}/{self.salt}" if tag.startswith("drp/") else tag)


def gradients(config: Config, batches: Sequence[Batch], twice: bool) -> Tensor:
    """``[N, 1 or 2, P]`` of the generator's weights: a row a batch, both draws of the proxy."""
    noise = ProxyNoise(config.seed)
    learner, rows = Learner(config, noise=noise), []
    for batch in batches:
        learner.scale.update(batch.spread, learner.parallel)
    for batch, salt in itertools.product(batches, range(1 + twice)):
        noise.salt = salt
        learner.generator_weights.zero_gradients()
        learner.backward(batch, "generator", learner.generator_loss)
        rows.append(torch.cat([p.grad.flatten() for p in learner.generator_net.parameters() if p.grad is not None]))
    return torch.stack(rows).view(len(batches), 1 + twice, -1)


def split(found: Tensor) -> dict[str, float]:
    """Signal ``|E g|^2``, the noise of one batch, and the part of that noise which is the estimator's, of ``[N, 1 or 2, P]``."""
    n = len(found)
    mean = found.mean(1)
    whole = mean.sum(0).square().sum()
    signal = (whole - mean.square().sum()) / (n * (n - 1))
    power = found.square().sum(2).mean()
    own = 0.5 * (found[:, 0] - found[:, -1]).square().sum(1).mean()  # 0 where there is one draw
    # jackknife over batches, of the signal
    left = [(((mean.sum(0) - m).square().sum()) - (mean.square().sum() - m.square().sum())) for m in mean]
    leave = torch.stack(left) / ((n - 1) * (n - 2))
    error = ((n - 1) / n * (leave - leave.mean()).square().sum()).sqrt()
    return {"signal": signal.item(), "error": error.item(), "noise": (power - signal).item(), "estimator": own.item()}


def predicted(row: dict[str, Any], particles: int) -> float:
    """Signal to noise of a batch with another number of particles."""
    found, own = row["found"], row["found"]["estimator"]
    return float(found["signal"] / (found["noise"] - own + own * row["particles"] / particles))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        found = row["found"]
        ratio, error = found["signal"] / found["noise"], found["error"] / found["noise"]
        cells = [row["name"], str(row["particles"]), f"{ratio:.4f} ± {error:.4f}"]
        cells += [
            f"{1 / ratio:.0f}" if ratio > error else "not seen",
            f"{100 * found['estimator'] / found['noise']:.0f} %",
        ]
        cells += [f"{predicted(row, m):.4f}" for m in (8, 32, 128, 10**9)]
        lines.append([*cells, f"{row['seconds']:.1f}"])
    header = ["reward, estimator", "M", "signal to noise of a batch", "batches to 1", "noise of the estimator"]
    return markdown([*header, "predicted, M 8", "M 32", "M 128", "M infinite", "s a batch"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="tiny_blackbox")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/signal.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base = configs.load(given.recipe, given.overrides)
    common = [*given.overrides, "workers.train=1", "algorithm=benchmarks.signal:Tilt"]
    cases = [(f"{base.name}, {base.drp.estimator}", given.recipe, m, (f"drp.particles={m}",)) for m in given.particles]
    cases += [("taste, tweedie", "tiny", 1, ())]
    tree: dict[str, Any] = json.loads(given.json.read_text()) if given.json.is_file() else {"rows": []}
    for name, recipe, particles, more in cases:
        key = {"name": name, "particles": particles, "batches": given.batches, "overrides": given.overrides}
        if any(key.items() <= row.items() for row in tree["rows"]):
            continue
        config = configs.load(recipe, [*common, *more, f"train.steps={given.batches}"])
        batches = list(itertools.islice(LocalFeed(config), given.batches))
        began, twice = time.process_time(), particles > 1
        found = split(gradients(config, batches, twice))
        seconds = (time.process_time() - began) / given.batches / (1 + twice)
        tree["rows"].append({**key, "batch": config.train.batch, "found": found, "seconds": seconds})
        tree["facts"] = origin(base.data.prompts, ["python -m benchmarks.signal"])
        replace_text(given.json, json.dumps(tree, indent=1) + "\n")
    print(table(tree["rows"]))
    replace_text(given.json.with_suffix(".md"), table(tree["rows"]) + "\n")


if __name__ == "__main__":
    main()
