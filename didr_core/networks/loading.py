"""Cheap looks at weights before anything is loaded (names, shapes, damage), and loading without noise or silent gaps."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from didr_core.types import DIDRError

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index*.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def check_folder(key: str, folder: Path, file: str, field: str, expected: Sequence[str]) -> dict[str, object]:
    """The JSON ``file`` of ``folder``, whose ``field`` must be one of ``expected``.

    Raises:
        DIDRError: missing folder, missing or broken file, another class of model.
    """
    path = folder / file
    if not folder.is_dir():
        raise DIDRError(
            f"{key}={str(folder)!r}: no such folder. Expected a folder with {file} ({' or '.join(expected)})."
        )
    if not path.is_file():
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} is missing (found: {_found(folder)}). "
            f"Expected {' or '.join(expected)} saved by save_pretrained."
        )
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} is not valid JSON ({error}). Was the download cut short?"
        ) from error
    if content.get(field) not in expected:
        raise DIDRError(
            f"{key}={str(folder)!r}: {file} says {field}={content.get(field)!r}; expected {' or '.join(expected)}."
        )
    return content  # type: ignore[no-any-return]


def check_model(key: str, folder: Path, expected: Sequence[str], tensors: Sequence[str] = ()) -> dict[str, Any]:
    """A transformers model folder: ``config.json`` of one of the ``expected`` model types, whole weights beside it, which hold ``tensors``.

    Reads headers only. Returns the configuration.

    Raises:
        DIDRError: see :func:`check_folder`; no weights, damaged weights, or tensors missing.
    """
    content = check_folder(key, folder, "config.json", "model_type", expected)
    names = check_weights(key, folder, "model.safetensors or pytorch_model.bin")
    missing = [name for name in tensors if name not in names]
    if names and missing:
        raise DIDRError(
            f"{key}={str(folder)!r}: its weights lack {_some(missing)}, so they are not a whole {' or '.join(expected)} model. "
            "Expected all of what save_pretrained writes."
        )
    return dict(content)


def check_weights(key: str, folder: Path, usual: str) -> set[str]:
    """Whole weights lie beside ``config.json``; ``usual`` says how such files are called. Returns the names of their tensors where
    headers or an index tell them (torch files do not).

    Raises:
        DIDRError: none, damaged, or pointers.
    """
    files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    if not files:
        raise DIDRError(
            f"{key}={str(folder)!r}: no weights beside config.json (found: {_found(folder)}). Expected {usual}; download it too."
        )
    names: set[str] = set()
    for path in files:
        _refuse_pointers(key, path)
        if path.suffix == ".safetensors":
            names |= set(_header(key, path))
        elif ".index." in path.name:
            places = json.loads(path.read_text()).get("weight_map", {})
            names |= set(places)
            if absent := sorted({file for file in places.values() if not (folder / file).is_file()}):
                raise DIDRError(
                    f"{key}={str(folder)!r}: {path.name} names {_some(absent)}, not there. Was the download cut short?"
                )
    return names


def variant(folder: Path) -> str | None:
    """ "fp16" where a diffusers folder holds that variant of its weights only, as many downloads do."""
    names = {path.name for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    return "fp16" if names and all(".fp16" in name for name in names) else None


def check_tokenizer(key: str, folder: Path) -> None:
    """Raises DIDRError unless ``folder`` holds tokenizer files."""
    if not folder.is_dir():
        raise DIDRError(
            f"{key}={str(folder)!r}: no such folder. Expected one with {' or '.join(TOKENIZER_FILES)}; set `tokenizer`."
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DIDRError(
            f"{key}={str(folder)!r}: no tokenizer there (found: {_found(folder)}). Expected {' or '.join(TOKENIZER_FILES)}; "
            "set `tokenizer` to the folder of the model that these weights were trained from."
        )


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
    what = f"not in this folder (found: {_found(path)})" if path.is_dir() else "no such file or folder"
    raise DIDRError(f"{key}={str(path)!r}: {what}. Expected the published file {' or '.join(names)}, or its folder.")


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
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise DIDRError(
            f"{key}={str(path)!r}: not a readable torch file ({reason}). Was the download cut short? Fetch it again."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        kind = f"a dict of {_some(list(content))}" if isinstance(content, dict) else type(content).__name__
        raise DIDRError(f"{key}={str(path)!r}: holds {kind}; expected a state dict of named tensors.")
    return dict(content)


def shapes_of(key: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of weights: of ``.safetensors`` the header alone is read, torch files are memory-mapped.

    Raises:
        DIDRError: see :func:`read_state`.
    """
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in read_state(key, path).items()}

    _refuse_pointers(key, path)
    names = _header(key, path)
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def without_prefix(state: Mapping[str, Any], marker: str) -> dict[str, Any]:
    """``state`` without what trainers put before every name (``module.``, ``unet.``, ``model.diffusion_model.``).

    ``marker`` is the bare name of one tensor, which tells the prefix; without it, or with two of it, nothing changes.
    """
    found = [name for name in state if name == marker or name.endswith(f".{marker}")]
    prefix = found[0].removesuffix(marker) if len(found) == 1 else ""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def check_layout(key: str, path: Path, state: State, expected: Shapes, what: str) -> None:
    """Raises DIDRError unless ``state`` has exactly the names and shapes ``expected`` of ``what``; names the first that differ."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
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
        DIDRError: one is missing: another kind of file.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise DIDRError(
            f"{key}={str(path)!r}: no tensor {_some(missing)} (it has {_some(sorted(state))}). Expected {what}."
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
    """``make.from_pretrained(folder)`` in float32, frozen, eval mode, with nothing left at random.

    Raises:
        DIDRError: tensors that the model needs are not in the folder (transformers would initialise them at random).
    """
    quiet()
    model, info = make.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise DIDRError(f"{key}={str(folder)!r}: weights lack {_some(missing)}. Expected a whole {make.__name__}.")
    return model.eval().requires_grad_(False)


def quiet() -> None:
    """Switch off the loading bars and advice of transformers and diffusers: our own lines say what is happening."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


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


def _found(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(str(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
