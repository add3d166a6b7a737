"""`didr pairs` writes what the teacher makes; `train.anchor` reads it, and says what is wrong with a file in the first second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from didr_core import config as configs
from didr_core.config import Anchor, build
from didr_core.data import teacher_pairs
from didr_core.data.prompts import open_prompts
from didr_core.diffusion import sampling
from didr_core.evaluate.pairs import _small, make_pairs
from didr_core.plan.preflight import preflight
from didr_core.train.distributed import Single
from didr_core.types import DIDRError


def test_pairs_are_the_guided_teachers(tmp_path: Path) -> None:
    config = configs.load("tiny", ["evaluation.teacher_steps=2", "train.anchor=null", "seed=5"])
    told: list[int] = []

    def kill(made: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pairs(config, 3, tmp_path / "pairs.safetensors", batch=2, tell=kill)
    assert len(list((tmp_path / ".pairs.latents").rglob("*.npz"))) == 2, "what a killed call has made"
    make_pairs(config, 3, tmp_path / "pairs.safetensors", batch=2, tell=told.append)
    made = load_file(tmp_path / "pairs.safetensors")
    assert (tmp_path / "pairs.safetensors").stat().st_mode & 0o044, "others may read it"
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.safetensors"]
    assert told == [2, 3] and {v.dtype for v in made.values()} == {torch.float16}

    backbone = build("backbones", config.backbone)
    backbone.load_text()
    condition = backbone.encode([prompt.prompt for prompt in open_prompts(config).read(range(3), 5)])
    teacher = sampling.reference(backbone, backbone.load_network("reference").eval(), 2, 2.0)
    expected = teacher(condition, made["z"].float())
    torch.testing.assert_close(made["x0"].float(), expected, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(made["condition.pooled"].float(), condition.tensors["pooled"], atol=1e-2, rtol=1e-2)

    pairs = teacher_pairs.TeacherPairs(
        Anchor(pairs=str(tmp_path / "pairs.safetensors"), weight=1.0, batch=8), backbone.latent_shape, "cpu"
    )
    z, x0, drawn, share = pairs.draw(0, 0, Single())
    assert z.shape == x0.shape == (8, *backbone.latent_shape) and share == 1
    assert (
        drawn.tensors.keys() == condition.tensors.keys() and z.dtype == drawn.tensors["pooled"].dtype == torch.float32
    )


def test_what_cannot_be_written_is_said_first_and_large_numbers_stay(tmp_path: Path) -> None:
    config = configs.load("tiny", ["train.anchor=null", "backbone.pipeline=none"])
    (tmp_path / "file").touch()
    for out, told in ((tmp_path, "a folder. Expected a file"), (tmp_path / "file" / "p", "cannot write")):
        with pytest.raises(DIDRError, match=f"--out .*{told}"):
            make_pairs(config, 3, out)
    large = torch.tensor([1.0, 7e4])
    assert torch.equal(_small(large), large) and _small(large[:1]).dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x0": None}, "expected tensors z, x0, condition.<name>; found condition.c, z"),
        ({"condition.c": None}, "found x0, z"),
        ({"x0": torch.zeros(3, 4, 4, 4)}, r"x0 is \[3, 4, 4, 4\], for latents of this backbone \[3, 4, 8, 8\]"),
        ({"condition.c": torch.zeros(2, 5)}, r"condition.c is \[2, 5\]"),
    ],
)
def test_files_that_do_not_fit(change: dict[str, torch.Tensor | None], told: str, tmp_path: Path) -> None:
    whole = {"z": torch.zeros(3, 4, 8, 8), "x0": torch.zeros(3, 4, 8, 8), "condition.c": torch.zeros(3, 5)} | change
    save_file({name: value for name, value in whole.items() if value is not None}, tmp_path / "p")
    with pytest.raises(DIDRError, match=rf"train.anchor.pairs='.*': .*{told}.* `didr pairs"):
        teacher_pairs.look(Anchor(pairs=str(tmp_path / "p"), weight=1.0), (4, 8, 8))


def test_preflight_looks_at_the_pairs(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("no tensors")
    for file, told in (("p", "cannot be read as safetensors"), ("none", "no such file")):
        with pytest.raises(DIDRError, match=f"train.anchor.pairs=.*{told}"):
            preflight(configs.load("tiny", [f"train.anchor.pairs={tmp_path / file}"]))
    preflight(configs.load("tiny"))
