"""The model card of an export: how to sample, what was measured, how it was trained, and whose terms bind the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from didr_core.config import WORLD, Config, bundled, hub, locate, registry
from didr_core.config.files import expanded
from didr_core.config.provenance import commit, versions
from didr_core.config.schema import leaves
from didr_core.networks.lora import ADAPTER, KOHYA

CARD, BUNDLED_CARD = "README.md", "card.md"
READERS = "diffusers 0.35 (Z-Image: 0.36), transformers 4.57 and peft 0.18"
"""The oldest that exports are held to load in: `make test-exports`."""
ABSOLUTE = re.compile(r"(?<![\w.:/~<])/(?:[^\s/'\"`,;()|]+/)+(?=[^\s'\"`,;()|])")
# Terms of published weights that runs usually start from, by repository; what lies on disk is read from its own card instead.
KNOWN_LICENCES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "tianweiy/DMD2": "cc-by-nc-sa-4.0",
    "madebyollin/sdxl-vae-fp16-fix": "mit",
    "Tongyi-MAI/Z-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
}


def model_card(
    config: Config,
    *,
    scores: str = "Not scored.",
    run: Mapping[str, Any] | None = None,
    files: Sequence[str] = (),
) -> str:
    """The README.md of an export: front matter, how to sample, ``scores`` (Markdown), training settings, licences."""
    run = run or {}
    kind = "one-step" if config.backbone.model_dump().get("steps", 1) == 1 else "few-step"
    terms = list(licences(config))
    shared = {terms_of for _, terms_of in terms}
    one_licence = len(shared) == 1 and not any(t.startswith("not stated") for t in shared)
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": list(dict.fromkeys(["didr", kind, "text-to-image", config.backbone.name, config.algorithm.name])),
    } | ({"license": shared.pop()} if one_licence else {"license": "other", "license_name": "see-licence-section"})
    single = next((f for f in files if f.startswith("didr_") and f.endswith(".safetensors")), None)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config.name}: a {kind} text-to-image generator, made with DIDR",
        f"Trained with `{config.algorithm.name}` on a `{config.backbone.name}` backbone"
        + (f", towards the reward `{_source(config.reward)}`" if config.needs_reward else ", without a reward")
        + f". Commit `{run.get('commit') or commit() or 'unknown'}`.",
        "![The same prompts and noise before and after](grid.png)" if "grid.png" in files else "",
        "## Sampling",
        _sampling(config, single),
        _adapter(config) if ADAPTER in files else "",
        _versions(run),
        "## Scores",
        scores,
        "## Training",
        _training(config, run),
        "## Licence",
        "These weights derive from, and are bound by the terms of:\n\n"
        + "\n".join(f"- {what}: {terms_of}" for what, terms_of in terms),
    ]
    return public_text("\n\n".join(p for p in parts if p) + "\n")


def licences(config: Config) -> Iterator[tuple[str, str]]:
    """``(part, terms)`` of every set of weights that a run starts from or is trained against."""
    rewards = leaves("reward", config.reward) if config.reward and config.needs_reward else {}
    for part, component in {"backbone": config.backbone, **rewards}.items():
        for key, value in sorted(component.model_dump().items()):
            if key != "name" and isinstance(value, str) and hub.is_place(value):
                yield f"{part} {key} `{public_path(value)}`", _terms(value)


def _terms(value: str) -> str:
    """From the table by repository; else from the card beside the weights; else it must be looked up."""
    for repository, terms in KNOWN_LICENCES.items():
        if value.partition("@")[0].rstrip("/").endswith(repository) or repository.replace("/", "--") in value:
            return terms
    place = locate(value)
    stop = (WORLD if bundled(value) else place.parent if place.is_file() else place).resolve()
    for folder in (place, *place.parents):
        for card in (folder / CARD, folder / BUNDLED_CARD):
            said = _front_matter(card) if card.is_file() else {}
            if found := said.get("license"):
                return str(said.get("license_name", found) if found == "other" else found)
        if folder.resolve() == stop:
            break
    return "not stated beside the weights; look it up before publishing"


def _front_matter(card: Path) -> dict[str, Any]:
    text = card.read_text(errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def public_path(value: str) -> str:
    """A path without the machine's own folders: cards are published."""
    return value if not expanded(value).is_absolute() else Path(value).name


