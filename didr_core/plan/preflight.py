"""Everything that can be known to be wrong before the first weight is loaded: data, models, output. Takes about a second."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from didr_core.config import Component, Config, build, hub, locate, registry
from didr_core.data import teacher_pairs
from didr_core.data.prompts import PromptIndex, normal, open_prompts
from didr_core.data.storage import LEAST_FREE, local_folder, room
from didr_core.evaluate import control
from didr_core.export.folder import find_export
from didr_core.networks import optim
from didr_core.networks.tokenizers import longer_than
from didr_core.plan import advice, fit
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError

SCAN_ROWS = 200_000
COUNTED = 5_000  # prompts whose tokens are counted


def preflight(
    config: Config,
    *,
    here: bool = True,
    gpus: bool = True,
    output: Path | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> PromptIndex:
    """Look at prompts (footers, and the text of the first :data:`SCAN_ROWS` rows), weights folders and output folder.

    Args:
        here: this process trains, so ``device`` must exist on this machine.
        gpus: this machine's GPUs train, so the networks must fit on them; else a cluster's do, of which nobody knows yet.
        output: the run's folder, where it is not to be made in ``config.output``; it may hold checkpoints already.
        note: takes sentences on what is no mistake, but may not be meant.

    Returns:
        The training corpus, with the digest of its first texts and what they share with the held-out ones.

    Raises:
        DIDRError: what is wrong; of prompts and weights all that is.
    """
    if here:
        _ = config.torch_device
    if here and config.in_actors:
        raise DIDRError(
            f"reward.placement='actors' ({', '.join(config.in_actors)}): there are no actors in one process, without Ray. Leave out "
            "--local, or say placement=local: the numbers are the same."
        )
    optim.check(config)
    build("algorithms", config.algorithm)
    found, wrong = opened(config)
    if wrong:
        raise DIDRError("\n".join(wrong))
    for told in found["prompts"].notes:
        note(told)
    if not config.sizes.generator_updates:
        steps, warmup = config.train.steps, config.train.assistant_warmup
        note(f"train.steps={steps} is not over train.assistant_warmup={warmup}: the generator stays as it is.")
    if config.uses_drs and config.drp.snr_gate and not registry.find("drs", config.drp.estimator).gate:
        note(
            f"drp.snr_gate=true weakens drp.estimator={config.drp.estimator}, which needs no gate at high noise: drp.snr_gate=false."
        )
    held_out = (
        {normal(text) for texts in found["heldout"].texts(SCAN_ROWS) for text in texts} if "heldout" in found else set()
    )
    index, texts = _read(found["prompts"], held_out, config.data.allow_overlap)
    readers = {name: found[name] for name in ("encoder", "reward") if name in found}
    if gpus and torch.cuda.is_available() and not fit.undecided(config):  # else :func:`fit.here` looks, too
        cards = range(torch.cuda.device_count())
        advice.check(config, min(torch.cuda.get_device_properties(i).total_memory for i in cards) / 1e9)
    if config.data.cache:
        room("data.cache", local_folder("data.cache", config.data.cache))
    if output is None:
        room("output", RunFolder.at("output", config.output).path)
    else:  # the next checkpoint is as large as the last, beside it until it is whole
        last = max(output.glob("checkpoints/step-*"), default=None)
        size = sum(file.stat().st_size for file in last.glob("*")) if last else 0
        room("--output", output, max(LEAST_FREE, size))
    if cut := [text for name, reader in readers.items() if (text := _cut(name, reader.tokenizers() or {}, texts))]:
        note(
            f"of the first {len(texts):,} prompts, longer than what is read of them: {'; '.join(cut)}. The rest is cut off."
        )
    return index


def opened(config: Config, fetch: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Prompts, held-out ones, backbone ("encoder"), reward, judge, anchor, control by name, looked at; and what is wrong with others.

    Args:
        fetch: models of a hub are downloaded, unless something before them is wrong.
    """
    data, path = config.data, config.evaluation.control
    looks: dict[str, Callable[[], Any]] = {"prompts": lambda: open_prompts(config)}
    if data.heldout:
        looks["heldout"] = lambda: PromptIndex.open(data.heldout or "", data.column, data.id_column, "data.heldout")
    looks["encoder"] = lambda: _whole("backbone", config.backbone, fetch and not wrong)
    for name, reward in (("reward", config.reward if config.needs_reward else None), ("judge", config.judge)):
        if reward is not None:
            looks[name] = partial(lambda reward: _whole("reward", reward, fetch and not wrong), reward)
    if anchor := config.train.anchor:
        looks["anchor"] = lambda: "encoder" not in found or teacher_pairs.look(anchor, found["encoder"].latent_shape)
    if path:
        looks["control"] = lambda: control.read(path) if control.kept(path) else find_export(path)
    found, wrong = dict[str, Any](), list[str]()
    for name, look in looks.items():
        try:
            found[name] = look()
        except DIDRError as error:  # rewards know themselves as `reward`
            told = str(error)
            wrong.append(re.sub(r"\breward\.(?=[a-z]+[=:\[])", "judge.", told) if name == "judge" else told)
            key = "backbone" if name == "encoder" else name
            wrong += [
                text for text in _absent(key, getattr(config, key, None)) if text.partition(":")[0] not in wrong[-1]
            ]
    return found, wrong


