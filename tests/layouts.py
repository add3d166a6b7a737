"""Names and shapes of the published weights, written out by hand from the architectures: no module of any library is asked."""

from __future__ import annotations

import json
import struct
from pathlib import Path

Layout = dict[str, tuple[int, ...]]


def sdxl_unet() -> Layout:
    """The UNet of SDXL base, DMD2 and the official DIDR files, in diffusers' names."""
    out: Layout = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = (outputs, inputs)
        if bias:
            out[f"{name}.bias"] = (outputs,)

    def conv(name: str, inputs: int, outputs: int, size: int = 3) -> None:
        out.update({f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)})

    def norm(name: str, channels: int) -> None:
        out.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        linear(f"{name}.time_emb_proj", 1280, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.conv_shortcut", inputs, outputs, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        norm(f"{name}.norm", width)
        linear(f"{name}.proj_in", width, width)
        linear(f"{name}.proj_out", width, width)
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for n in (1, 2, 3):
                norm(f"{block}.norm{n}", width)
            for attention, source in (("attn1", width), ("attn2", 2048)):
                linear(f"{block}.{attention}.to_q", width, width, bias=False)
                linear(f"{block}.{attention}.to_k", source, width, bias=False)
                linear(f"{block}.{attention}.to_v", source, width, bias=False)
                linear(f"{block}.{attention}.to_out.0", width, width)
            linear(f"{block}.ff.net.0.proj", width, 8 * width)
            linear(f"{block}.ff.net.2", 4 * width, width)

    conv("conv_in", 4, 320)
    linear("time_embedding.linear_1", 320, 1280)
    linear("time_embedding.linear_2", 1280, 1280)
    linear("add_embedding.linear_1", 1280 + 6 * 256, 1280)
    linear("add_embedding.linear_2", 1280, 1280)
    for i, (inputs, width, depth) in enumerate(((320, 320, 0), (320, 640, 2), (640, 1280, 10))):
        for k in range(2):
            resnet(f"down_blocks.{i}.resnets.{k}", inputs if k == 0 else width, width)
            if depth:
                transformer(f"down_blocks.{i}.attentions.{k}", width, depth)
        if i < 2:
            conv(f"down_blocks.{i}.downsamplers.0.conv", width, width)
    resnet("mid_block.resnets.0", 1280, 1280)
    resnet("mid_block.resnets.1", 1280, 1280)
    transformer("mid_block.attentions.0", 1280, 10)
    ups = (((2560, 2560, 1920), 1280, 10), ((1920, 1280, 960), 640, 2), ((960, 640, 640), 320, 0))
    for i, (skips, width, depth) in enumerate(ups):
        for k, inputs in enumerate(skips):
            resnet(f"up_blocks.{i}.resnets.{k}", inputs, width)
            if depth:
                transformer(f"up_blocks.{i}.attentions.{k}", width, depth)
        if i < 2:
            conv(f"up_blocks.{i}.upsamplers.0.conv", width, width)
    norm("conv_norm_out", 320)
    conv("conv_out", 320, 4)
    return out


def zimage_transformer() -> Layout:
    """The transformer of Z-Image and Z-Image-Turbo, in diffusers' names."""
    width, head, hidden, text, time = 3840, 128, 10240, 2560, 256
    out: Layout = {
        "all_x_embedder.2-1.weight": (width, 64),
        "all_x_embedder.2-1.bias": (width,),
        "all_final_layer.2-1.linear.weight": (64, width),
        "all_final_layer.2-1.linear.bias": (64,),
        "all_final_layer.2-1.adaLN_modulation.1.weight": (width, time),
        "all_final_layer.2-1.adaLN_modulation.1.bias": (width,),
        "t_embedder.mlp.0.weight": (1024, time),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (time, 1024),
        "t_embedder.mlp.2.bias": (time,),
        "cap_embedder.0.weight": (text,),
        "cap_embedder.1.weight": (width, text),
        "cap_embedder.1.bias": (width,),
        "x_pad_token": (1, width),
        "cap_pad_token": (1, width),
    }
    for stack, depth in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2)):
        for k in range(depth):
            block = f"{stack}.{k}"
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                out[f"{block}.attention.{part}.weight"] = (width, width)
            for part in ("norm_q", "norm_k"):
                out[f"{block}.attention.{part}.weight"] = (head,)
            for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                out[f"{block}.{part}.weight"] = (width,)
            out[f"{block}.feed_forward.w1.weight"] = out[f"{block}.feed_forward.w3.weight"] = (hidden, width)
            out[f"{block}.feed_forward.w2.weight"] = (width, hidden)
            if stack != "context_refiner":  # the text knows no time
                out[f"{block}.adaLN_modulation.0.weight"] = (4 * width, time)
                out[f"{block}.adaLN_modulation.0.bias"] = (4 * width,)
    return out


def hollow_file(path: Path, layout: Layout, dtype: str = "F16") -> Path:
    """A safetensors file of two bytes a number with everything in its header and nothing on the disk behind it."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in layout.items():
        begin, size = end, 2
        for n in shape:
            size *= n
        end += size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
