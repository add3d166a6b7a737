"""What every training part of the build shares: Muon, a two-process launcher, resumable checkpoints, EMA, learning-rate decay.

On a CPU two gloo processes with one thread each beat one process with two threads, so parts run under ``launch(worker, ...)``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

BUILD_DIR = Path(__file__).parent / "_build"
WORLD_DIR = Path(__file__).parents[2] / "didr_core" / "world" / "files"


def orthogonalise(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration toward the nearest semi-orthogonal matrices; update [N, rows, columns], rows <= columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for hidden matrices (convolutions flattened to [out, rest]), Adam for the rest.

    ``named`` are (name, parameter) pairs; embeddings, vectors and any name matched by ``adam_for`` go to Adam at ``adam_lr``.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        adam_lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_for: Callable[[str], bool] = lambda name: "embedding" in name or name.startswith(("conv_in", "conv_out")),
    ) -> None:
        hidden: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in named:
            (rest if parameter.ndim < 2 or adam_for(name) else hidden).append(parameter)
        groups = [
            {
                "params": hidden,
                "lr": lr,
                "base_lr": lr,
                "muon": True,
                "momentum": momentum,
                "weight_decay": weight_decay,
            },
            {"params": rest, "lr": adam_lr, "base_lr": adam_lr, "muon": False, "momentum": 0.9, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    def scale_lr(self, factor: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adam)(group)

    def _muon(self, group: dict[str, Any]) -> None:
        shaped: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            buffer = state.setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            matrix = parameter.grad.lerp(buffer, group["momentum"]).reshape(len(parameter), -1)
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            shaped.setdefault(tuple(wide.shape), []).append((parameter, wide))  # type: ignore[arg-type]
        # Each process orthogonalises its share of the matrices; a sum puts the shares together.
        mine = {
            size: [index for index in range(len(members)) if index % world() == rank()]
            for size, members in shaped.items()
        }
        flat = torch.zeros(sum(wide.numel() for members in shaped.values() for _, wide in members))
        offset = 0
        for size, members in shaped.items():
            block = flat[offset : offset + len(members) * size[0] * size[1]].view(len(members), *size)
            offset += block.numel()
            if mine[size]:
                block[mine[size]] = orthogonalise(torch.stack([members[index][1] for index in mine[size]]))
        if world() > 1:
            dist.all_reduce(flat)
        offset = 0
        for (rows, columns), members in shaped.items():
            for parameter, _ in members:
                update = flat[offset : offset + rows * columns].view(rows, columns)
                offset += rows * columns
                out, rest = len(parameter), parameter[0].numel()
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * max(1.0, out / rest) ** 0.5
                parameter.add_((update if out <= rest else update.mT).reshape(parameter.shape), alpha=-scale)

    def _adam(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
            state["step"] += 1
            state["first"].lerp_(parameter.grad, 0.1)
            state["second"].lerp_(parameter.grad.square(), 0.01)
            first = state["first"] / (1 - 0.9 ** state["step"])
            second = state["second"] / (1 - 0.99 ** state["step"])
            parameter.addcdiv_(first, second.sqrt().add_(1e-8), value=-group["lr"])


def decay(step: int, total: int, warmup: int = 20, tail: float = 0.4) -> float:
    """Learning-rate factor: short warm-up, constant, then linear to zero over the last ``tail`` (without it results look far worse)."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (total - step) / (tail * total)))


class Ema:
    """Exponential moving average of parameters, warmed up so that early weights are forgotten."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rate: float) -> None:
        self.live = list(parameters)
        self.average = [parameter.detach().clone() for parameter in self.live]
        self.rate, self.updates = rate, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.live], 1 - rate)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for parameter, average in zip(self.live, self.average, strict=False):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.average, state["average"], strict=False):
            mine.copy_(saved)
        self.updates = state["updates"]


class Checkpoint:
    """One file that lets a part continue: ``objects`` by name, plus the step. Written every ``every`` seconds by rank 0, atomically."""

    def __init__(self, path: Path, objects: dict[str, Any], every: float = 120.0) -> None:
        self.path, self.objects, self.every, self.last = path, objects, every, time.monotonic()
        self.seconds_before = 0.0
        self.started = time.monotonic()

    def load(self) -> int:
        """Restore the objects if the file is there; returns the step to continue from."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        for name, item in self.objects.items():
            item.load_state_dict(saved[name])
        self.seconds_before = saved["seconds"]
        return int(saved["step"])

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def save(self, step: int, force: bool = False) -> None:
        if rank() != 0 or (not force and time.monotonic() - self.last < self.every):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        state = {name: item.state_dict() for name, item in self.objects.items()}
        torch.save({**state, "step": step, "seconds": self.seconds}, partial)
        os.replace(partial, self.path)
        self.last = time.monotonic()


def rank() -> int:
    """This process's number in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Mean of the gradients over the processes, in one flat all-reduce."""
    if world() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view(gradient.shape))
        offset += gradient.numel()


def say(text: str) -> None:
    """Print from rank 0 at once."""
    if rank() == 0:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _entry(index: int, worker: Callable[..., None], processes: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=index, world_size=processes)
    try:
        worker(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(worker: Callable[..., None], *arguments: Any, processes: int | None = None) -> None:
    """Run ``worker(*arguments)`` in several one-thread processes that share a gloo group (default: one per core, at most 2)."""
    processes = processes or min(2, os.cpu_count() or 1)
    if processes == 1:
        threads = torch.get_num_threads()
        _entry(0, worker, 1, 0, arguments)
        torch.set_num_threads(threads)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_entry, args=(worker, processes, port, arguments), nprocs=processes)
