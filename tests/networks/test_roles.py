"""Roles on shared bases: gradients of separate copies, memory of one base, exact resume, exports that stock diffusers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_models import prompt_shards, sdxl_folder
from small_learner import batch, learner, saved
from torch import Tensor, nn
from torch.nn import functional as F
from worker_pair import spawn_pair

from didr_core import config
from didr_core.config import Roles
from didr_core.networks import lora
from didr_core.networks.lora import LoRA
from didr_core.train import checkpoint
from didr_core.train.learner import Learner
from didr_core.types import DIDRError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_folder(tmp_path_factory.mktemp("roles") / "pipeline")


def randomise(network: nn.Module, seed: int) -> None:
    """Adapters start as nothing: fill both factors, so that roles differ."""
    torch.manual_seed(seed)
    for p in network.parameters():
        p.data.normal_(0, 0.05)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_base_gives_the_gradients_of_separate_copies(folder: Path, checkpointing: bool) -> None:
    """Generator through a TA that is differentiated in x (as DI* does) and a differentiated reference, then the TA's own loss."""
    shared = learner(folder, roles={"gradient_checkpointing": checkpointing})
    for seed, network in enumerate((shared.generator_net, shared.assistant_net)):
        randomise(network, seed)
    apart = {name: copy.deepcopy(getattr(shared, f"{name}_net")) for name in ("generator", "assistant", "reference")}
    for network in apart.values():  # a copy of the base each, without activation checkpointing
        network.base.disable_gradient_checkpointing()
        lora.Mode.of(network.base).switch = next(m.switch for m in network.base.modules() if hasattr(m, "lora_A"))
    assert apart["generator"].base is not apart["assistant"].base

    def losses(generator: nn.Module, assistant: nn.Module, reference: nn.Module) -> Tensor:
        backbone, data = shared.backbone, batch(shared)
        z = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0.1, 0.3, 0.5, 0.7])
        x0 = backbone.generate(generator, z, data.condition)
        with lora.frozen(assistant):
            told = backbone.x0(assistant, x0, t, data.condition)
        ((told - backbone.x0(reference, x0, t, data.condition)) ** 2).mean().backward()
        assert not gradients(assistant), "a frozen role took a gradient"
        loss = ((backbone.x0(assistant, x0.detach(), t, data.condition) - x0.detach()) ** 2).mean()
        loss.backward()
        return loss

    one = losses(shared.generator_net, shared.assistant_net, shared.reference_net)
    many = losses(apart["generator"], apart["assistant"], apart["reference"])
    assert one.item() == pytest.approx(many.item(), rel=1e-5)
    for name in ("generator", "assistant"):
        ours, theirs = gradients(getattr(shared, f"{name}_net")), gradients(apart[name])
        assert ours.keys() == theirs.keys() and len(ours) > 50
        assert max(g.abs().max() for g in ours.values()) > 1e-4
        for key, value in ours.items():
            assert (value - theirs[key]).abs().max() <= 1e-5 * max(1.0, theirs[key].abs().max().item()), key


def test_checkpointed_full_networks_keep_a_frozen_assistant_frozen(folder: Path) -> None:
    """Recomputation happens after the weights are trainable again: it must see them frozen."""
    grads = []
    for checkpointing in (False, True):
        full = learner(
            folder,
            algorithm={"name": "diff_instruct_star"},
            reward={"name": "toy:Treacherous", "bad": ""},
            roles={"generator": "full", "assistant": "full", "gradient_checkpointing": checkpointing},
        )
        assert full.generator_net.is_gradient_checkpointing is checkpointing  # type: ignore[comparison-overlap]
        full.step(batch(full))
        grads.append(torch.cat([p.grad.flatten() for p in full.generator_net.parameters()]))  # type: ignore[union-attr]
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[0].abs().max()


