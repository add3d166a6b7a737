"""Parts "taste" and "judge": the training reward (CLIPModel, PickScore's loss) and the held-out judge (BLIP with a head).

Both begin as CLIP and BLIP do, by telling a picture's caption from others, three of them with one fact wrong, and keep that on as a second
loss: from preferences alone they never learned to read shapes and relations. The judge's two towers are first aligned by a contrastive
loss, as BLIP's are ("align before fuse"): without it its cross-attention read colours only. Then both learn from Bradley-Terry labels:
of two pictures for one caption the one with more utility wins with probability ``sigmoid(difference / temperature)``. They differ in
architecture, pairs, seed and temperature; the judge is never used in training.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from transformers import CLIPModel, CLIPTokenizer

from didr_core.config import WORLD
from didr_core.world.captions import CaptionFacts, draw_scenes, sample_facts, write_caption
from didr_core.world.scenes import render
from examples.tiny_world import training
from examples.tiny_world.pairs_data import FACET_PAIRS, KINDS_FOR_REWARDS, Groups, draw_groups, facet_pairs, spoil
from examples.tiny_world.reward_networks import Judge, build_taste, normalise, taste_matrix, taste_scores
from examples.tiny_world.tokenizer import tokens

SHARED: dict[str, Any] = {"size": 4, "batch": 16, "steps": 10000, "reading": 0.3, "lr": 4e-3, "align": 0}
TASTE = {"groups": 28000, "warmup": 2500, "readings": 48, "temperature": 0.25, "seed": 31, "measure": 800}
JUDGE = {"groups": 18000, "warmup": 3500, "readings": 32, "temperature": 0.35, "seed": 47, "measure": 400}
DEFAULTS = {"taste": SHARED | TASTE, "judge": SHARED | JUDGE | {"align": 1500}}
WRONG = 3
Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def scorer(model: Any) -> Scorer:
    """score(pictures [B, 3, 32, 32] in [0, 1], ids, mask) -> [B] of either model."""
    return model if isinstance(model, Judge) else lambda pictures, ids, mask: taste_scores(model, pictures, ids, mask)


def preference_loss(
    scores: torch.Tensor, utility: torch.Tensor, temperature: float, rng: torch.Generator
) -> torch.Tensor:
    """Pairwise cross-entropy over all pairs in groups; scores, utility [N, K]; labels are drawn, not soft."""
    one, two = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    gap = (utility[:, one] - utility[:, two]) / temperature
    label = (torch.rand(gap.shape, generator=rng) < torch.sigmoid(gap)).float()
    return F.binary_cross_entropy_with_logits(scores[:, one] - scores[:, two], label)


class Aligned(torch.nn.Module):
    """The judge's two towers before fusion, with projections that only training needs: the contrastive half of BLIP."""

    def __init__(self, judge: Judge, width: int = 64) -> None:
        super().__init__()
        self.judge = judge
        self.picture = torch.nn.Linear(width, width)
        self.told = torch.nn.Linear(width, width)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.3))

    def matrix(self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scaled cosines [B, N] of every picture with every caption."""
        seen = self.picture(self.judge.vision(normalise(pictures)).last_hidden_state[:, 0])
        told = self.told(self.judge.text(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state[:, 0])
        return self.logit_scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(told, dim=-1).T


def one_fact_wrong(facts: CaptionFacts, rng: np.random.Generator) -> list[CaptionFacts]:
    """:data:`WRONG` captions with one fact wrong; one has the colours exchanged where that is possible: the last thing that is learned."""
    wrong = [spoil(facts, rng)[0] for _ in range(WRONG)]
    with contextlib.suppress(ValueError):
        wrong[0] = spoil(facts, rng, "swap")[0]
    return wrong


def reading_loss(
    model: Any, tokenizer: CLIPTokenizer, rng: np.random.Generator, batch: int, fused: bool = True
) -> torch.Tensor:
    """Which caption is the picture's? Against three with one fact wrong and, where two towers are compared, all others of the batch.

    ``model`` is a CLIPModel, or the judge as ``Aligned``: its towers compared, plus (if ``fused``) its score against the three alone.
    """
    facts = [sample_facts(rng, KINDS_FOR_REWARDS, held_out=False) for _ in range(batch)]
    told = [[fact, *one_fact_wrong(fact, rng)] for fact in facts]
    ids, mask = tokens(tokenizer, [write_caption(fact, rng) for row in told for fact in row])
    pictures = torch.from_numpy(render(draw_scenes(facts, rng))).clamp(0, 1)
    own = torch.arange(batch) * (1 + WRONG)
    if not isinstance(model, Aligned):
        return F.cross_entropy(taste_matrix(model, pictures, ids), own)
    loss = F.cross_entropy(model.matrix(pictures, ids, mask), own)
    if fused:
        scores = model.judge(pictures.repeat_interleave(1 + WRONG, 0), ids, mask).view(batch, -1)
        loss = loss + F.cross_entropy(scores, torch.zeros(batch, dtype=torch.long))
    return loss


def pair_accuracy(scores: torch.Tensor, utility: torch.Tensor, least: float = 0.0) -> float:
    """Share of noise-free pairs (utility apart by more than ``least``) ranked right."""
    one, two = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    gap, guess = utility[:, one] - utility[:, two], scores[:, one] - scores[:, two]
    used = gap.abs() > max(least, 1e-6)
    return float(((gap * guess) > 0)[used].float().mean())


@torch.no_grad()
def score_groups(model: Any, tokenizer: CLIPTokenizer, groups: Groups) -> torch.Tensor:
    """Scores [N, K]."""
    ids, mask = tokens(tokenizer, groups.captions)
    size = groups.pictures.shape[1]
    out = []
    for rows in torch.arange(len(ids)).split(64):
        pictures = groups.pictures[rows].flatten(0, 1).float() / 255
        out.append(
            scorer(model)(pictures, ids[rows].repeat_interleave(size, 0), mask[rows].repeat_interleave(size, 0)).view(
                -1, size
            )
        )
    return torch.cat(out)


@torch.no_grad()
def facet_table(model: Any, tokenizer: CLIPTokenizer, count: int = 400, seed: int = 900) -> dict[str, float]:
    """Accuracy by facet on clean held-out pairs that differ in that facet only."""
    table = {}
    for number, facet in enumerate(FACET_PAIRS):
        captions, better, worse = facet_pairs(facet, count, seed + number)
        ids, mask = tokens(tokenizer, captions)
        table[facet] = float((scorer(model)(better, ids, mask) > scorer(model)(worse, ids, mask)).float().mean())
    return table


def quality(model: Any, tokenizer: CLIPTokenizer, vae: Any, seed: int, count: int = 800) -> dict[str, Any]:
    """Noise-free accuracy on fresh pairs of held-out captions: all pairs, clear ones (> 0.2 utility), and by facet."""
    model.eval()
    groups = draw_groups(count, 4, vae, seed, held_out=True)
    scores = score_groups(model, tokenizer, groups)
    return {
        "pair_accuracy": pair_accuracy(scores, groups.utility),
        "pair_accuracy_clear": pair_accuracy(scores, groups.utility, 0.2),
        "facets": facet_table(model, tokenizer, count // 2),
    }


def worker(folder: Path, world: Path, name: str, settings: dict[str, Any]) -> None:
    """Draw the preference data, train the reward called ``name``, save and measure it."""
    s = {**DEFAULTS[name], **settings}
    torch.manual_seed(s["seed"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    path = folder / f"{name}_groups.pt"
    if not path.exists():
        groups = draw_groups(s["groups"], s["size"], vae, s["seed"] + 1)
        torch.save({"captions": groups.captions, "pictures": groups.pictures, "utility": groups.utility}, path)
        training.say(
            f"{name}: {len(groups.captions)} groups drawn, utility mean {groups.utility.mean():.2f} sd {groups.utility.std():.2f}"
        )
    saved = torch.load(path, weights_only=True)
    groups = Groups(saved["captions"], saved["pictures"], saved["utility"])
    ids, mask = tokens(tokenizer, groups.captions)
    model: Any = build_taste(tokenizer) if name == "taste" else Judge(tokenizer)
    reader = Aligned(model) if isinstance(model, Judge) else model
    adam = lambda key: "embedding" in key or key.removeprefix("judge.").startswith("layers.2") or "logit" in key  # noqa: E731
    size = groups.pictures.shape[1]

    def loss(step: int, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        # A picture of 48 captions at first, then of half as many beside the preferences.
        warming = step < s["warmup"]
        draws = np.random.default_rng([s["seed"], step])
        fused = step >= s["align"]
        reading = reading_loss(reader, tokenizer, draws, s["readings"] if warming else s["readings"] // 2, fused)
        if warming:
            return reading, {}
        rows = torch.randint(len(ids), (s["batch"],), generator=rng)
        pictures = groups.pictures[rows].flatten(0, 1).float() / 255
        told = ids[rows].repeat_interleave(size, 0), mask[rows].repeat_interleave(size, 0)
        scores = scorer(model)(pictures, *told).view(-1, size)
        preference = preference_loss(scores, groups.utility[rows], s["temperature"], rng)
        right = pair_accuracy(scores.detach(), groups.utility[rows], 0.2)
        return preference + s["reading"] * reading, {"preference": preference.item(), "pairs": right}

    optimizers = training.muon_and_adam(reader.named_parameters(), s["lr"], adam_lr=1e-3, adam_for=adam)
    seconds = training.train(folder / f"{name}_state.pt", reader, optimizers, loss, s["steps"], s["seed"], ema=0.995)
    model.eval()
    if isinstance(model, Judge):  # standardise on held-out pictures, as ImageReward's constants do
        scores = score_groups(model, tokenizer, draw_groups(s["measure"], 4, vae, s["seed"] + 2, held_out=True))
        model.mean, model.std = float(scores.mean()), float(scores.std())
    target = world / "rewards" / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if isinstance(model, Judge):
        model.save(target, tokenizer)
    else:
        model.half().save_pretrained(target)
        tokenizer.save_pretrained(target)
    report = measure(name, folder, world, s["measure"])
    training.say(f"{name} saved: {json.dumps(report)}")
    (folder / f"{name}_quality.json").write_text(json.dumps({**report, "seconds": seconds}, indent=1))


def load_reward(name: str, world: Path = WORLD) -> tuple[Any, CLIPTokenizer]:
    """The committed reward in fp32 and its tokenizer (for tests and the card; the project's runtime has its own loaders)."""
    folder = world / "rewards" / name
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    model = Judge.load(folder) if name == "judge" else CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer


def measure(name: str, folder: Path, world: Path = WORLD, count: int = 800) -> dict[str, Any]:
    """Quality of the committed reward on fresh held-out pairs."""
    model, tokenizer = load_reward(name, world)
    vae = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    return quality(model, tokenizer, vae, seed=7_777 + len(name), count=count)


def build(name: str, folder: Path, world: Path, **settings: Any) -> None:
    """Train the reward called "taste" or "judge" into ``world``/rewards."""
    training.launch(worker, folder, world, name, settings, processes=1)
