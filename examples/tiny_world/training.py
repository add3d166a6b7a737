"""What every training part of the build shares: the loop (:func:`train`), Muon, resumable checkpoints, a two-process launcher.

On a CPU two gloo processes with one thread each beat one process with two threads, so parts run under ``launch(worker, ...)``.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.optim.swa_utils import AveragedModel

from didr_core.config.files import replaced

BUILD_DIR = Path(__file__).parent / "_build"


def orthogonalise(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration toward the nearest semi-orthogonal matrices; update [N, rows, columns], rows <= columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, convolutions flattened to [out, rest]: torch's own takes neither them nor batches."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Matrices of one shape are orthogonalised together, each process does its share, and a sum puts the shares together."""
        for group in self.param_groups:
            shaped: dict[tuple[int, ...], list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                matrix = parameter.grad.lerp(buffer, group["momentum"]).reshape(len(parameter), -1)
                wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
                shaped.setdefault(tuple(wide.shape), []).append((parameter, wide))
            updates = [torch.zeros(len(members), *size) for size, members in shaped.items()]
            for block, members in zip(updates, shaped.values(), strict=True):
                mine = list(range(rank(), len(members), world()))
                if mine:
                    block[mine] = orthogonalise(torch.stack([members[index][1] for index in mine]))
            all_reduce(updates)
            for block, members in zip(updates, shaped.values(), strict=True):
                for update, (parameter, _) in zip(block, members, strict=True):
                    out, rest = len(parameter), parameter[0].numel()
                    scale = group["lr"] * max(1.0, out / rest) ** 0.5
                    parameter.add_((update if out <= rest else update.mT).reshape(parameter.shape), alpha=-scale)


def muon_and_adam(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    lr: float,
    adam_lr: float = 2e-3,
    adam_for: Callable[[str], bool] = lambda name: "embedding" in name or name.startswith(("conv_in", "conv_out")),
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, Adam at ``adam_lr`` for vectors and any name matched by ``adam_for`` (embeddings, both ends)."""
    hidden: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in named:
        (rest if parameter.ndim < 2 or adam_for(name) else hidden).append(parameter)
    return [Muon(hidden, lr), torch.optim.Adam(rest, adam_lr, betas=(0.9, 0.99))]


def decay(step: int, total: int, warmup: int = 20, tail: float = 0.4) -> float:
    """Learning-rate factor: short warm-up, constant, then linear to zero over the last ``tail`` (without it results look far worse)."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (total - step) / (tail * total)))


class Checkpoint:
    """One file that lets a part continue: ``objects`` by name, plus the step. Written every ``every`` seconds by rank 0, atomically."""

    def __init__(self, path: Path, objects: dict[str, Any], every: float = 120.0) -> None:
        self.path, self.objects, self.every, self.last = path, objects, every, time.monotonic()
        self.started = time.monotonic()

    def load(self) -> int:
        """Restore the objects if the file is there; returns the step to continue from."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        for name, item in self.objects.items():
            item.load_state_dict(saved[name])
        self.started -= saved["seconds"]
        return int(saved["step"])

    @property
    def seconds(self) -> float:
        """Spent on this part so far, earlier starts included."""
        return time.monotonic() - self.started

    def save(self, step: int, force: bool = False) -> None:
        """Write the objects as they are after ``step`` steps, if it is time."""
        if rank() != 0 or (not force and time.monotonic() - self.last < self.every):
            return
        state = {name: item.state_dict() for name, item in self.objects.items()}
        with replaced(self.path) as partial:
            torch.save({**state, "step": step, "seconds": self.seconds}, partial)
        self.last = time.monotonic()


def train(
    path: Path,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    seed: int,
    ema: float,
) -> float:
    """Train ``model``, which ends as its running average; resumed from ``path``. Returns the seconds it took.

    ``loss(step, rng)`` gives the loss and what to tell of it; ``rng`` depends on the seed, the step and the process only.
    """

    @torch.no_grad()
    def average(mean: Any, live: Any, updates: Any) -> None:  # warmed up, so that early weights are forgotten
        torch._foreach_lerp_(mean, live, 1 - min(ema, (1 + int(updates)) / (10 + int(updates))))

    averaged = AveragedModel(model, multi_avg_fn=average)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parts = {f"optimizer_{number}": optimizer for number, optimizer in enumerate(optimizers)}
    checkpoint = Checkpoint(path, {"model": model, "averaged": averaged, **parts})
    for step in range(checkpoint.load(), steps):
        value, told = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step * world() + rank()))
        model.zero_grad(set_to_none=True)
        value.backward()
        average_gradients(model.parameters())
        for optimizer, full in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * decay(step, steps)
            optimizer.step()
        averaged.update_parameters(model)
        if step % 100 == 0:
            numbers = " ".join(f"{name} {number:.4f}" for name, number in {"loss": value.item(), **told}.items())
            say(f"{path.stem.removesuffix('_state')} {step}/{steps} {numbers} {checkpoint.seconds:.0f}s")
        checkpoint.save(step + 1)
    model.load_state_dict(averaged.module.state_dict())
    checkpoint.save(steps, force=True)
    return checkpoint.seconds


def rank() -> int:
    """This process's number in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensors: Sequence[torch.Tensor]) -> None:
    """Their sums over the processes, in one flat message."""
    if world() > 1 and tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Mean of the gradients over the processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    all_reduce(gradients)
    torch._foreach_div_(gradients, world())


def say(text: str) -> None:
    """Print from rank 0 at once."""
    if rank() == 0:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _entry(index: int, worker: Callable[..., None], processes: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=processes)
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
        _entry(0, worker, 1, "", arguments)
        torch.set_num_threads(threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, args=(worker, processes, f"{folder}/meeting", arguments), nprocs=processes)