def storages(*networks: nn.Module) -> int:
    """Bytes held, each storage once."""
    held = {}
    for network in networks:
        for module in (network, network.base if isinstance(network, LoRA) else network):
            for p in module.parameters():
                held[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    return sum(held.values())


def test_memory_is_one_base_and_its_adapters(folder: Path) -> None:
    subject = learner(folder)
    base = 4 * sum(p.numel() for p in subject.backbone.load_network("reference").parameters())
    adapter = 4 * sum(p.numel() for p in subject.generator_net.parameters())
    held = storages(subject.generator_net, subject.assistant_net, subject.reference_net, subject.ema_net)
    assert 0 < adapter < base / 5
    assert held == base + 3 * adapter  # generator, its average, TA
    assert subject.generator("start").base is subject.reference_net.base  # type: ignore[union-attr]
    two = learner(folder, backbone={"generator": str(folder / "unet")})  # its own start: a base of its own
    held = storages(two.generator_net, two.assistant_net, two.reference_net, two.ema_net)
    assert held == 2 * base + 3 * adapter
    without = learner(folder, train={"ema_decay": 0})
    assert without.ema_net is without.generator_net


def test_roles_start_as_their_base_and_do_not_leak_into_it(folder: Path) -> None:
    subject = learner(folder)
    data = batch(subject)
    z = torch.randn(4, *subject.backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    bare = subject.backbone.load_network("reference")

    def made(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return subject.backbone.generate(network, z, data.condition)

    expected = made(bare)
    for which in ("generator", "ema", "start", "reference"):
        assert torch.equal(made(subject.generator(which)), expected)  # type: ignore[arg-type]
    for _ in range(3):
        subject.step(data)
    assert torch.equal(made(subject.generator("start")), expected)
    assert torch.equal(made(subject.generator("reference")), expected)
    moved, mean = made(subject.generator("generator")), made(subject.generator("ema"))
    assert (moved - expected).abs().max() > 1e-3
    assert (moved - mean).abs().max() > 1e-5


def test_checkpoints_hold_what_is_trained(folder: Path, tmp_path: Path) -> None:
    subject = learner(folder, roles={"generator": "full", "assistant": "lora"})
    subject.step(batch(subject))
    saved(subject, tmp_path, {})
    trained = sum(p.numel() for p in subject.assistant_net.parameters())
    assert sum(v.numel() for v in checkpoint.read(tmp_path, "assistant").values()) == trained < 60_000


def test_the_export_is_merged_and_the_adapter_loads_in_diffusers(folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    from didr_core.export.folder import export_run

    subject = learner(folder, roles={"dtype": {"reference": "bfloat16"}})
    assert subject.generator_net.dtype == torch.bfloat16  # type: ignore[comparison-overlap]
    randomise(subject.ema_net, 0)
    before = [p.clone() for p in subject.ema_net.base.parameters()]  # type: ignore[union-attr]
    out = export_run(subject.config, subject.backbone, subject.generator("ema"), tmp_path / "export")
    assert all(torch.equal(a, b) for a, b in zip(before, subject.ema_net.base.parameters(), strict=True))  # type: ignore[union-attr]
    data = batch(subject)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([399, 399])
    given = {
        "encoder_hidden_states": data.condition.tensors["prompt_embeds"][:2],
        "added_cond_kwargs": {"text_embeds": data.condition.tensors["pooled"][:2], "time_ids": torch.ones(2, 6)},
    }
    merged = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.load_lora_weights(out)
    with torch.no_grad():
        expected = lora.plain(subject.ema_net)(x, t, **given).sample
        bare = lora.plain(subject.reference_net)(x, t, **given).sample
        assert (expected - bare).abs().max() > 0.05
        assert (merged(x, t, **given).sample - expected).abs().max() < 2e-2  # fp16 files
        assert (pipe.unet(x, t, **given).sample - expected).abs().max() < 2e-2  # a bf16 base in training, fp32 here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_generator_reads_an_adapter_from_the_checkpoint(folder: Path, tmp_path: Path, dtype: str) -> None:
    """And merges it into the base in the numbers that it was trained on: the same file as at the end of the run."""
    from didr_core.export.sample import trained_generator
    from didr_core.train.run_folder import RunFolder

    prompts = {"prompts": str(prompt_shards(tmp_path / "prompts"))}
    subject = learner(folder, output=str(tmp_path), data=prompts, roles={"dtype": dtype})
    subject.step(batch(subject))
    randomise(subject.ema_net, 1)
    run = RunFolder.create(subject.config, str(tmp_path / "run"), "test")
    saved(subject, run.checkpoint(1), {})
    _, network, step = trained_generator(subject.config, run, "ema")
    assert step == 1
    ours, theirs = lora.plain(subject.ema_net).state_dict(), lora.plain(network).state_dict()
    assert ours.keys() == theirs.keys() == subject.backbone.load_network("generator").state_dict().keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_the_update_does_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    """Two gloo processes with half a batch each, against one."""
    spawn_pair(_worker, str(folder), str(tmp_path))
    one = learner(folder, train={"batch": 4})
    _sgd(one)
    start = [p.detach().clone() for p in one.generator_net.parameters()]
    for _ in range(2):
        one.step(batch(one))
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    moved = max((p - s).abs().max() for p, s in zip(one.generator_net.parameters(), start, strict=True))
    assert moved > 1e-5
    for p, a, b in zip(one.generator_net.parameters(), *halves, strict=True):
        assert torch.equal(a, b)
        assert (p - a).abs().max() < 1e-3 * moved


def _sgd(of: Learner) -> None:
    for name in ("generator", "assistant"):
        randomise(getattr(of, f"{name}_net"), 5)
        setattr(of, f"{name}_opt", torch.optim.SGD(getattr(of, f"{name}_net").parameters()))


def _worker(rank: int, folder: str, out: str) -> None:
    import torch.distributed as dist

    from didr_core.train import distributed as parallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    subject = learner(Path(folder), parallel.current(), train={"batch": 4}, workers={"train": 2})
    _sgd(subject)
    data = batch(subject)[2 * rank : 2 * rank + 2]  # type: ignore[misc]
    for _ in range(2):
        subject.step(data)
    torch.save([p.detach() for p in subject.generator_net.parameters()], f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DIDRError, match=r"roles\.targets=\('nothing',\)"):
        learner(folder, roles={"targets": ["nothing"]})
    assert Roles.model_validate({"dtype": "bfloat16"}).dtype.assistant == "bfloat16"
    exact = config.load("exact_2d", ["roles.assistant=lora"])
    with pytest.raises(DIDRError, match="no linear or convolution layer"):
        Learner(exact)
    with pytest.raises(DIDRError, match="has no activation checkpointing"):
        Learner(config.load("exact_2d", ["roles.gradient_checkpointing=true"]))


def test_a_linear_layer_with_adapters_is_the_plain_sum_and_so_are_its_gradients() -> None:
    """``W x + b + scale up down x`` written out, in float64: value, gradients of x and of both factors; frozen factors get none."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7)).double()
    settings = Roles(generator="lora", assistant="lora", rank=2, alpha=6)
    adapter = lora.add_adapter(base, "assistant", settings, SimpleNamespace(lora_targets=()), 0)  # type: ignore[arg-type]
    layer = base[0]
    down, up = layer.lora_A["assistant"].weight, layer.lora_B["assistant"].weight
    nn.init.normal_(up)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    plain = F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + 3.0 * x @ down.t() @ up.t()
    other = torch.randn(3, 4, 7, dtype=torch.float64)
    expected = torch.autograd.grad((plain * other).sum(), (x, down, up))
    out = adapter(x)
    assert torch.allclose(out, plain, atol=1e-12)
    found = torch.autograd.grad((out * other).sum(), (x, down, up))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(adapter(x), plain, atol=1e-12)
    with lora.frozen(adapter):
        (adapter(x) * other).sum().backward()
    assert torch.allclose(x.grad, expected[0], atol=1e-12)
    assert down.grad is None
