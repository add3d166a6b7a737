"""What families that come as diffusers pipeline folders share: looking at weights, loading networks, decoding, exporting.

A family adds its conventions (how the network is called, what x0 is, what a prompt becomes): see `sdxl.py` and `zimage.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from didr_core.backbones._export import copy_part, name_variant, write_json, write_network
from didr_core.backbones._lora_file import check_lora, merge_lora
from didr_core.backbones._parts import check_part, layout_of, load_part, refuse_lora
from didr_core.config import Component, files, fingerprint, locate
from didr_core.diffusion.sampling import clamp_to_rewards
from didr_core.networks.loading import (
    assemble,
    check_folder,
    check_layout,
    class_of,
    hub_hint,
    quiet,
    read_state,
    refuse_nan,
    shapes_of,
    uncollected,
    without_prefix,
)
from didr_core.networks.tokenizers import check_tokenizer, tokens_read
from didr_core.types import Condition, DIDRError, Schedule

Dtype = Literal["float32", "bfloat16", "float16"]
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


class PipelineConfig(Component):
    """Options of every family. A path is a local folder or file, or a model's name on the hub."""

    pipeline: str = Field(description="the reference: a whole diffusers pipeline folder")
    generator: str | None = Field(
        None, description="the start: a pipeline folder, a network folder or one file of weights; none = the reference"
    )
    lora: str | None = Field(
        None, description="a LoRA file that is merged into the start: diffusers' names, or kohya's (A1111, ComfyUI)"
    )
    vae: str | None = Field(None, description="VAE folder instead of the pipeline's, in exports too")
    decoder: str | None = Field(
        None, description="VAE folder that pictures of a run are decoded with, e.g. a TAESD; exports keep the true VAE"
    )
    decode_dtype: Dtype = Field("float32", description="what the decoder computes in")
    decode_gradient_checkpointing: bool = Field(
        True,
        description="recompute the decoder's activations in backward (AutoencoderKL only): less memory, one decoding more",
    )
    text_dtype: Dtype = Field("float32", description="what the text encoders compute in")
    resolution: int | None = Field(None, gt=0, description="pixels of a side; none = what the folder says")

    def exported(self, folder: Path) -> Self:
        """An export is a whole pipeline, with its own VAE, which may be one that overflows in half precision."""
        none = dict.fromkeys(("generator", "lora", "vae", "decoder"))
        return self.model_copy(update={**none, "pipeline": str(folder), "decode_dtype": "float32"})


@dataclass(frozen=True)
class Family:
    """What the shared code must know of a family."""

    pipeline: str  # class names in diffusers
    network: str
    part: str  # the network's folder in a pipeline
    same: tuple[str, ...]  # settings in which generator and reference must agree
    marker: str  # a tensor by whose name a prefix in single files is recognised
    dtype: torch.dtype  # of exports
    original: str | None = None  # part of a tensor's name in the layout of A1111 and ComfyUI, which diffusers converts


