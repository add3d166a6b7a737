"""What a user of an export does, with whichever diffusers is installed and nothing of this project: ``python reader.py EXPORT BASE OUT``.

Draws one picture of the folder by the code of its card (and by ``variant="fp16"``, where it has one), and of ``BASE`` with each of its
LoRA files, into ``OUT``; prints the versions and the noise levels of steps. Warnings of what is to go are errors.
"""

import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

warnings.filterwarnings("error", category=FutureWarning, module="diffusers|__main__|reader")
export, base, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

import diffusers  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402

for name in ("didr_core", "pipelines"):
    sys.modules[name] = None  # type: ignore[assignment]


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    more = {"timesteps": [399]} if hasattr(pipe, "unet") else {"max_sequence_length": 192}
    channels = 4 if hasattr(pipe, "unet") else 16
    size = 64 if not hasattr(pipe, "unet") else pipe.unet.config.sample_size * pipe.vae_scale_factor
    side = size // pipe.vae_scale_factor
    latents = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(7))
    return pipe(
        "a red circle", latents=latents, num_inference_steps=1, guidance_scale=0.0, height=size, width=size,
        output_type="np", **more,
    ).images[0]  # fmt: skip


def of_the_card():
    """The card's code that makes a pipeline, on a CPU: a block, of Z-Image one line."""
    text = (export / "README.md").read_text()
    blocks = [
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "from diffusers import DiffusionPipeline" in block
    ]
    line = re.search(r"`(pipe = .*?)`", text)
    code = blocks[0] if blocks else f"import torch\nfrom diffusers import ZImagePipeline\n{line[1]}"
    code = code.replace("path/to/this/folder", str(export)).replace("(folder)", f"({str(export)!r})")
    code = re.sub(r'\.to\("cuda", torch\.\w+\)', "", code)
    names = {}
    exec("\n".join(line for line in code.splitlines() if not line.startswith("image =")), names)
    return names["pipe"]


def noise_levels(pipe):
    """By kind of step: SDXL's two factors, of noise and eps, at 399; Z-Image's sigmas for several numbers of steps."""
    scheduler, one = pipe.scheduler, torch.ones(1, 1, 1, 1)
    if hasattr(pipe, "unet"):
        scheduler.set_timesteps(timesteps=[399])
        first = scheduler.step(0 * one, scheduler.timesteps[0], one).prev_sample
        scheduler.set_timesteps(timesteps=[399])
        second = scheduler.step(one, scheduler.timesteps[0], 0 * one).prev_sample
        return {"399": [first.item(), second.item()]}
    levels = {}
    for steps in (1, 4, 8):
        pipe(
            "a",
            num_inference_steps=steps,
            guidance_scale=0.0,
            height=64,
            width=64,
            max_sequence_length=192,
            output_type="latent",
        )
        levels[str(steps)] = [round(float(sigma), 6) for sigma in scheduler.sigmas]
    return levels


pipe = of_the_card()
made = {"card": picture(pipe)}
steps = noise_levels(pipe)
if list(export.glob("unet/*.fp16.safetensors")):
    made["variant"] = picture(diffusers.DiffusionPipeline.from_pretrained(export, variant="fp16"))
for file in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
    if (export / file).is_file():
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        made[f"base of {file}"] = picture(pipe)
        pipe.load_lora_weights(export, weight_name=file)
        made[file] = picture(pipe)
versions = {m.__name__: m.__version__ for m in (diffusers, transformers, peft)}
np.savez(out, **made)
print(json.dumps({"versions": versions, "steps": steps}))
