"""Published layouts of the rewards at full size, and what `check` says. What they compute: test_golden.py."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_rewards as toy
from torch import Tensor
from toy_rewards import BLIP_L_16, TINY_BLIP, TINY_H, VIT_H_14, fill

from didr_core.config import build
from didr_core.config.registry import find
from didr_core.rewards import _blip, hpsv2
from didr_core.rewards._head import linear_layers
from didr_core.types import DIDRError

HEAD_WIDTHS = (24, 16, 8, 4, 1)


def reward(name: str, **options: Any) -> Any:
    return build("rewards", find("rewards", name).Config(name=name, **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files of every reward at toy size."""
    root = toy.write(tmp_path_factory.mktemp("rewards"))
    (toy.clip_tokenizer(root / "hps2") / "HPS_v2_compressed.pt").write_bytes(
        (root / "hps" / "HPS_v2.1_compressed.pt").read_bytes()
    )
    return root


# ---- published layouts at full size, without data ----


def on_meta(shapes: toy.Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def left_over(make: Callable[[], torch.nn.Module], state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    with torch.device("meta"):
        model = make()
    result = model.load_state_dict(state, strict=False, assign=True)  # shapes that differ raise
    return result.missing_keys, result.unexpected_keys


def test_hpsv2_1_loads_whole_into_a_clip_model() -> None:
    from transformers import CLIPModel

    shapes = toy.open_clip_shapes(VIT_H_14)
    state = on_meta(shapes)
    assert hpsv2.layout(state, Path("x")) == shapes
    assert round(sum(v.numel() for v in state.values()) / 1e6, 1) == 986.1
    config = hpsv2.clip_config(state)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert (config.vision_config.image_size, config.text_config.eos_token_id) == (224, 49407)
    assert left_over(lambda: CLIPModel(config), hpsv2.to_transformers(state)) == ([], [])


def test_pickscore_loads_whole_into_a_clip_model() -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 224}
    text = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
    assert left_over(lambda: CLIPModel(config), on_meta(toy.clip_model_shapes(VIT_H_14))) == ([], [])


def test_image_reward_loads_whole_into_blip() -> None:
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    state = on_meta(toy.image_reward_shapes(BLIP_L_16))
    _blip.check(Path("x"), state)
    (vision_config, text_config), (vision, text) = _blip.configs(state), _blip.to_transformers(state)
    assert (vision_config.num_attention_heads, vision_config.image_size, text_config.num_attention_heads) == (
        16,
        224,
        12,
    )
    assert left_over(lambda: BlipVisionModel(vision_config), vision) == ([], [])
    assert left_over(lambda: BlipTextModel(text_config, add_pooling_layer=False), text) == ([], [])


def test_the_aesthetic_head_is_read_whole() -> None:
    state = on_meta(toy.head_shapes(768, BLIP_L_16["head"]))
    layers = linear_layers("reward.path", Path("x"), state)
    assert [name for name, _ in layers] == [f"layers.{n}" for n in (0, 2, 4, 6, 7)]
    assert [shape for _, shape in layers] == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]


def test_check_of_a_full_size_file_takes_less_than_a_second(tmp_path: Path) -> None:
    """Full names and shapes; the data is one number a tensor, and `check` reads none of it."""
    folder = toy.clip_tokenizer(tmp_path)
    shapes = toy.open_clip_shapes(VIT_H_14)
    hollow = {k: torch.zeros((), dtype=torch.half).expand(shape) for k, shape in shapes.items()}
    torch.save({"state_dict": hollow}, folder / "HPS_v2.1_compressed.pt")
    of = reward("hpsv2", path=str(folder))
    began = time.process_time()
    of.check()
    assert time.process_time() - began < 1.0


# ---- what `check` says ----


def refused(of: Any, *words: str) -> None:
    with pytest.raises(DIDRError) as said:
        of.check()
    for word in words:
        assert word in str(said.value), (word, str(said.value))


