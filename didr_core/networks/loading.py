"""Cheap looks at weights before anything is loaded (names, shapes, damage), and loading without noise or silent gaps."""

from __future__ import annotations

import gc
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.config import hub
from didr_core.types import DIDRError

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

WEIGHT_FILE = re.compile(
    r"(?!model\..*bin|diffusion_pytorch_model\..*bin\.index)"  # nobody reads these
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[a-z]\w*))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?:\.(?P<of>\w+))?\.json)?"
)
"""One file, or the index of several, as diffusers and transformers name them."""
SMALL = 2**16
"""Numbers of a tensor that is looked through for NaN before anything is loaded: biases, norms, the last layer."""


def check_folder(key: str, folder: Path, file: str, field: str, expected: Sequence[str]) -> dict[str, Any]:
    """The JSON ``file`` of ``folder``, whose ``field`` must be one of ``expected``.

    Raises:
        DIDRError: missing folder, missing or broken file, another class of model.
    """
    path = folder / file
    if not folder.is_dir():
        raise DIDRError(
            f"{key}={str(folder)!r}: no such folder. Expected a folder with {file} ({' or '.join(expected)}).{hub_hint(folder)}"
        )
    if not path.is_file():
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} is missing (found: {found_in(folder)}). "
            f"Expected {' or '.join(expected)} saved by save_pretrained."
        )
    content = read_json(key, path)
    if content.get(field) not in expected:
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} says {field}={content.get(field)!r}; expected {' or '.join(expected)}."
        )
    return content


def check_model(key: str, folder: Path, expected: Sequence[str], tensors: Sequence[str] = ()) -> dict[str, Any]:
    """A transformers model folder: ``config.json`` of one of the ``expected`` model types, whole weights beside it, which hold ``tensors``.

    Reads headers only. Returns the configuration.

    Raises:
        DIDRError: see :func:`check_folder`; no weights, damaged weights, or tensors missing.
    """
    content = check_folder(key, folder, "config.json", "model_type", expected)
    names = check_weights(key, folder, "model.safetensors or pytorch_model.bin")
    if missing := [name for name in tensors if name not in names]:
        raise DIDRError(
            f"{key}={str(folder)!r}: its weights lack {_some(missing)}, so they are not a whole {' or '.join(expected)} model. "
            "Expected all of what save_pretrained writes."
        )
    return content


def check_weights(key: str, folder: Path, usual: str) -> dict[str, tuple[int, ...]]:
    """The weights beside ``config.json`` that would be loaded are whole, and their small tensors finite; other files are not looked at.
    ``usual`` says how such files are called. Returns names and shapes of their tensors.

    Raises:
        DIDRError: none, damaged, pointers, or a tensor with NaN.
    """
    path, _ = find_weights(folder)
    if path is None:
        raise DIDRError(
            f"{key}={str(folder)!r}: no weights beside config.json (found: {found_in(folder)}). Expected {usual}; download it too."
        )
    return {name: shape for file in _files(key, path) for name, shape in shapes_of(key, file).items()}