class PipelineBackbone:
    """Base of the families; `schedule`, `x0`, `generate`, `encode`, `blank` and `null` are theirs."""

    family: Family
    schedule: Schedule
    latent_shape: tuple[int, ...]
    _checked = False
    patch = 1  # latent pixels a side that the network takes together

    def __init__(self, config: PipelineConfig) -> None:
        self.folder = locate(config.pipeline)
        self._options = config
        self._vae_folder = locate(config.vae) if config.vae else self.folder / "vae"
        self._decoder_folder = locate(config.decoder) if config.decoder else self._vae_folder
        self.check()
        self.scheduler_config = read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.vae_config = read_json(self._decoder_folder / "config.json")
        channels, factor = self.network_config["in_channels"], _upsampling(self.vae_config)
        default = self.network_config.get("sample_size")
        self.pixels = config.resolution or (default * factor if default else 1024)
        if self.pixels % (factor * self.patch):
            raise DIDRError(
                f"backbone.resolution={self.pixels}: expected a multiple of {factor * self.patch} pixels for this VAE and network"
            )
        self.latent_shape = (channels, self.pixels // factor, self.pixels // factor)
        self._text: Any = None
        self._vae: Any = None

    @functools.cached_property
    def network_config(self) -> dict[str, Any]:
        """Of the reference's network."""
        return read_json(self.folder / self.family.part / "config.json")

    def _check_configs(self) -> None:
        """Raises DIDRError where folders are missing, or their configurations do not fit together."""
        family, options = self.family, self._options
        index = check_folder("backbone.pipeline", self.folder, "model_index.json", "_class_name", (family.pipeline,))
        self._parts = {k: v[1] for k, v in index.items() if isinstance(v, list) and v[0] is not None}
        for name in sorted(self._parts):
            if not (self.folder / name).is_dir():
                raise DIDRError(
                    f"backbone.pipeline={str(self.folder)!r}: {name}/, which model_index.json names, is missing; download it too"
                )
        found = self._config("pipeline", self.folder / family.part, (family.network,))
        self._check_decoder(found["in_channels"])
        if options.generator is None:
            return
        path = locate(options.generator)
        if path.is_dir():
            own = self._config("generator", self._network_folder(path), (family.network,))
            for key in family.same:
                if own.get(key) != found.get(key):
                    raise DIDRError(
                        f"backbone.generator={str(path)!r}: {key}={own.get(key)!r} differs from the pipeline's {found.get(key)!r}; "
                        "generator and reference must be of one family"
                    )
        elif not path.is_file():
            raise DIDRError(
                f"backbone.generator={str(path)!r}: no such file or folder. Expected a pipeline folder, a {family.network} folder, or one "
                f".safetensors/.bin file.{hub_hint(path)}"
            )

    def _config(self, key: str, folder: Path, classes: Sequence[str]) -> dict[str, Any]:
        return check_folder(f"backbone.{key}", folder, "config.json", "_class_name", classes)

    def check(self) -> None:
        """Configurations, headers and small tensors of all that would be loaded; the constructor calls it, another call does nothing.

        Raises:
            DIDRError: folders or files that do not hold what the config says, or that do not fit together.
        """
        if self._checked:
            return
        self._check_configs()
        for name, made in self._parts.items():
            folder = self.folder / name
            if name.startswith("tokenizer"):
                reader = self.folder / name.replace("tokenizer", "text_encoder") / "config.json"
                check_tokenizer("backbone.pipeline", folder, read_json(reader) if reader.is_file() else None)
            elif name.startswith("text_encoder") or name == self.family.part:
                check_part("backbone.pipeline", folder, made)
        folders = {folder: key for key, folder in reversed(self._autoencoders().items())}
        for folder, key in folders.items():
            check_part(f"backbone.{key}", folder, read_json(folder / "config.json")["_class_name"])
        if self._options.generator is not None:
            path = locate(self._options.generator)
            if path.is_dir():
                check_part("backbone.generator", self._network_folder(path), self.family.network)
            else:
                self._check_file(path)
        if self._options.lora:
            expected = layout_of("backbone.pipeline", self.folder / self.family.part, class_of(self.family.network))
            check_lora(
                locate(self._options.lora), self.family.pipeline, self.family.part, self.network_config, expected
            )
        self._checked = True

    def _check_file(self, path: Path) -> None:
        names = shapes_of("backbone.generator", path)
        refuse_lora("backbone.generator", path, names, self.family.pipeline, str(self.folder))
        hollow = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
        self._check_layout(path, self._in_diffusers_names(path, hollow))

    def _check_layout(self, path: Path, state: Any) -> None:
        expected = layout_of("backbone.pipeline", self.folder / self.family.part, class_of(self.family.network))
        what = f"the diffusers layout of {self.family.network}, as in {self.family.part}/ of the pipeline"
        check_layout("backbone.generator", path, state, expected, what)

    def _in_diffusers_names(self, path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The network's tensors of a single file, which may be a whole model in the names of A1111 and ComfyUI."""
        family = self.family
        if family.original is None or not any(family.original in name for name in state):
            return without_prefix(state, family.marker)
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        convert = SINGLE_FILE_LOADABLE_CLASSES[family.network]["checkpoint_mapping_fn"]
        try:
            return dict(convert(checkpoint=dict(state), config=self.network_config))
        except KeyError as error:
            raise DIDRError(
                f"backbone.generator={str(path)!r}: diffusers cannot convert it (no {error}). Expected the whole {family.network}."
            ) from error

    def tokenizers(self) -> dict[Path, int]:
        folders = [self.folder / name for name in self._parts if name.startswith("tokenizer")]
        return {folder: tokens_read("backbone.pipeline", folder) for folder in folders}

    def _autoencoders(self) -> dict[str, Path]:
        """The folders by the key that names each, the decoder's last."""
        return {"pipeline": self.folder / "vae", "vae": self._vae_folder, "decoder": self._decoder_folder}

    def _check_decoder(self, channels: object) -> None:
        configs = {}
        for name, folder in self._autoencoders().items():
            configs[name] = self._config(name, folder, AUTOENCODERS)
            if configs[name].get("latent_channels") != channels:
                raise DIDRError(
                    f"backbone.{name}={str(folder)!r}: latent_channels={configs[name].get('latent_channels')}, but the network has "
                    f"in_channels={channels}; name a VAE of this family"
                )
            if _upsampling(configs[name]) != _upsampling(configs["pipeline"]):
                raise DIDRError(
                    f"backbone.{name}={str(folder)!r}: {_upsampling(configs[name])} pixels a latent pixel, the pipeline's VAE has "
                    f"{_upsampling(configs['pipeline'])}; name a VAE of this family"
                )
        if self._options.decode_dtype == "float16" and configs["decoder"].get("force_upcast"):
            raise DIDRError(
                f"backbone.decode_dtype='float16': the VAE in {str(self._decoder_folder)!r} overflows in float16 (its config says "
                "force_upcast). Use float32, or set backbone.vae to the fp16-fix VAE, or backbone.decoder to a TAESD."
            )

    def fingerprint(self, of: Literal["text", "start"]) -> str:
        """A hash of what :meth:`encode` ("text"), or the starting generator's pictures ("start"), follow from."""
        options, picture = self._options, {"resolution", "decode_dtype", "decode_gradient_checkpointing"}
        if of == "text":
            parts = sorted(p for p in self.folder.iterdir() if p.name.startswith(("text_encoder", "tokenizer")))
        else:
            start = [locate(path) for path in (options.generator or options.pipeline, options.lora) if path]
            reference = (self.folder / self.family.part / "config.json", self.folder / "scheduler")
            parts = [self._network_folder(start[0]), *start[1:], self._decoder_folder, *reference]
        paths = {"pipeline", "generator", "lora", "vae", "decoder"}
        told = options.model_dump(mode="json", exclude=paths | (picture if of == "text" else set()))
        return fingerprint.digest(of, told, *parts)

    def _network_folder(self, path: Path) -> Path:
        """``path`` is a network's folder, or a pipeline's that holds one."""
        return path / self.family.part if (path / "model_index.json").is_file() else path

    def load_network(self, role: str) -> nn.Module:
        """The network of ``role``, float32, eval. The TA starts as the reference, as DMD2's fake UNet does.

        Raises:
            DIDRError: a single file whose tensors are not this network's.
        """
        quiet()
        generator, lora = (self._options.generator, self._options.lora) if role == "generator" else (None, None)
        path = locate(generator) if generator is not None else self.folder
        network: nn.Module
        if path.is_file():
            network = self._from_file(path).eval()
        else:
            network = self._pretrained(self.family.network, self._network_folder(path), torch.float32)
        return self._merged(network) if lora else network

    def _pretrained(self, name: str, folder: Path, dtype: torch.dtype) -> Any:
        return load_part("backbone", folder, name, dtype)

    def _architecture(self) -> dict[str, Any]:
        """The generator's configuration."""
        if self._options.generator is not None and (path := locate(self._options.generator)).is_dir():
            return read_json(self._network_folder(path) / "config.json")
        return self.network_config

    def _empty(self) -> nn.Module:
        """The generator's architecture, without weights where the caller says so."""
        network: nn.Module = class_of(self.family.network).from_config(self._architecture())
        return network

    def _from_file(self, path: Path) -> nn.Module:
        state = read_state("backbone.generator", path)
        refuse_lora("backbone.generator", path, state, self.family.pipeline, str(self.folder))
        refuse_nan("backbone.generator", path, state)
        state = self._in_diffusers_names(path, state)
        self._check_layout(path, state)
        return assemble(self._empty, state).requires_grad_(True)

    def _merged(self, network: nn.Module) -> nn.Module:
        """With the LoRA that the start has."""
        return merge_lora(network, locate(str(self._options.lora)), self.family.pipeline, self.family.part)

    def blank(self, count: int) -> Condition:
        """What :meth:`encode` gives for ``count`` of the longest prompts, all zeros, without text encoders: for plans and benchmarks."""
        raise NotImplementedError

    def load_decoder(self) -> None:
        """Load the VAE that pictures are decoded with, frozen."""
        quiet()
        dtype = getattr(torch, self._options.decode_dtype)
        vae = self._pretrained(self.vae_config["_class_name"], self._decoder_folder, dtype)
        if self._options.decode_gradient_checkpointing and isinstance(vae, class_of("AutoencoderKL")):
            vae.enable_gradient_checkpointing()
        self._vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> None:
        """Move what :meth:`load_decoder` and :meth:`load_text` loaded."""
        if self._vae is not None:
            self._vae.to(device)
        if self._text is not None:
            self._text.to(device)

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1], float32; rewards pull no pixel further out."""
        if self._vae is None:
            raise DIDRError(f"backbone {self._options.name}: load_decoder() comes before decode()")
        latent = self._unscaled(latent.float(), self._vae.config)
        pictures = self._vae.decode(latent.to(self._vae.dtype), return_dict=False)[0]
        return clamp_to_rewards(pictures.float() / 2 + 0.5)

    def _unscaled(self, latent: Tensor, vae: Any) -> Tensor:
        """From the network's scale to the VAE's, as the family's stock pipeline does with this configuration of a VAE."""
        return latent / vae.scaling_factor + (vae.get("shift_factor") or 0.0)  # type: ignore[no-any-return]

    def load_text(self) -> None:
        """Load tokenizers and text encoders: the reference's pipeline without network and VAE."""
        quiet()
        dtype, parts = getattr(torch, self._options.text_dtype), dict[str, Any].fromkeys((self.family.part, "vae"))
        others = [k for k in self._parts if k not in parts and (self.folder / k / "config.json").is_file()]
        parts |= {k: self._pretrained(self._parts[k], self.folder / k, dtype) for k in others}
        with uncollected():  # the classes of its parts are imported
            self._text = class_of(self.family.pipeline).from_pretrained(self.folder, dtype=dtype, **parts)

    def free_text(self) -> None:
        """Let go of tokenizers and text encoders."""
        self._text = None

    def _export(self, generator: nn.Module, folder: str, scheduler: Any, single: str) -> None:
        """A pipeline folder with the generator and ``scheduler``, and the bare state dict as the file ``single``, in the family's dtype."""
        family, out = self.family, Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().to("cpu", family.dtype).contiguous() for k, v in generator.state_dict().items()}
        write_network(out / family.part, self._architecture(), state, out / single)
        scheduler.save_pretrained(out / "scheduler")
        index = read_json(self.folder / "model_index.json")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        if self._options.vae:
            index["vae"] = ["diffusers", read_json(self._vae_folder / "config.json")["_class_name"]]
        for name in self._parts.keys() - {family.part, "scheduler"}:
            source = self._vae_folder if name == "vae" else self.folder / name
            copy_part(source, out / name, index[name][1], family.dtype)
        write_json(out / "model_index.json", index)
        if family.dtype == torch.float16:
            name_variant(out, "fp16")


def dtype_of(network: nn.Module) -> torch.dtype:
    """What ``network`` (a role on a base: the base) computes in; its own `dtype` would look at every parameter."""
    base = getattr(network, "base", network)
    first = next(base.parameters(), None) if isinstance(base, nn.Module) else None
    return getattr(network, "dtype", torch.float32) if first is None else first.dtype


def _upsampling(config: dict[str, Any]) -> int:
    """Pixels a side of a picture for each of a latent."""
    return int(2 ** (len(config.get("block_out_channels") or config["decoder_block_out_channels"]) - 1))


def read_json(path: Path) -> dict[str, Any]:
    """A config of a diffusers folder.

    Raises:
        DIDRError: it is missing or damaged.
    """
    if not path.is_file():
        raise DIDRError(f"backbone: {str(path)!r} is missing. Expected all of what save_pretrained writes.")
    return files.mapping(path.read_bytes(), str(path), "Write or fetch that folder again.")