def test_check_names_what_is_wrong_with_an_hpsv2_file(folders: Path, tmp_path: Path) -> None:
    name, good = "HPS_v2.1_compressed.pt", fill(toy.open_clip_shapes(TINY_H))
    refused(reward("hpsv2", path=str(tmp_path / "no")), "reward.path=", "no such file or folder", name)
    refused(reward("hpsv2", path=str(folders / "hps2")), name, "found: HPS_v2_compressed.pt")
    reward("hpsv2", path=str(folders / "hps2"), version="2.0").check()
    old = folders / "hps2" / "HPS_v2_compressed.pt"
    refused(reward("hpsv2", path=str(old)), "is version 2.0", "reward.version='2.1'", "Set reward.version='2.0'")

    def broken(**changes: Any) -> Any:
        state = {k: v for k, v in (good | changes).items() if v is not None}
        torch.save({"state_dict": state}, tmp_path / name)
        return reward("hpsv2", path=str(tmp_path), tokenizer=str(folders / "hps"))

    key = "visual.transformer.resblocks.1.ln_1.bias"
    refused(broken(**{key: None}), "1 missing", key, "ViT-H-14")
    refused(broken(**{key: torch.zeros(3)}), key, "[3] instead of [160]")
    refused(broken(**{"visual.proj": torch.zeros(24)}), "no matrix visual.proj")
    refused(broken(**{"visual.positional_embedding": torch.zeros(16, 160)}), "[16, 160] instead of [17, 160]")
    refused(broken(extra=torch.zeros(1)), "1 unexpected (extra)")
    refused(broken(**{"visual.conv1.weight": None}), "visual.conv1.weight", "Expected a ViT-H-14")
    narrow = fill(toy.open_clip_shapes(TINY_H | {"vision": (96, 1, 64, 8, 4)}))
    refused(broken(**narrow), "vision width 96", "80")
    broken(attn_mask=torch.zeros(16, 16)).check()
    whole = (tmp_path / name).read_bytes()
    for content, word in (
        (whole[: len(whole) // 2], "not a readable torch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(reward("hpsv2", path=str(tmp_path)), "reward.path=", word)
    torch.save({"model": {"a": 1}}, tmp_path / name)
    refused(reward("hpsv2", path=str(tmp_path)), "a dict of model", "expected a state dict")
    refused(
        reward("hpsv2", path=str(folders / "hps"), tokenizer=str(tmp_path)), "reward.tokenizer=", "no tokenizer there"
    )


def test_check_names_what_is_wrong_with_a_clip_folder(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def copy() -> Path:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(folders / "clip", tmp_path / "c")
        return tmp_path / "c"

    (copy() / "model.safetensors").unlink()
    of = reward("pickscore", path=str(tmp_path / "c"))
    refused(of, "no weights beside config.json", "model.safetensors")
    state = load_file(folders / "clip" / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, copy() / "model.safetensors")
    refused(of, "lack logit_scale")
    save_file({k: v for k, v in state.items() if not k.endswith("1.mlp.fc1.bias")}, copy() / "model.safetensors")
    with pytest.raises(DIDRError, match=r"weights lack .*mlp\.fc1\.bias"):  # not left at random
        of.load()
    weights = copy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(of, "not a whole safetensors file")
    copy()
    for file in ("tokenizer.json", "vocab.json"):
        (tmp_path / "c" / file).unlink(missing_ok=True)
    refused(of, "reward.tokenizer=", "no tokenizer there", "set `tokenizer`")
    for content, word in (
        (b'{"model_type": "clip", "by": "\xe9"}', "utf-8"),
        (b"[1]", "sequence"),
        (b"{", "property name"),
    ):
        (copy() / "config.json").write_bytes(content)
        refused(of, "reward.path=", "config.json is not valid JSON", word)
    for part, words in (({"vision_config": None}, "differ from config.json"), ({"vision_config": 1}, "cannot load it")):
        config = json.loads((folders / "clip" / "config.json").read_text()) | part
        (copy() / "config.json").write_text(json.dumps(config))
        with pytest.raises(DIDRError, match=words):
            of.load()
    reward("clip_score", path=str(tmp_path / "c"), tokenizer=str(folders / "hps")).check()
    other = reward("pickscore", path=str(folders / "clip"), tokenizer=str(toy.bert_tokenizer(tmp_path / "bert")))
    with pytest.raises(DIDRError, match="Expected the tokenizer that the model was trained with"):
        other.load()


def test_a_clip_folder_is_read_as_downloads_leave_it(folders: Path, tmp_path: Path) -> None:
    """As `from_pretrained` reads it: safetensors before torch files (here a pointer that nothing opens), fp16 where nothing else is."""
    folder = shutil.copytree(folders / "clip", tmp_path / "c")
    of = reward("clip_score", path=str(folder))
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    of.check()
    of.load()
    expected = of.prepare(["a red circle"])["text"]
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    refused(of, "pytorch_model.bin", "a Git LFS pointer")
    (folder / "pytorch_model.bin").unlink()
    of.check()
    of.load()
    assert torch.equal(of.prepare(["a red circle"])["text"], expected)


def test_a_tokenizer_that_cannot_be_read_is_one_line(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "clip", tmp_path / "c")
    rewards = [reward("pickscore", path=str(folder)), reward("hpsv2", path=str(folders / "hps"), tokenizer=str(folder))]
    (folder / "merges.txt").unlink()
    for of in rewards:
        refused(of, "reward.tokenizer=", "no tokenizer there", "vocab.json with merges.txt")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    for of in rewards:
        refused(of, "reward.tokenizer=", "tokenizer.json is not valid JSON")
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("no merges\nat all\n")
    for of in rewards:
        of.check()
        with pytest.raises(DIDRError, match=r"reward\.tokenizer=.*cannot read this tokenizer"):
            of.load()


def test_check_names_what_is_wrong_with_the_linear_heads(folders: Path, tmp_path: Path) -> None:
    clip, file = str(folders / "clip"), tmp_path / "head.pth"
    of = reward("aesthetic", path=str(file), clip=clip)
    refused(of, "no such file or folder", "sac+logos+ava1-l14-linearMSE.pth")
    good = fill(toy.head_shapes(24, HEAD_WIDTHS))
    for changes, words in (
        ({"layers.2.bias": None}, ("layers.2", "bias None")),
        ({"layers.7.weight": torch.zeros(2, 4), "layers.7.bias": torch.zeros(2)}, ("layers.7 gives 2", "a score is 1")),
        ({"layers.4.weight": torch.zeros(8, 9)}, ("layers.2 gives 16", "takes 9")),
        ({"layers.1.weight": torch.zeros(24, 24)}, ("layers.(0, 1, 2, 4, 6, 7)", "dropout", "(0, 3, 6, 9, 11) (ReLU")),
        ({"layers.7.weight": None, "layers.8.weight": torch.zeros(1, 4)}, ("layers.(0, 2, 4, 6, 8)",)),
        ({"layers.0.net.weight": torch.zeros(1), "layers.2.weight": None}, ("layers.(0, 4, 6, 7)",)),
    ):
        torch.save({k: v for k, v in (good | changes).items() if v is not None}, file)
        refused(of, "reward.path=", *words)
    torch.save(fill(toy.head_shapes(32, HEAD_WIDTHS)), file)
    refused(of, "reward.clip=", "24 numbers", "takes 32")
    state = fill(toy.image_reward_shapes(TINY_BLIP)) | fill(toy.head_shapes(32, HEAD_WIDTHS, "mlp.layers"))
    torch.save(state, tmp_path / "ImageReward.pt")
    refused(reward("image_reward", path=str(tmp_path)), "the head takes 32", "gives 64")
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(state, tmp_path / "ImageReward.pt")
    refused(reward("image_reward", path=str(tmp_path)), "1 missing", "crossattention.self.key.bias")
    refused(reward("image_reward", path=str(tmp_path / "empty")), "no such file or folder", "ImageReward.pt")
