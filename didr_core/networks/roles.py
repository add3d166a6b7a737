"""Who shares weights: generator, teaching assistant (TA) and reference as full copies, or as adapters on a frozen base (:mod:`lora`)."""

from __future__ import annotations

import copy
import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from didr_core.config import Component, Dtype, Recompute, Roles
from didr_core.networks.fsdp import shard
from didr_core.networks.lora import LoRA, Mode, add_adapter
from didr_core.types import Backbone, DIDRError


@dataclass(frozen=True)
class Networks:
    """What the learner trains and reads. Modules of different roles may share storage."""

    generator: nn.Module
    assistant: nn.Module
    reference: nn.Module
    ema: nn.Module  # the generator itself where no average is kept


def starts_as_reference(backbone: Component) -> bool:
    """Whether the generator of a backbone's config starts from the reference's own weights: ``generator: null``, no ``lora``."""
    return getattr(backbone, "generator", "its own") is None and getattr(backbone, "lora", None) is None


def networks(
    backbone: Backbone,
    config: Component,
    roles: Roles,
    *,
    device: torch.device,
    seed: int,
    ema: bool,
    workers: int = 1,
) -> Networks:
    """Load every role of ``roles`` onto ``device``, split over ``workers`` where it says so.

    Args:
        config: the backbone's. seed: of the adapters' first factor (the second is zero, so a role starts as its base).
        ema: keep a running average of the generator (float32).

    Raises:
        DIDRError: no layer matches ``roles.targets``, or the family cannot do what is asked.
    """
    load = functools.partial(_load, backbone, device)
    sharded = roles.fsdp and workers > 1
    of_trained = functools.partial(
        _load, backbone, torch.device("cpu") if sharded else device
    )  # then a part of it there
    place = functools.partial(_shard, device=device) if sharded else lambda network: network
    shared = roles.generator == "lora" and starts_as_reference(config)
    generator: nn.Module
    assistant: nn.Module
    base = load("reference", roles.dtype.reference)
    average: nn.Module
    if roles.generator == "lora":
        root = base if shared else load("generator", roles.dtype.generator)
        generator = add_adapter(root, "generator", roles, backbone, seed)
        average = add_adapter(root, "ema", roles, backbone, seed).float().requires_grad_(False) if ema else generator
    else:
        generator = of_trained("generator", roles.dtype.generator)
        average = place(copy.deepcopy(generator).float().requires_grad_(False)) if ema else generator
        place(generator.requires_grad_(True))
    if roles.assistant == "lora":
        assistant = add_adapter(base, "assistant", roles, backbone, seed)
    else:
        assistant = place(of_trained("assistant", roles.dtype.assistant))
    assistant.requires_grad_(True)
    reference = LoRA(base, None) if shared or roles.assistant == "lora" else base
    if roles.gradient_checkpointing in (True, "generator"):
        for network in {id(n): n for n in map(_root, (generator, assistant, reference, average))}.values():
            _checkpoint(network, roles.gradient_checkpointing)
    if roles.gradient_checkpointing == "generator":
        Mode.of(_root(assistant)).keeps = ("assistant" if roles.assistant == "lora" else None,)
    return Networks(generator, assistant, reference, average)


def start(backbone: Backbone, config: Component, roles: Roles, generator: nn.Module, device: torch.device) -> nn.Module:
    """The generator that training started from; costs nothing where its base is still there."""
    if isinstance(generator, LoRA):
        return LoRA(generator.base, None)
    return load_start(backbone, config, roles, device)


def load_start(backbone: Backbone, config: Component, roles: Roles, device: torch.device) -> nn.Module:
    """The same from its files, in the precision that training reads it in."""
    shared = roles.generator == "lora" and starts_as_reference(config)
    return _load(backbone, device, "generator", roles.dtype.reference if shared else roles.dtype.generator)


def bare_generator(backbone: Backbone, config: Component, roles: Roles) -> nn.Module:
    """The generator alone, float32 on the CPU, ready for the state of a checkpoint: the whole network, or an adapter on its base, whose
    numbers are those that training rounded them to."""
    if roles.generator == "full":
        return backbone.load_network("generator")
    base = load_start(backbone, config, roles, torch.device("cpu")).float()
    return add_adapter(base, "generator", roles, backbone, 0)


def filled(backbone: Backbone, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A generator on ``device`` that holds ``state``, in its type."""
    network = backbone.load_network("generator").to(next(iter(state.values())).dtype).requires_grad_(False)
    network.load_state_dict(state)
    return network.to(device)


def _load(backbone: Backbone, device: torch.device, role: str, dtype: Dtype) -> nn.Module:
    network = backbone.load_network(role).requires_grad_(False)
    return network.to(device) if dtype == "float32" else network.to(device, getattr(torch, dtype))


def _shard(network: nn.Module, device: torch.device) -> nn.Module:
    Mode.of(network).sharded = weakref.ref(network)
    return shard(network, device)


def _root(network: nn.Module) -> nn.Module:
    return network.base if isinstance(network, LoRA) else network


def _checkpoint(network: nn.Module, asked: Recompute) -> None:
    enable = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None:
        raise DIDRError(
            f"roles.gradient_checkpointing={str(asked).lower()}: {type(network).__name__} has no activation checkpointing. "
            "Use roles.gradient_checkpointing=false."
        )
    enable(gradient_checkpointing_func=Mode.of(network).checkpoint)
