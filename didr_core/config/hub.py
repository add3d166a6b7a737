"""Models of the Hugging Face hub by name, ``owner/model`` or ``owner/model@revision``: looked up in huggingface_hub's own cache, and
downloaded into it once, before a run starts. Of weights only safetensors are fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from didr_core.types import DIDRError

NAME = re.compile(
    r"(?!.*\.(?:safetensors|bin|pt|pth|ckpt|json|py|yaml|parquet)$)([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?"
)
WEIGHTS = "*.safetensors"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
FILES = ("*.json", "*.txt", "*.md", "*.jinja", "*.model", WEIGHTS)


def name_of(path: str) -> tuple[str, str] | None:
    """``(owner/model, revision)`` of a name, "main" where it says none; None of what can only be a path."""
    found = NAME.fullmatch(path)
    return (found[1], found[2] or "main") if found else None


def command(path: str) -> str:
    """What downloads the model of that name; empty for paths."""
    name, revision = name_of(path) or ("", "main")
    return f"`hf download {name}{'' if revision == 'main' else f' --revision {revision}'}`" if name else ""


def cached(path: str) -> Path | None:
    """The folder that holds what was downloaded of the model of that name; None where nothing was, or ``path`` is no name."""
    if (found := name_of(path)) is None:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    name, revision = found
    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / revision
    snapshot = folder / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


def is_place(value: str) -> bool:
    """Whether a text of a component's options names weights: a path, or a model of the hub."""
    return "/" in value or value.endswith(SUFFIXES)


def fetch(key: str, options: Mapping[str, Any]) -> bool:
    """Download what is still missing of every model that ``options`` names and that is no path here. Bars show how far it is.

    Returns:
        Whether there is any such name.

    Raises:
        DIDRError: the hub cannot be asked, or has no such model for this user.
    """
    names = [(at, value) for at, value in texts(key, options) if name_of(value) and not Path(value).exists()]
    for at, value in names:
        _download(at, value)
    return bool(names)


def texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text below ``value`` with its dotted key, but for names of components."""
    if isinstance(value, str):
        yield key, value
    for at, below in (
        value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, list) else ())
    ):
        if at != "name":
            yield from texts(f"{key}.{at}", below)


def _download(key: str, path: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import enable_progress_bars

    name, revision = name_of(path) or (path, "main")
    said = f"{key}={path!r}: no such folder here"
    enable_progress_bars()  # transformers switches them off for all
    try:
        # a listing of files would be tried again for 23 s where nobody answers
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or ()]
        if "model_index.json" in files:
            from diffusers import DiffusionPipeline  # knows which files a pipeline needs

            DiffusionPipeline.download(name, revision=revision, use_safetensors=True)
        else:
            wanted = [f for f in FILES if f != WEIGHTS or not key.endswith(".tokenizer")]
            snapshot_download(name, revision=revision, allow_patterns=wanted)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DIDRError(
            f"{said}, and the hub has no model {name!r} at revision {revision!r} for you. Expected a path, or a model of the hub; "
            "for a gated one accept its terms on its page, then `hf auth login`."
        ) from error
    except Exception as error:  # of three libraries: no network, a full disk, no safetensors
        raise DIDRError(
            f"{said}, and it cannot be fetched from the hub ({str(error).strip().partition(chr(10))[0][:160] or type(error).__name__}). "
            f"Where there is a network: {command(path)}; copy that cache (HF_HOME) here, or give a path."
        ) from error
