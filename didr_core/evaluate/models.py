"""The models of `didr evaluate` (docs/evaluate.md#models): what a person names, how it is sampled, and its pictures, by stock diffusers.

Every picture has a generator of its own, keyed by (seed, place of its prompt): the same one that this project's own samplers take. Of the
families that this package knows the noise is drawn in float32, whatever they compute in.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import Field, ValidationError
from torch import Tensor

from didr_core import config as configs
from didr_core.config import Component, Config, build, fingerprint, locate
from didr_core.config.files import mapping
from didr_core.config.provenance import versions
from didr_core.config.registry import Strict, explain_own, find
from didr_core.diffusion.noise import Noise
from didr_core.export.card import public_path
from didr_core.networks.loading import class_of, quiet, read_json, reason, shapes_of, uncollected, variant
from didr_core.types import DIDRError, NonFiniteError

FAMILIES = {"StableDiffusionXLPipeline": "sdxl", "ZImagePipeline": "zimage"}
"""Pipelines whose networks alone, and runs of ours, are read by the backbones of this package."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Kind = Literal["pipeline", "network", "lora", "pictures"]


class Sampling(Strict):
    """Options after a model's name; what is left out is the pipeline's own (one step for a generator)."""

    steps: int | None = Field(None, ge=1, description="num_inference_steps")
    guidance: float | None = Field(None, ge=0, description="guidance_scale, as the pipeline means it")
    timesteps: tuple[int, ...] | None = Field(None, description="e.g. 999/749/499/249; instead of steps")
    scheduler: str | None = Field(None, description="class of diffusers, made of the pipeline's own configuration")
    size: int | None = Field(None, ge=1, description="pixels of a side")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="float32, on a GPU bfloat16")
    base: str | None = Field(None, description="the pipeline folder that a network or a LoRA belongs to")


class Pictures(Protocol):
    """Something that has a picture for every prompt and noise seed."""

    calls: int

    def draw(self, prompts: Sequence[str], places: Sequence[int], seed: int) -> tuple[Tensor, Tensor | None]:
        """``[B, 3, H, W]`` in [0, 1] on the CPU, and the clean latents where there are some; ``calls`` counts the network's."""