def _absent(key: str, component: object) -> Iterator[str]:
    """Of a component, whose own look ends at the first mistake: each of its places where nothing is."""
    for at, value in hub.texts(key, component.model_dump() if isinstance(component, Component) else {}):
        if hub.is_place(value) and "://" not in value and not locate(value).exists():
            yield f"{at}={value!r}: no such file or folder here."


def readers_of(config: Config) -> dict[str, Any]:
    """Backbone and reward, built and not loaded: who reads prompts."""
    found = {"encoder": build("backbones", config.backbone)}
    return found | ({"reward": build("rewards", config.reward)} if config.needs_reward and config.reward else {})


def _whole(key: str, config: Component, fetch: bool) -> Any:
    """The component after a look at its files. With ``fetch`` they are downloaded, where they are a hub's and not all here."""
    for again in (False, True):
        try:
            made = build(f"{key}s", config)
            made.check()
            return made
        except DIDRError:
            if again or not fetch or not hub.fetch(key, config.model_dump()):
                raise
    raise AssertionError


def _read(index: PromptIndex, held_out: set[str], allowed: bool) -> tuple[PromptIndex, list[str]]:
    """``index`` with digest and overlap, after a look at the first :data:`SCAN_ROWS` texts; and the first :data:`COUNTED` of them."""
    digest, first, shared, seen = hashlib.blake2b(digest_size=8), list[str](), set[str](), 0
    for texts in index.texts(SCAN_ROWS):
        digest.update("\n".join(texts).encode())
        first += texts[: COUNTED - len(first)]
        shared |= held_out.intersection(map(normal, texts)) if held_out else set()
        seen += len(texts)
    told = f"{len(shared):,} of {len(held_out):,} held-out prompts are among the {'first ' * (seen < len(index))}{seen:,} training prompts"
    if shared and not allowed:
        raise DIDRError(
            f"data.heldout: {told}, e.g. {min(shared)!r}. Scores of these say nothing of new prompts. Leave them out (`didr prompts "
            f"TRAINING --out DIR --against HELDOUT --drop`, data.prompts=DIR), or say data.allow_overlap=true."
        )
    return replace(index, digest=digest.hexdigest(), overlap=told if held_out else ""), first


def _cut(name: str, tokenizers: Mapping[Path, int], texts: Sequence[str]) -> str:
    counts = {tokens: longer_than(folder, tokens, texts) for folder, tokens in tokenizers.items()}
    tokens = max(counts, key=lambda tokens: counts[tokens], default=0)
    return f"{counts[tokens]:,} by the {name} ({tokens} tokens)" if tokens and counts[tokens] else ""
