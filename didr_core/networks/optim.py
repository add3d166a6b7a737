"""How trained weights move: AdamW on float32, on float32 masters of bfloat16 weights, or on bfloat16 weights with stochastic rounding.

bfloat16 has 8 significant bits: of weights of size 0.02, one in a hundred changes under an Adam step of 5e-7, the rest stay for ever.
A float32 master copy keeps what rounding drops; stochastic rounding is right on average and needs no copy. Bytes a trained parameter
(weight + gradient + moments + master): float32 16, master 18, stochastic 12; 8-bit moments save 6 on float32 and master; without first
moment (betas[0] = 0) stochastic needs 8.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from didr_core.types import DIDRError

if TYPE_CHECKING:
    from didr_core.config import Config, Optim

Update = Literal["master", "stochastic"]


def check(config: Config) -> None:
    """Raises DIDRError where the optimizer that ``config`` names is not installed, or cannot do what it says."""
    for key, settings in (("generator", config.generator), ("assistant", config.assistant)):
        if settings.optimizer != "adamw8bit":
            continue
        full, usual, wrong = getattr(config.roles, key) == "full", f"{key}.optimizer=adamw", ""
        if importlib.util.find_spec("bitsandbytes") is None:
            wrong = f"bitsandbytes is not installed. Install it (`pip install bitsandbytes`; CUDA), or use {usual}"
        elif full and config.roles.update == "stochastic":
            less = "with betas[0]=0 it keeps one moment only"
            wrong = f"does not round stochastically. Use roles.update=master, or {usual} ({less})"
        elif full and config.roles.fsdp:
            wrong = f"bitsandbytes cannot update weights that are split over workers. Use {usual}, or roles.fsdp=false"
        if wrong:
            raise DIDRError(f"{key}.optimizer='adamw8bit': {wrong}.")


class Weights:
    """The trained parameters of a network in the precision that updates need; what optimizer, average and checkpoints see.

    float32 parameters stand for themselves. A bfloat16 one has a float32 master: its gradients are gathered there (so micro-batches add up
    in float32), and :meth:`publish` rounds the master into the network after an update. Gradients of a whole network are gathered one by
    one, as backward makes them; those of an adapter (``small``) lie in one piece that :meth:`gather` adds in one operator.
    """

    def __init__(self, network: nn.Module, update: Update = "master", small: bool = False) -> None:
        self.network = network
        self.values: dict[str, Tensor] = {}
        self._rounded: list[tuple[Tensor, Tensor]] = []
        self._gradients: tuple[Tensor, Tensor] | None = None
        for name, p in network.named_parameters():
            if not p.requires_grad:
                continue
            self.values[name] = p
            if p.dtype == torch.bfloat16 and update == "master":
                master = self.values[name] = p.detach().float().requires_grad_()
                self._rounded.append((p, master))
                if not small:
                    p.register_post_accumulate_grad_hook(_gather(master))
        if small and self._rounded:
            self._lay_out_gradients()

    def _lay_out_gradients(self) -> None:
        """Views of one tensor for the gradients of all parameters, of another for those of all masters."""
        sizes = [p.numel() for p, _ in self._rounded]
        device = self._rounded[0][0].device
        own, summed = (torch.zeros(sum(sizes), dtype=d, device=device) for d in (torch.bfloat16, torch.float32))
        for (p, master), mine, total in zip(self._rounded, own.split(sizes), summed.split(sizes), strict=True):
            p.grad, master.grad = mine.view_as(p), total.view_as(p)
        self._gradients = own, summed

    def zero_gradients(self) -> None:
        """Before the first backward pass of an update."""
        held = {id(v): v.grad for v in (*self.values.values(), *self.network.parameters()) if v.grad is not None}
        if held:
            torch._foreach_zero_(list(held.values()))

    def gather(self) -> None:
        """After every backward pass: its gradients to the masters."""
        if self._gradients is not None:
            own, summed = self._gradients
            summed += own
            own.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """Masters to the network."""
        if self._rounded:
            rounded, masters = map(own_parts, zip(*self._rounded, strict=True))
            torch._foreach_copy_(rounded, masters)

    def state_dict(self) -> dict[str, Tensor]:
        """The network's, with masters in place of what is rounded from them."""
        return self.network.state_dict() | (dict(self.values) if self._rounded else {})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.network.load_state_dict(state)
        if self._rounded:
            for name, value in self.values.items():
                value.copy_(state[name])


def _gather(master: Tensor) -> Callable[[Tensor], None]:
    def gather(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return gather


def optimizer(weights: Weights, settings: Optim, seed: int) -> torch.optim.Optimizer:
    """AdamW as ``settings`` says, over ``weights``; ``seed`` is that of stochastic rounding, the same on every rank."""
    values = list(weights.values.values())
    options: dict[str, Any] = settings.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    made: torch.optim.Optimizer
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]

        made = AdamW8bit(values, **options)
    elif any(v.dtype == torch.bfloat16 for v in values):
        made = StochasticAdamW(values, **options, seed=seed)
    else:
        # fused on GPUs: torch's default there makes a copy of all weights while it updates them
        made = torch.optim.AdamW(values, **options, fused=all(v.is_cuda for v in values) or None)
    made.register_step_post_hook(lambda *_: weights.publish())
    return made


