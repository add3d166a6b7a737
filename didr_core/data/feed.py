"""From prompts to training batches: conditions, the reward's inputs, the baseline. Plain callables, one process, no Ray.

    {index, id, prompt}  --PromptEncoder-->  + condition/*  --RewardPreparer-->  + reward/*, baseline, spread  --to_batch-->  Batch

Columns are numpy arrays with a leading axis of samples. `pipelines/cluster/prompts.py` runs the same two callables as Ray Data actors;
:class:`LocalFeed` runs them here. Both give the same numbers, because whatever is random is tied to ``(config.seed, sample index)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from didr_core.config import Config, build, fingerprint
from didr_core.config.provenance import versions
from didr_core.data.cache import Kept
from didr_core.data.prompts import Columns, PromptIndex, columns, open_prompts
from didr_core.diffusion.noise import Noise
from didr_core.networks import roles
from didr_core.types import Backbone, Batch, Condition, DIDRError, Reward

CONDITION, REWARD = "condition/", "reward/"


class PromptEncoder:
    """Adds ``condition/<name>`` columns. Holds the text towers, which never sit on a trainer."""

    reads = ("prompt",)

    @staticmethod
    def key(config: Config) -> str:
        """A hash of all that they follow from, beside the prompts encoded together."""
        code = {name: versions().get(name) for name in ("didr", "torch", "diffusers", "transformers")}
        return fingerprint.digest("encoder", code, config.device, _fingerprint(config, "text"))

    def __init__(self, config: Config) -> None:
        self.device = config.torch_device
        self.backbone: Backbone = build("backbones", config.backbone)
        self.backbone.load_text()
        self.backbone.to(self.device)

    @torch.no_grad()
    def __call__(self, batch: Columns) -> Columns:
        """Encode the ``prompt`` column."""
        condition = self.backbone.encode([str(p) for p in batch["prompt"]])
        return {**batch, **_arrays(CONDITION, condition.tensors)}


class RewardPreparer:
    """Adds ``reward/<name>`` (the reward's text features), ``baseline`` and ``spread``.

    The last two are mean and unbiased variance of the raw reward over ``config.baseline.samples`` one-step pictures of the *starting*
    generator, whose noise is tied to ``(config.seed, sample index)``. Holds that generator, the decoder and the reward model.
    """

    reads = ("index", "prompt")

    @staticmethod
    def key(config: Config) -> str:
        """A hash of all that they follow from, beside the samples of a block. The start has the type and base that its role says."""
        tree = config.model_dump(mode="json")
        start = {"generator": tree["roles"]["generator"], "dtype": tree["roles"]["dtype"]}
        drawn = {name: tree[name] for name in ("seed", "baseline")} | {"at once": config.train.at_once}
        reward = config.reward and fingerprint.component("rewards", config.reward)
        return fingerprint.digest(
            "reward", PromptEncoder.key(config), _fingerprint(config, "start"), start, drawn, reward
        )

    def __init__(self, config: Config, reward: Reward | None = None) -> None:
        """``reward``: in place of the config's own, whose models may be elsewhere."""
        if config.reward is None:
            raise DIDRError("reward: none is configured, so there is nothing to prepare")
        self.device = config.torch_device
        self.samples = config.baseline.samples
        self.noise = Noise(config.seed)
        self.backbone: Backbone = build("backbones", config.backbone)
        self.size = config.train.at_once
        self.generator = roles.load_start(self.backbone, config.backbone, config.roles, self.device)
        self.backbone.load_decoder()
        self.backbone.to(self.device)
        self.reward = reward or build("rewards", config.reward)
        self.reward.load(self.device)

    @torch.no_grad()
    def __call__(self, batch: Columns) -> Columns:
        """Needs the ``prompt``, ``index`` and ``condition/*`` columns."""
        inputs = self.reward.prepare([str(p) for p in batch["prompt"]])
        size = self.size or len(batch["index"])
        score = torch.cat(
            [self._scores(batch, inputs, slice(i, i + size)) for i in range(0, len(batch["index"]), size)], 1
        )
        return {
            **batch,
            **_arrays(REWARD, inputs),
            "baseline": score.mean(0).cpu().numpy(),
            "spread": score.var(0, unbiased=True).cpu().numpy(),
        }

    def _scores(self, batch: Columns, inputs: Mapping[str, Tensor], rows: slice) -> Tensor:
        """``[samples, b]`` of a micro-batch: a worker's whole share of large pictures does not fit at once."""
        part = {k: v[rows] for k, v in batch.items()}
        told = {k: v[rows] for k, v in inputs.items()}
        return torch.stack([self.reward.score(images, told).float() for images in self.pictures(part)])

    @torch.no_grad()
    def pictures(self, batch: Columns) -> Iterator[Tensor]:
        """The starting generator's pictures ``[B, 3, H, W]`` of the batch, once for each of ``config.baseline.samples`` noises."""
        condition = Condition(_tensors(CONDITION, batch)).to(self.device)
        index = [int(i) for i in batch["index"]]
        for sample in range(self.samples):
            z = self.noise.normal(index, self.backbone.latent_shape, f"baseline/{sample}").to(self.device)
            yield self.backbone.decode(self.backbone.generate(self.generator, z, condition))


def to_batch(batch: Mapping[str, Any]) -> Batch:
    """Columns, as numpy arrays, to a :class:`Batch` on the CPU."""
    return Batch(
        index=torch.from_numpy(np.array(batch["index"], np.int64)),
        ids=[str(i) for i in batch["id"]],
        prompts=[str(p) for p in batch["prompt"]],
        condition=Condition(_tensors(CONDITION, batch)),
        reward_inputs=_tensors(REWARD, batch),
        baseline=_tensor(batch["baseline"]) if "baseline" in batch else None,
        spread=_tensor(batch["spread"]) if "spread" in batch else None,
    )


class LocalFeed:
    """The training batches of one rank, made in this process, from sample ``start`` to the end of the run.

    ``start`` is the cursor: samples already consumed by all ranks together, a multiple of ``train.batch``. With the defaults the batches
    are whole; rank r of w = ``world_size`` takes rows ``[r, r + 1) * batch / w`` of each, as the Ray stream deals them out.
    """

    def __init__(self, config: Config, start: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.start, self.rank, self.share = start, rank, config.train.batch // world_size
        self.index = open_prompts(config)
        self._stages: Sequence[Any] | None = None

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start // self.config.train.batch, self.config.train.steps):
            yield to_batch(self.columns(step))

    def columns(self, step: int) -> Columns:
        """This rank's share of the batch of ``step`` (0 is the first), as numpy columns."""
        if self._stages is None:
            self._stages = stages(self.config)
        first = step * self.config.train.batch + self.rank * self.share
        batch = samples(self.config, self.index, first, self.share)
        for stage in self._stages:
            batch = stage(batch)
        return batch


def stages(config: Config) -> Sequence[Any]:
    """What makes a batch of prompts, in order. With ``data.cache`` they load nothing as long as all is there."""
    kinds = [PromptEncoder, *([RewardPreparer] if config.needs_reward else [])]
    return [stage(kind, config) for kind in kinds]


def stage(kind: type[Any], config: Config, **given: Any) -> Any:
    """One of them; ``given`` to it beside the config."""
    return Kept(kind, config, **given) if config.cache else kind(config, **given)


def samples(config: Config, index: PromptIndex, first: int, count: int) -> Columns:
    """Samples ``first ...`` of the stream, before any stage."""
    return columns(index.read(np.arange(first, first + count), config.seed))


def _fingerprint(config: Config, of: Literal["text", "start"]) -> str:
    own = build("backbones", config.backbone).fingerprint
    return own(of) if own else fingerprint.component("backbones", config.backbone)


STOPPED_S = 10
"""How long a run that was asked to stop waits for the batch of its last step."""


def ahead(stream: Iterable[Batch], stopped: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
    """``stream``, whose next batch is made in a thread while this one is used; the first is being made from now on.

    Raises:
        KeyboardInterrupt: the run was ``stopped``, and :data:`STOPPED_S` later the next batch was not there: its actors' node may be gone.
    """
    pool, source = ThreadPoolExecutor(1), iter(stream)
    first = pool.submit(next, source, None)

    def items() -> Iterator[Batch]:
        made = first
        while True:
            patience = STOPPED_S
            while not wait([made], 1.0).done:
                patience -= stopped()
                if patience <= 0:
                    raise KeyboardInterrupt("stopped while it waited for prompts")
            if (batch := made.result()) is None:
                return
            made = pool.submit(next, source, None)
            yield batch

    return items()


def _arrays(prefix: str, tensors: Mapping[str, Tensor]) -> Columns:
    """numpy knows no bfloat16; float32 holds it exactly."""
    return {prefix + k: (v.float() if v.dtype == torch.bfloat16 else v).cpu().numpy() for k, v in tensors.items()}


def _tensors(prefix: str, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): _tensor(v) for k, v in batch.items() if k.startswith(prefix)}


def _tensor(value: Any) -> Tensor:
    """A copy: arrays that come out of the object store are read-only."""
    return torch.from_numpy(np.array(value))
