"""The Z-Image backbone against the stock pipeline and the stock scheduler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from didr_core.backbones.zimage import ZImage, shift_of
from didr_core.diffusion.schedule import diffuse
from didr_core.types import DIDRError
from didr_core.world import random_models

PROMPTS = ["a red circle", "two blue rings above a very green square, seen from far away"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models.zimage(tmp_path_factory.mktemp("zimage") / "pipeline")


def backbone(folder: Path, **changes: object) -> ZImage:
    options = {"resolution": 64, "max_tokens": 128, "text_dtype": "float32"} | changes
    return ZImage(ZImage.Config(pipeline=str(folder), **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ready(folder: Path) -> ZImage:
    """With text encoder and decoder."""
    made = backbone(folder)
    made.load_text()
    made.load_decoder()
    return made


def noise(ours: ZImage, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *ours.latent_shape, generator=torch.Generator().manual_seed(0))


def stock(folder: Path, z: torch.Tensor, prompts: list[str] = PROMPTS, **options: object) -> torch.Tensor:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 0.0, "height": 64, "width": 64, "max_sequence_length": 128} | options
    return pipe(list(prompts), latents=z, output_type="pt", **settings).images  # type: ignore[no-any-return]


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-6), (4, 5e-6)])  # several steps: times are rounded elsewhere
def test_generation_equals_the_stock_pipeline(folder: Path, ready: ZImage, steps: int, tolerance: float) -> None:
    ours = backbone(folder, steps=steps)
    z = noise(ours)
    with torch.no_grad():
        latent = ours.generate(ours.load_network("generator"), z, ready.encode(PROMPTS))
        mine = ready.decode(latent)
    theirs = stock(folder, z, num_inference_steps=steps)
    assert theirs.shape == mine.shape == (2, 3, 64, 64)
    assert (mine - theirs).abs().max() <= tolerance
    assert (latent - z).abs().max() > 0.1  # a network that does nothing would pass


def test_sigmas_and_shift_are_the_stock_schedulers(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    turbo = FlowMatchEulerDiscreteScheduler(shift=3.0)
    turbo.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert backbone(folder, steps=4, shift=3.0).sigmas() == pytest.approx(turbo.sigmas.tolist(), abs=1e-6)
    assert backbone(folder, steps=4, shift=3.0).sigmas() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert backbone(folder).schedule.shift == 6.0 == backbone(folder).shift
    for kind in ("exponential", "linear"):
        dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        dynamic.set_timesteps(sigmas=[0.8, 0.3], mu=0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256))
        shift = shift_of(dynamic.config, 1024, "here")
        expected = [shift * u / (1 + (shift - 1) * u) for u in (0.8, 0.3)]
        assert dynamic.sigmas[:2].tolist() == pytest.approx(expected, abs=1e-6), kind
    with pytest.raises(DIDRError, match="use_karras_sigmas"):
        shift_of({"use_karras_sigmas": True}, 16, "here")


def test_a_denoising_chain_equals_the_stock_pipeline_with_guidance(folder: Path, ready: ZImage) -> None:
    """Velocity and time conventions, the unconditional prompt, and the offset by one of the stock guidance scale."""
    from didr_core.diffusion.sampling import sample_reference

    network = ready.load_network("reference")
    z = noise(ready)
    mine = ready.decode(sample_reference(ready, network, ready.encode(PROMPTS), z, steps=3, guidance=3.5))
    theirs = stock(folder, z, num_inference_steps=3, guidance_scale=2.5)
    assert (mine - theirs).abs().max() <= 2e-5
    unguided = stock(folder, z, num_inference_steps=3)
    assert (unguided - theirs).abs().max() > 1e-3


class Oracle(torch.nn.Module):
    """Answers with the velocity of a known pair, and remembers what it was told."""

    def __init__(self, x0: torch.Tensor, eps: torch.Tensor) -> None:
        super().__init__()
        self.out, self.times = x0 - eps, torch.zeros(0)

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, captions: object, return_dict: bool) -> object:
        self.times = t
        return ([row.unsqueeze(1) for row in self.out],)


def test_x0_inverts_the_forward_process_and_time_runs_from_noise_to_clean(ready: ZImage) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    condition = ready.encode(PROMPTS)
    x0, eps = noise(ready), torch.randn(2, *ready.latent_shape)
    t = torch.tensor([0.1, 0.9])
    x_t = diffuse(ready.schedule, x0, eps, t)
    oracle = Oracle(x0, eps)
    assert torch.allclose(ready.x0(oracle, x_t, t, condition), x0, atol=1e-5)
    s = 6 * t / (1 + 5 * t)
    assert torch.allclose(oracle.times, 1 - s, atol=1e-6)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)  # the velocity that it steps with is the negated answer
    scheduler.set_timesteps(sigmas=[0.1])
    level = scheduler.sigmas[0]
    x = (1 - level) * x0 + level * eps
    assert torch.allclose(scheduler.step(-(x0 - eps), scheduler.timesteps[0], x).prev_sample, x0, atol=1e-5)


def test_conditions_are_padded_tensors_that_carry_the_empty_prompt(folder: Path, ready: ZImage) -> None:
    condition = ready.encode(PROMPTS)
    shapes = {k: tuple(v.shape) for k, v in condition.tensors.items()}
    alone = [ready.encode([p]) for p in PROMPTS]
    lengths = [int(c.tensors["length"]) for c in alone]
    assert shapes["prompt_embeds"] == (2, 128, 24) and condition.tensors["length"].tolist() == lengths
    assert lengths[0] < 64 < lengths[1]  # one and three times 32 tokens: a mask is needed
    assert condition.tensors["prompt_embeds"][0, lengths[0] :].abs().max() == 0
    bare = backbone(folder)  # a trainer: no text encoder
    null, empty = bare.null(condition), ready.encode(["", ""])
    assert all(torch.equal(null.tensors[k], empty.tensors[k]) for k in empty.tensors) and bare._text is None
    network, z = bare.load_network("generator"), noise(bare)
    with torch.no_grad():
        together = bare.generate(network, z, condition)
        for i, c in enumerate(alone):  # neither padding nor batch mates are seen
            assert torch.allclose(together[i : i + 1], bare.generate(network, z[i : i + 1], c), atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_gradient_goes_through_the_last_steps_only(folder: Path, ready: ZImage) -> None:
    """DRaFT-K: with one of two, it is that of the last step from a constant; with both, the whole chain's."""
    condition = ready.encode(PROMPTS[:1])

    def gradient(**options: object) -> torch.Tensor:
        ours = backbone(folder, steps=2, **options)
        network = ours.load_network("generator")
        ours.generate(network, noise(ours, 1), condition).square().mean().backward()
        return network.all_x_embedder["2-1"].weight.grad  # type: ignore[no-any-return, union-attr, index]

    ours = backbone(folder, steps=2)
    network, z = ours.load_network("generator"), noise(ours, 1)
    sigma = torch.tensor([ours.sigmas()[1]])
    with torch.no_grad():
        x = z + (1 - sigma) * ours._call(network, z, torch.ones(1), condition)
    (x + sigma * ours._call(network, x, sigma, condition)).square().mean().backward()
    by_hand = network.all_x_embedder["2-1"].weight.grad  # type: ignore[union-attr, index]
    one, both = gradient(), gradient(gradient_steps=2)
    assert (one - by_hand).abs().max() < 1e-4 * one.abs().max()
    assert (one - both).abs().max() > 0.01 * one.abs().max()
    with pytest.raises(ValueError, match="gradient_steps=3"):
        ZImage.Config(pipeline="x", steps=2, gradient_steps=3)