def _files(key: str, path: Path) -> list[Path]:
    """``path`` itself, or the files that it is the index of; raises DIDRError where one is missing."""
    _refuse_pointers(key, path)
    if path.suffix != ".json":
        return [path]
    files = [path.parent / name for name in sorted(set(read_json(key, path).get("weight_map", {}).values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise DIDRError(
            f"{key}={str(path.parent)!r}: {path.name} names {_some(absent)}, not there. Was the download cut short?"
        )
    return files


def read_weights(key: str, path: Path) -> State:
    """All tensors of a file, or of the files that ``path`` is the index of. Memory-mapped where the files can be.

    Raises:
        DIDRError: see :func:`read_state`.
    """
    return {name: value for file in _files(key, path) for name, value in read_state(key, file).items()}


def variant(folder: Path) -> str | None:
    """Which variant of its weights ``from_pretrained`` must be told to take of a folder: "fp16", "bf16", "non_ema", ...; None = plain."""
    return find_weights(folder)[1]


def find_weights(folder: Path) -> tuple[Path | None, str | None]:
    """What ``from_pretrained`` takes of a folder, a file or the index of several, and its variant: plain before a variant (of several the
    one of most bits), safetensors before torch files. What else lies there is nobody's.
    """
    ranks = {None: 0, "fp32": 1, "bf16": 2, "fp16": 3}
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        name = WEIGHT_FILE.fullmatch(path.name)
        if name:
            which = name["of"] if name["index"] else name["variant"]
            one_first = bool(name["index"]) == (name["stem"] != "diffusion_pytorch_model")
            found.append((ranks.get(which, 4), which or "", name["kind"] == "bin", one_first, path))
    if not found:
        return None, None
    _, which, _, _, path = min(found)
    return path, which or None


def find_file(key: str, path: Path, names: Sequence[str]) -> Path:
    """``path`` itself where it is a file, else the first of ``names`` in the folder ``path``.

    Raises:
        DIDRError: there is none.
    """
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    what = f"not in this folder (found: {found_in(path)})" if path.is_dir() else "no such file or folder"
    expected = f"Expected the published file {' or '.join(names)}, or its folder."
    raise DIDRError(f"{key}={str(path)!r}: {what}. {expected}{hub_hint(path)}")


def hub_hint(path: Path) -> str:
    """How to make or fetch what is not here: what recipes name, and what a name like ``owner/model`` means on the hub."""
    made = " `python -m didr_core.world.random_models` makes it." * (path.parts[:2] == ("runs", "random"))
    made += " docs/sdxl.md and docs/zimage.md have the lines that download it." * (path.parts[:1] == ("models",))
    told = "" if made or path.exists() or path.parent.is_dir() else hub.command(str(path))
    return f" If it is a model of the hub: {told} puts it into the cache, where it is looked for." if told else made


def read_state(key: str, path: Path) -> State:
    """The state dict in a ``.safetensors`` or torch file (also under "state_dict"). Memory-mapped: looking at shapes reads no data.

    Raises:
        DIDRError: damaged, a pointer in place of the file, or something other than named tensors.
    """
    _refuse_pointers(key, path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        _header(key, path)
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise DIDRError(
                f"{key}={str(path)!r}: holds Python objects (a pickled module?), which are not run here; expected named tensors alone. "
                "Load it where you trust it and save `module.state_dict()` with safetensors.torch.save_file."
            ) from error
        raise DIDRError(
            f"{key}={str(path)!r}: not a readable torch file ({reason(error)}). Was the download cut short? Fetch it again."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        kind = f"a dict of {_some(list(content))}" if isinstance(content, dict) else type(content).__name__
        raise DIDRError(f"{key}={str(path)!r}: holds {kind}; expected a state dict of named tensors.")
    return dict(content)


def shapes_of(key: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of weights: of ``.safetensors`` the header and small tensors are read, torch files are memory-mapped.

    Raises:
        DIDRError: see :func:`read_state`; NaN in a tensor of up to :data:`SMALL` numbers.
    """
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        state = read_state(key, path)
        refuse_nan(key, path, {name: value for name, value in state.items() if value.numel() <= SMALL})
        return {name: tuple(value.shape) for name, value in state.items()}

    _refuse_pointers(key, path)
    names = _header(key, path)
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        refuse_nan(key, path, {name: file.get_tensor(name) for name in names if math.prod(shapes[name]) <= SMALL})
    return shapes


def refuse_nan(key: str, path: Path, state: Mapping[str, Tensor]) -> None:
    """Raises DIDRError for a tensor that is not all finite numbers, naming it."""
    for name, value in state.items():
        if (
            value.is_floating_point()
            and not value.sum(dtype=torch.float32).isfinite()
            and not value.float().isfinite().all()
        ):
            kind = "NaN" if value.float().isnan().any() else "infinity"
            raise DIDRError(
                f"{key}={str(path)!r}: {name} holds {kind}. Expected finite numbers; take an earlier checkpoint, or fetch the file again."
            )


def without_prefix(state: Mapping[str, Any], marker: str) -> dict[str, Any]:
    """``state`` without what trainers put before every name (``module.``, ``unet.``, ``model.diffusion_model.``).

    ``marker`` is the bare name of one tensor, which tells the prefix; without it, or with two of it, nothing changes.
    """
    found = [name for name in state if name == marker or name.endswith(f".{marker}")]
    prefix = found[0].removesuffix(marker) if len(found) == 1 else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def check_layout(key: str, path: Path, state: State | Shapes, expected: Shapes, what: str, extra: bool = False) -> None:
    """Raises DIDRError unless ``state`` (tensors, or their shapes) has exactly the names and shapes ``expected`` of ``what``, or more names
    where ``extra`` are let pass; names the first that differ."""
    missing = [name for name in expected if name not in state]
    unexpected = [] if extra else [name for name in state if name not in expected]
    found = {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}
    shapes = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    wrong = [
        f"{len(items)} {label} ({_some(items)})"
        for label, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if items
    ]
    if wrong:
        raise DIDRError(f"{key}={str(path)!r}: tensors {', '.join(wrong)}. Expected {what}.")


def marker_shapes(key: str, path: Path, state: State, names: Sequence[str], what: str) -> list[tuple[int, ...]]:
    """Shapes of the tensors ``names``, from which the sizes of ``what`` follow.

    Raises:
        DIDRError: one is missing, or no matrix: another kind of file.
    """
    missing = [name for name in names if name not in state or state[name].ndim < 2]
    if missing:
        raise DIDRError(
            f"{key}={str(path)!r}: no matrix {_some(missing)} (it has {_some(sorted(state))}). Expected {what}."
        )
    return [tuple(state[name].shape) for name in names]


def count_layers(state: State, prefix: str) -> int:
    """One more than the largest N in names ``<prefix>N.``; 0 where there is none."""
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix))
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


def assemble(make: Callable[[], nn.Module], state: State) -> nn.Module:
    """The module of ``make()`` holding ``state``, in float32, frozen, eval mode; its own initialisation is never computed.

    Raises:
        RuntimeError: names or shapes differ (a defect of the caller: :func:`check_layout` comes before).
    """
    with torch.device("meta"):
        model = make()
    model.load_state_dict({k: v.float().contiguous() for k, v in state.items()}, strict=True, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # not in state dicts: transformers' running numbers of positions
            owner, _, leaf = name.rpartition(".")
            assert leaf == "position_ids", name
            setattr(model.get_submodule(owner), leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model.eval().requires_grad_(False)


def load_pretrained(key: str, make: type[Any], folder: Path, **options: Any) -> Any:
    """``make.from_pretrained(folder)`` in float32 (or ``dtype`` of the options), frozen, eval mode, with nothing left at random.

    Raises:
        DIDRError: no model can be made of the folder; tensors are missing (which transformers leaves at random) or of other shapes.
    """
    quiet()
    options = {"dtype": torch.float32} | options | {"variant": variant(folder), "ignore_mismatched_sizes": True}
    try:
        model, info = make.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # whatever a configuration or a torch file leads it to
        raise DIDRError(
            f"{key}={str(folder)!r}: transformers cannot load it ({reason(error)}). Expected a whole {make.__name__}."
        ) from error
    missing = sorted(info["missing_keys"])
    if other := [f"{name} {list(has)} instead of {list(wanted)}" for name, has, wanted in info["mismatched_keys"]]:
        raise DIDRError(
            f"{key}={str(folder)!r}: weights differ from config.json: {_some(other)}. Expected both of one model."
        )
    if missing:
        raise DIDRError(f"{key}={str(folder)!r}: weights lack {_some(missing)}. Expected a whole {make.__name__}.")
    return model.eval().requires_grad_(False)


def quiet() -> None:
    """Switch off the loading bars and advice of transformers and diffusers: our own lines say what is happening."""
    with uncollected():
        import diffusers
        import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def class_of(name: str) -> Any:
    """A class of diffusers or transformers; the module that it is in is imported."""
    with uncollected():
        import diffusers
        import transformers

        return getattr(diffusers, name, None) or getattr(transformers, name)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside. Imports and plans make hundreds of thousands of objects that stay: looking at them again and again
    takes a fourth of their time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _refuse_pointers(key: str, path: Path) -> None:
    """Two usual accidents: a Git LFS pointer, and a web page saved under the file's name."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    what = {b"version https://git-lfs": "a Git LFS pointer", b"<": "a web page", b"": "empty"}
    for start, name in what.items():
        if head.startswith(start) if start else not head:
            raise DIDRError(
                f"{key}={str(path)!r}: is {name}, not weights. Fetch the file itself (`git lfs pull`, or the raw download)."
            )


def _header(key: str, path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise DIDRError(
            f"{key}={str(path)!r}: not a whole safetensors file ({error}). Was the download cut short? Fetch it again."
        ) from error


def read_json(key: str, path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises DIDRError where it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # of JSON, of UTF-8; something other than an object
        raise DIDRError(
            f"{key}={str(path.parent)!r}: {path.name} is not valid JSON ({error}). Was the download cut short?"
        ) from error


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__


def found_in(folder: Path) -> str:
    """Names of what lies there, for messages."""
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(str(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