def rate(settings: Optim, updates: int, done: float) -> float:
    """Share of the learning rate after ``updates`` of the network and the share ``done`` of the run: up, constant, down, all linear."""
    warm = min(1.0, (updates + 1) / settings.warmup) if settings.warmup else 1.0
    left = (1 - done) / settings.decay if settings.decay else 1.0
    return warm * min(1.0, left)


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Make the moments that a first update makes, where there are none, to have something to load into. Weights stay as they are."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()  # it may be a view
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def below_eps(optimizer: torch.optim.Optimizer) -> float:
    """Share of weights whose ``sqrt(v)``, of Adam's bias-corrected second moment, is below ``eps``: it divides their update then.

    Of split weights those of this process are counted; weights without such a moment (8-bit, not updated yet) are not. 0 where none has.
    """
    few, many = 0.0, 0
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            if "exp_avg_sq" in state:
                (moment,) = own_parts([state["exp_avg_sq"]])
                seen = 1 - group["betas"][1] ** float(state.get("step", group.get("updates", 1)))
                few += float((moment.float() < seen * group["eps"] ** 2).sum())
                many += moment.numel()
    return few / many if many else 0.0


AT_ONCE = 2**25
"""Weights that :class:`StochasticAdamW` has in float32 at a time: enough for a GPU not to wait for its host, three copies of 0.13 GB."""


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose arithmetic and moments are float32 and whose bfloat16 weights are rounded stochastically: right on average, no master.

    Random bits depend on ``seed`` and the number of updates alone, so that every rank and every resumed run rounds alike. ``betas[0] = 0``
    keeps no first moment. About :data:`AT_ONCE` weights are in float32 at a time.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed, "updates": 0}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["updates"] += 1
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            device = "cpu" if moved[0].is_meta else moved[0].device
            bits = torch.Generator(device).manual_seed(group["seed"] * 1_000_003 + group["updates"])
            for part in in_parts(moved, AT_ONCE):
                values = self._updated(part, group)
                if part[0].dtype == torch.bfloat16:
                    values = stochastic_round(values, bits)
                torch._foreach_copy_(part, _laid_out(values, part))

    def _updated(self, part: list[Tensor], group: dict[str, Any]) -> Tensor:
        """The float32 values of parameters after the update, one after the other ``[elements]``: a call for all."""
        (beta1, beta2), n = group["betas"], group["updates"]
        gradient, size, value = torch.empty(3, sum(p.numel() for p in part), device=part[0].device)
        gradients, values = _laid_out(gradient, part), _laid_out(value, part)
        for p in part:
            if not self.state[p]:
                self.state[p] = {
                    name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")[beta1 == 0 :]
                }
        torch._foreach_copy_(gradients, [p.grad for p in part if p.grad is not None])
        squares = [self.state[p]["exp_avg_sq"] for p in part]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        torch._foreach_copy_(_laid_out(size, part), squares)
        size.div_(1 - beta2**n).sqrt_().add_(group["eps"])
        if beta1 > 0:
            means = [self.state[p]["exp_avg"] for p in part]
            torch._foreach_lerp_(means, gradients, 1 - beta1)
            torch._foreach_copy_(gradients, means)
            gradient.div_(1 - beta1**n)
        torch._foreach_copy_(values, part)
        return value.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(gradient, size, value=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast moments to the type of their bfloat16 weight."""
        moments = {i: {k: v.float() for k, v in s.items()} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, values in moments.items():
            p = parameters[i]
            self.state[p] = {k: torch.empty_like(p, dtype=torch.float32).copy_(v) for k, v in values.items()}


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of tensors that are split over workers what this process holds; others as they are."""
    return [getattr(t, "_local_tensor", t) for t in tensors]


def in_parts(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """In order, of one dtype each and about ``most`` elements: a part ends with the tensor that reaches it."""
    part: list[Tensor] = []
    size = 0
    for t in tensors:
        if part and t.dtype != part[0].dtype:
            yield part
            part, size = [], 0
        part.append(t)
        size += t.numel()
        if size >= most:
            yield part
            part, size = [], 0
    if part:
        yield part


def _laid_out(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` with the shapes and strides of ``like``, which have no gaps: so calls on lists of both are one launch."""
    parts = flat.split([t.numel() for t in like])
    return [part.as_strided(t.size(), t.stride(), part.storage_offset()) for part, t in zip(parts, like, strict=True)]


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 to one of its two bfloat16 neighbours, nearer ones more often: the expectation is ``x``.

    bfloat16 is the upper half of a float32, so a uniform 16-bit number is added to the lower half before it is cut off.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()
