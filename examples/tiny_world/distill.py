"""Part "distill": the project's own learner takes the regression start to the bundled generator (recipe `tiny_distill`).

Diff-Instruct sharpens what regression left blurred, and alone it loses modes. So the regression to the teacher's pairs is kept on as
an anchor, on the same pairs that the start was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from didr_core import config as configs
from didr_core.evaluate.finish import train_and_finish
from didr_core.plan.preflight import preflight
from didr_core.train.run_folder import RunFolder
from examples.tiny_world import training
from examples.tiny_world.assemble import assemble_generator
from examples.tiny_world.sampling import Parts

RECIPE = Path(__file__).parent / "distill.yaml"


def anchor_pairs(folder: Path) -> Path:
    """The teacher's pairs as `didr_core.data.teacher_pairs` reads them: token ids become the text towers' conditions, fp16."""
    path = folder / "anchor.safetensors"
    if not path.exists():
        pairs = load_file(folder / "pairs.safetensors")
        parts = Parts.load(folder)
        with torch.no_grad():
            encoded = [parts.encode_ids(ids) for ids in pairs["ids"].split(256)]
        hidden, pooled = (torch.cat(rows).half().contiguous() for rows in zip(*encoded, strict=True))
        conditions = {"condition.prompt_embeds": hidden, "condition.pooled": pooled}
        save_file({"z": pairs["noise"].half(), "x0": pairs["latents"].half(), **conditions}, path)
    return path


def build(folder: Path, world: Path, **settings: Any) -> None:
    """Train `tiny_distill` in ``folder``/distill (resumed where it stopped) and put its generator into ``world``."""
    place = folder / "distill"
    overrides = [
        f"backbone.pipeline={world / 'pipeline'}",
        f"backbone.generator={folder / 'regression_unet'}",
        f"train.anchor.pairs={anchor_pairs(folder)}",
        f"data.prompts={world / 'prompts' / 'train'}",
        f"data.heldout={world / 'prompts' / 'heldout'}",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    config = configs.load(str(RECIPE), overrides)
    index = preflight(config)
    run = RunFolder.find(str(place)) if (place / "config.yaml").is_file() else RunFolder.create(config, str(place))
    train_and_finish(config, run, index)
    unet = UNet2DConditionModel.from_pretrained(place / "export" / "unet", torch_dtype=torch.float32)
    unet.save_pretrained(folder / "distilled_unet")
    assemble_generator(folder / "distilled_unet", world)
    training.say("distilled generator saved")