def public_text(text: str) -> str:
    """A text, of whose absolute paths the last parts are left."""
    return ABSOLUTE.sub("", text)


def _source(reward: Any) -> str:
    """What it is made of, by name and file."""
    parts = leaves("reward", reward).values()
    found = ((part.name, part.model_dump().get("path")) for part in parts)
    return ", ".join(f"{name} {public_path(path)}" if isinstance(path, str) else str(name) for name, path in found)


def usage(backbone: str) -> str:
    """What a family that diffusers does not know says of sampling from its exports; empty for the others."""
    return str(registry.find("backbones", backbone).usage)


def _sampling(config: Config, single: str | None) -> str:
    if told := usage(config.backbone.name):
        return told
    if config.backbone.name != "sdxl":
        return "Load this folder with `diffusers.DiffusionPipeline.from_pretrained` and sample with one step, without guidance."
    step = config.backbone.model_dump().get("timestep", 399)
    text = f"""With stock diffusers, nothing else installed:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder").to("cuda", torch.float16)  # on a CPU leave out .to(...)
image = pipe("a prompt", num_inference_steps=1, guidance_scale=0, timesteps=[{step}]).images[0]
```

The scheduler is an `LCMScheduler`; pure N(0, I) noise is fed as timestep {step}; guidance stays off."""
    if single:
        text += f"""

`{single}` holds the UNet alone (diffusers key names, float16), in the layout of the official DIDR weights:

```python
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

config = UNet2DConditionModel.load_config("path/to/this/folder", subfolder="unet")
unet = UNet2DConditionModel.from_config(config).to(torch.float16)
unet.load_state_dict(load_file("{single}"))
```"""
    return text


def _adapter(config: Config) -> str:
    settings = config.backbone.model_dump()
    base = public_path(settings.get("generator") or settings.get("pipeline") or "its base")
    kohya = (
        f" In A1111 and ComfyUI use `{KOHYA}` (kohya's names, with `.alpha`)." if config.backbone.name == "sdxl" else ""
    )
    return f"""The adapter is merged into this folder's weights. It also lies alone in `{ADAPTER}`, for a pipeline whose network is
`{base}` (diffusers and peft; float32, rank {config.roles.rank}):

```python
pipe.load_lora_weights("path/to/this/folder", weight_name="{ADAPTER}")
```{kohya}"""


def _versions(run: Mapping[str, Any]) -> str:
    made = run.get("versions") or versions()
    names = [f"{name}=={made[name]}" for name in ("torch", "diffusers", "transformers", "peft") if name in made]
    return f"Made with `{' '.join(names)}`; loads from {READERS} on."


def _training(config: Config, run: Mapping[str, Any]) -> str:
    rows = [
        ["steps", str(config.train.steps)],
        ["global batch", str(config.train.batch)],
        ["assistant updates a step", str(config.train.assistant_updates)],
        ["estimator of the diffused reward score", f"{config.drp.estimator}, K = {config.drp.steps}"],
        ["beta", f"{config.drp.beta:g} (standard deviations of the starting generator's reward)"],
        ["reference guidance", f"{config.guidance.reference:g}"],
        ["learning rates", f"generator {config.generator.lr:g}, assistant {config.assistant.lr:g}"],
        ["seed", str(config.seed)],
    ]
    if not config.uses_drs:
        rows = [row for row in rows if row[0] not in ("beta", "estimator of the diffused reward score")]
    commands = [f"`{c}`" for c in (run.get("command"), *run.get("resumed", [])) if c]
    command = f"\n\nCommand: {', then '.join(commands)}" if commands else ""
    return markdown(["setting", "value"], rows) + "\n\nThe whole configuration is in `config.yaml`." + command


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