def test_a_bfloat16_network_is_converted_in_float32(folder: Path, ready: ZImage) -> None:
    condition, z = ready.encode(PROMPTS), noise(ready)
    with torch.no_grad():
        full = ready.generate(ready.load_network("generator"), z, condition)
        half = ready.generate(ready.load_network("generator").bfloat16(), z, condition)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.1
    assert not torch.equal(half, half.bfloat16().float())  # z was never rounded


def test_stock_diffusers_samples_the_export(folder: Path, ready: ZImage, tmp_path: Path) -> None:
    ours = backbone(folder, generator=str(folder), shift=3.0, steps=4)
    network = ours.load_network("generator")
    with torch.no_grad():  # a trained generator is not the reference, and half precision must not decide the test
        for i, weight in enumerate(network.parameters()):
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
            weight.copy_(weight.bfloat16().float())
        z = noise(ours)
        mine = ours.generate(network, z, ready.encode(PROMPTS))
    out = tmp_path / "export"
    ours.export(network, str(out))
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 3.0 and scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    single = out / "didr_4step_transformer_bf16.safetensors"
    state = load_file(single)
    assert state.keys() == network.state_dict().keys() and {v.dtype for v in state.values()} == {torch.bfloat16}
    for generator in (None, str(out / "transformer"), str(single)):
        again = backbone(out, steps=4, generator=generator)
        loaded = again.load_network("generator").state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())
        assert again.shift == 3.0
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(
        out, torch_dtype=torch.float32
    )  # text in bfloat16 weights: embeds are handed over
    embeds = [
        e[:n] for e, n in zip(*(ready.encode(PROMPTS).tensors[k] for k in ("prompt_embeds", "length")), strict=True)
    ]
    theirs = pipe(
        prompt_embeds=embeds,
        latents=z,
        num_inference_steps=4,
        guidance_scale=0.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert (mine - theirs).abs().max() <= 1e-5


def comfy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' own layout, as the popular single files have it: query, key and value in one matrix, other names."""
    out = {}
    for name, value in state.items():
        if ".to_q." in name:
            parts = [state[name.replace("to_q", f"to_{p}")] for p in "qkv"]
            name, value = name.replace("to_q", "qkv"), torch.cat(parts)
        elif ".to_k." in name or ".to_v." in name:
            continue
        for ours, theirs in (("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"), ("all_x_embedder.2-1", "x_embedder"),
                             ("all_final_layer.2-1", "final_layer")):  # fmt: skip
            name = name.replace(ours, theirs)
        out[f"model.diffusion_model.{name}"] = value.clone()
    return out


def test_single_files_of_three_layouts_load_and_others_are_refused(folder: Path, tmp_path: Path) -> None:
    expected = backbone(folder).load_network("generator").state_dict()
    save_file({f"transformer.{k}": v for k, v in expected.items()}, tmp_path / "prefixed.safetensors")
    save_file(comfy(dict(expected)), tmp_path / "comfy.safetensors")
    torch.save({"state_dict": {f"module.{k}": v.bfloat16() for k, v in expected.items()}}, tmp_path / "trainer.bin")
    for name, dtype in (
        ("prefixed.safetensors", torch.float32),
        ("comfy.safetensors", torch.float32),
        ("trainer.bin", torch.bfloat16),
    ):
        loaded = backbone(folder, generator=str(tmp_path / name)).load_network("generator")
        assert loaded.state_dict().keys() == expected.keys(), name
        assert all(torch.equal(v, expected[k].to(dtype).float()) for k, v in loaded.state_dict().items()), name
    some = dict(list(expected.items())[:-1]) | {"more": torch.zeros(1)}
    save_file(some, tmp_path / "cut.safetensors")
    with pytest.raises(DIDRError, match=r"1 missing .*1 unexpected \(more\)"):
        backbone(folder, generator=str(tmp_path / "cut.safetensors"))  # before anything is loaded
    for change, match in (
        (lambda s: s.pop(next(k for k in s if k.endswith("w2.weight"))), r"tensors 1 missing \(.*w2\.weight\)"),
        (
            lambda s: next(v for k, v in s.items() if k.endswith("norm1.weight")).fill_(float("nan")),
            r"norm1\.weight holds NaN",
        ),
    ):
        change(original := {k: v.clone() for k, v in comfy(dict(expected)).items()})
        save_file(original, tmp_path / "broken.safetensors")
        with pytest.raises(DIDRError, match=match):
            backbone(folder, generator=str(tmp_path / "broken.safetensors"))


def test_turbo_beside_its_scheduler_keeps_its_own_shift(folder: Path, tmp_path: Path) -> None:
    turbo = tmp_path / "turbo"
    shutil.copytree(folder, turbo)
    config = turbo / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 3.0}))
    for generator in (turbo, turbo / "transformer"):
        made = backbone(folder, generator=str(generator), steps=4)
        assert made.shift == 3.0 and made.schedule.shift == 6.0


def test_what_does_not_fit_together_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"resolution": 72}, "resolution=72: expected a multiple of 16"),
        ({"max_tokens": 255}, "max_tokens=255: the transformer has positions for 254"),
        ({"generator": str(folder / "vae")}, "expected ZImageTransformer2DModel"),
        ({"generator": str(tmp_path / "no")}, "no such file or folder"),
        ({"decoder": str(tmp_path / "no")}, r"backbone\.decoder=.*no such folder"),
    ):
        with pytest.raises(DIDRError, match=match):
            backbone(folder, **changes)


def test_a_half_downloaded_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    """The text encoder is needed on other machines, minutes later."""
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p" / "text_encoder" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DIDRError, match="text_encoder.*Git LFS pointer"):
        backbone(tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "tokenizer")
    shutil.rmtree(tmp_path / "p" / "text_encoder")
    with pytest.raises(DIDRError, match="text_encoder/, which model_index.json names, is missing"):
        backbone(tmp_path / "p")