@dataclass(frozen=True)
class Model:
    """A model as it was named, before anything is loaded. Pickles small."""

    name: str
    path: str
    kind: Kind
    sampling: Sampling
    family: str = ""  # of this package's backbones, where it is one
    backbone: Component | None = None  # that reads a network alone

    @property
    def cost(self) -> int:
        """Network calls a picture, about: what a progress bar weighs it by."""
        return 0 if self.kind == "pictures" else len(self.sampling.timesteps or ()) or self.sampling.steps or 50

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that its pictures follow from, but prompts and seeds."""
        told = self.sampling.model_dump(mode="json", exclude={"base"})
        paths = [Path(self.path), *([locate(self.sampling.base)] if self.sampling.base else [])]
        code = {name: versions().get(name) for name in ("torch", "diffusers", "transformers")}
        return fingerprint.digest(self.kind, told, code if self.kind != "pictures" else {}, *paths)

    def row(self) -> dict[str, Any]:
        """What a table says of it, without the machine's folders."""
        told = self.sampling.model_dump(mode="json", exclude={"base"}, exclude_none=True)
        return {"kind": self.kind, "source": public_path(self.path)} | (told if self.kind != "pictures" else {})

    def load(self, device: torch.device, prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        """Ready to draw.

        Raises:
            DIDRError: weights or pictures that are not what they seemed.
        """
        return Folder(self, prompts, seeds) if self.kind == "pictures" else Pipeline(self, device)


def parse(text: str, config: Config) -> Model:
    """``NAME[=PATH][,option=value...]``; ``config``: the recipe, whose own start and teacher have no path.

    Raises:
        DIDRError: nothing there, an unknown option, or a network without its pipeline.
    """
    name, path, sampling = _read(text, config)
    found = locate(path).absolute()
    if (found / "run.json").is_file():
        if not (found / "export" / "model_index.json").is_file():
            raise DIDRError(f"--model {text!r}: that run is not exported. Say `didr export --run {path}` first.")
        found /= "export"
    kind = _kind(text, found)
    if kind == "pictures":
        return Model(name, str(found), kind, sampling)
    if kind != "pipeline":
        sampling = sampling.model_copy(update={"base": sampling.base or config.backbone.model_dump().get("pipeline")})
    pipeline = found if kind == "pipeline" else locate(sampling.base or "")
    if not (pipeline / "model_index.json").is_file():
        raise DIDRError(
            f"--model {text!r}: a {kind} needs its pipeline; give base=FOLDER of diffusers, not {sampling.base!r}"
        )
    family = FAMILIES.get(str(read_json("--model", pipeline / "model_index.json").get("_class_name")), "")
    backbone = config.backbone if family == config.backbone.name else None
    if kind == "network":
        if not family:
            raise DIDRError(
                f"--model {text!r}: networks alone are read of {', '.join(FAMILIES)}. Give a whole pipeline."
            )
        backbone = backbone or find("backbones", family).Config(name=family, pipeline=str(pipeline))
        backbone = backbone.model_copy(update={"pipeline": str(pipeline), "generator": str(found)})
        build("backbones", backbone)  # looks at names and shapes
    exported = kind == "pipeline" and (found / "config.yaml").is_file()
    if exported:  # by us; what trained it need not be here
        drawing = {"algorithm": "diff_instruct", "reward": None, "judge": None}
        backbone = configs.recorded(found / "config.yaml", values=drawing).backbone
    if backbone is not None and (exported or name == "start" or kind == "network"):
        sampling = _one_step(sampling, backbone)
    return Model(name, str(found), kind, sampling, family, backbone if kind == "network" else None)


def _read(text: str, config: Config) -> tuple[str, str, Sampling]:
    """Name, path and options; those of the recipe's start and teacher are filled in."""
    head, *options = text.split(",")
    name, _, path = head.partition("=")
    given: dict[str, Any] = dict(part.partition("=")[::2] for part in options)
    if "timesteps" in given:
        given["timesteps"] = given["timesteps"].split("/")
    recipe = config.backbone.model_dump()
    if name in ("start", "teacher") and not path:
        if recipe["name"] not in FAMILIES.values():
            raise DIDRError(f"--model {text!r}: diffusers draws none of recipe {config.name!r}. Give a path.")
        path, given["base"] = recipe["pipeline"], recipe["pipeline"]
        if name == "start":
            path = recipe["generator"] or path
        else:
            fewer = recipe["name"] == "zimage"  # whose pipeline counts guidance from zero
            known = {"steps": config.evaluation.teacher_steps or 50, "guidance": config.guidance.reference - fewer}
            given = known | given
    elif not path:
        name, path = Path(head).stem or head, head
    try:
        return name, path, Sampling.model_validate(given)
    except ValidationError as error:
        raise DIDRError(f"--model {explain_own(error.errors()[0], Sampling, repr(text))}") from error


def _one_step(sampling: Sampling, backbone: Component) -> Sampling:
    """As generators of ours are sampled, where the person has not said otherwise."""
    if sampling.steps or sampling.timesteps:
        return sampling
    known = backbone.model_dump()
    own = {"guidance": 0.0, "size": known["resolution"], "steps": known.get("steps", 1)}
    if backbone.name == "sdxl":
        own |= {"timesteps": (known["timestep"],), "scheduler": "LCMScheduler"}
    return sampling.model_copy(update={k: v for k, v in own.items() if getattr(sampling, k) is None})


def _kind(text: str, path: Path) -> Kind:
    if path.is_file():
        names = shapes_of(f"--model {text.partition('=')[0]}", path)
        return "lora" if any("lora" in name.lower() for name in names) else "network"
    if (path / "model_index.json").is_file():
        return "pipeline"
    if (path / "config.json").is_file():
        return "network"
    if path.is_dir() and ((path / MANIFEST).is_file() or any(p.suffix.lower() in PICTURES for p in path.iterdir())):
        return "pictures"
    raise DIDRError(
        f"--model {text!r}: expected a run, a diffusers folder, a folder or file of a network, a LoRA or a folder of pictures at {path}"
    )


class Pipeline:
    """A stock diffusers pipeline."""

    def __init__(self, model: Model, device: torch.device) -> None:
        quiet()
        self.model, told = model, model.sampling
        dtype = told.dtype if told.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        folder = Path(model.path) if model.kind == "pipeline" else locate(str(told.base))
        parts: dict[str, Any] = {}
        part = next((p for p in ("unet", "transformer") if (folder / p).is_dir()), "unet")
        if model.backbone is not None:
            parts[part] = build("backbones", model.backbone).load_network("generator").to(getattr(torch, dtype))
        try:
            with uncollected():
                pipe = class_of("DiffusionPipeline").from_pretrained(
                    folder, dtype=getattr(torch, dtype), variant=variant(folder / part), **parts
                )
            if model.kind == "lora":
                pipe.load_lora_weights(model.path)
            if told.scheduler:
                pipe.scheduler = class_of(told.scheduler).from_config(pipe.scheduler.config)
        except Exception as error:  # whatever files and settings lead diffusers to
            raise DIDRError(f"--model {model.name}: diffusers cannot make it of {folder} ({reason(error)})") from error
        pipe.set_progress_bar_config(disable=True)
        pipe.watermark = None  # SDXL's would be in some pictures and not in others, by what is installed
        self.pipe, self.calls = pipe.to(device), 0
        network = getattr(pipe, part, None)
        if isinstance(network, torch.nn.Module):
            network.register_forward_pre_hook(self._count)
        self._takes = inspect.signature(pipe.__call__).parameters
        size, self._shape = told.size, tuple[int, ...]()
        if model.family:
            factor = pipe.vae_scale_factor
            size = size or getattr(pipe, "default_sample_size", 1024 // factor) * factor
            self._shape = (network.config.in_channels, size // factor, size // factor)  # type: ignore[union-attr]
        asked = {
            "num_inference_steps": None if told.timesteps else told.steps,
            "guidance_scale": told.guidance,
            "timesteps": list(told.timesteps) if told.timesteps else None,
            **dict.fromkeys(("height", "width"), size),
        }
        self._asked = {key: value for key, value in asked.items() if value is not None}
        if unknown := [key for key in self._asked if key not in self._takes]:
            raise DIDRError(f"--model {model.name}: {type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")

    def _count(self, *_: Any) -> None:
        self.calls += 1

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], places: Sequence[int], seed: int) -> tuple[Tensor, Tensor | None]:
        last: dict[str, Tensor] = {}

        def keep(pipe: Any, step: int, time: Any, told: dict[str, Any]) -> dict[str, Any]:
            last.update(told)
            return {}

        more: dict[str, Any] = {"callback_on_step_end": keep} if "callback_on_step_end" in self._takes else {}
        generators = [Noise(seed).generator(place, "picture") for place in places]
        if self._shape:  # the generators go on from there
            z = torch.stack([torch.randn(self._shape, generator=generator) for generator in generators])
            more["latents"] = z.to(self.pipe.device, self.pipe.dtype)
        found = self.pipe(prompt=list(prompts), generator=generators, output_type="pt", **self._asked, **more)
        latents, images = last.get("latents"), found.images.float().cpu()
        if broken := [p for p, row in zip(prompts, images, strict=True) if not row.isfinite().all()]:
            raise NonFiniteError(
                f"--model {self.model.name}: NaN or infinite pictures of {', '.join(map(repr, broken[:3]))} in {self.pipe.dtype}: a "
                "PNG would make them black. Say dtype=float32 (some VAEs overflow in float16), or look at its weights."
            )
        return images.clamp(0, 1), None if latents is None else latents.float().cpu()


MANIFEST = "manifest.jsonl"


class Line(Strict, extra="ignore"):
    """Of a manifest."""

    prompt: str
    file: str
    seed: int | None = None  # or, where a prompt has several pictures:
    picture: int = Field(0, ge=0, description="its place among the seeds")


class Folder:
    """Ready pictures: those that the :class:`Line` s of ``manifest.jsonl`` name, or all files in the order of their names, seed by seed
    within a prompt."""

    calls = 0

    def __init__(self, model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        folder, self._of = Path(model.path), dict[tuple[int, int], Path]()
        wanted = [(place, seed) for place in range(len(prompts)) for seed in seeds]
        if (folder / MANIFEST).is_file():
            known = {}
            for number, line in enumerate((folder / MANIFEST).read_bytes().splitlines(), 1):
                where = f"{folder / MANIFEST}, line {number}"
                try:
                    row = Line.model_validate(mapping(line, where))
                except ValidationError as error:
                    raise DIDRError(f"{where}: {explain_own(error.errors()[0], Line, 'it')}") from error
                seed = seeds[row.picture] if row.seed is None and row.picture < len(seeds) else row.seed
                known[row.prompt, seed] = folder / row.file
            found = {key: known.get((prompts[key[0]], key[1])) for key in wanted}
            self._of = {key: path for key, path in found.items() if path and path.is_file()}
        else:
            files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
            if len(files) == len(wanted):
                self._of = dict(zip(wanted, files, strict=True))
        if len(self._of) < len(wanted):
            place, seed = next(key for key in wanted if key not in self._of)
            raise DIDRError(
                f"--model {model.name}: {folder} has not the picture of {prompts[place]!r}, seed {seed}. Expected {MANIFEST} with a line a "
                f"picture, or {len(prompts)} prompts x {len(seeds)} seeds = {len(wanted)} pictures in the order of their names."
            )

    def draw(self, prompts: Sequence[str], places: Sequence[int], seed: int) -> tuple[Tensor, Tensor | None]:
        made = []
        for place in places:
            with Image.open(self._of[place, seed]) as image:
                made.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255)
        return torch.stack(made), None
