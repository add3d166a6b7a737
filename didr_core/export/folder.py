"""From a trained generator to a folder that stock diffusers loads: pipeline, single-file weights, config, scores and a model card.

The family's own part (which classes, which files) is ``Backbone.export``; here it is put together, described, and moved into place in one
rename, so that an export folder is either whole or not there.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from didr_core.config import Config, build, dump, locate
from didr_core.config.files import clear_partials, held, replace_text
from didr_core.export.card import CARD, model_card, public_path, public_text
from didr_core.export.sample import refuse_another_picture
from didr_core.networks import lora
from didr_core.types import Backbone, DIDRError


def export_run(
    config: Config,
    backbone: Backbone,
    generator: nn.Module,
    folder: Path,
    *,
    scores: Mapping[str, Any] | None = None,
    told: str = "Not scored.",
    run: Mapping[str, Any] | None = None,
    pictures: Path | None = None,
    overwrite: bool = False,
    redraw: bool = False,
) -> Path:
    """Write the export folder, all of it or nothing.

    Args:
        scores: tree of scores.json. told: the same in Markdown, for the card. run: tree of run.json (command, commit).
        pictures: a grid to show in the card.
        overwrite: replace a folder that an earlier export wrote (recognised by its card).
        redraw: load what was written again, and compare a picture of it with the generator's.

    Returns:
        ``folder``, with ``model_index.json`` and its parts, ``didr_<name>_..._fp16.safetensors``, README.md, config.yaml, scores.json.

    Raises:
        DIDRError: the folder holds something else, cannot be written (full disk), or what was written draws another picture: the folder
            is then as it was.
    """
    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise DIDRError(
                f"export: {str(folder)!r} is not empty. Choose another folder, or overwrite it with --overwrite."
            )
        if not (folder / CARD).is_file() or not (folder / "config.yaml").is_file():
            raise DIDRError(
                f"export: {str(folder)!r} is not an export of ours and is left alone. Choose another folder."
            )
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    clear_partials(folder.parent, glob.escape(folder.name))
    writing = ExitStack()
    try:
        part.mkdir(parents=True)
        writing.enter_context(held(part))
        backbone.export(lora.plain(generator), str(part))
        lora.save_adapter(generator, part)
        _name_single_files(part, config.name)
        _forget_origins(part)
        replace_text(part / "config.yaml", yaml.safe_dump(public_config(config), sort_keys=False))
        if scores:
            (part / "scores.json").write_text(public_text(json.dumps(scores, indent=1, ensure_ascii=False)) + "\n")
        if pictures and Path(pictures).is_file():
            shutil.copyfile(pictures, part / "grid.png")
        for path in part.rglob("*.safetensors"):  # safetensors gives them to their owner alone
            path.chmod(part.stat().st_mode & 0o666)
        files = sorted(p.name for p in part.iterdir())
        replace_text(part / CARD, model_card(config, scores=told, run=run, files=files))
        if redraw and hasattr(config.backbone, "exported"):  # families say how their exports are read
            refuse_another_picture(config, part, generator)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        reason = error.strerror or error
        raise DIDRError(
            f"export: cannot write {str(folder)!r} ({reason}). Free space, or choose another folder."
        ) from error
    finally:
        writing.close()
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def public_config(config: Config) -> dict[str, Any]:
    """The configuration without what is this machine's own: no tracking, of absolute paths the last part (a backbone's file is needed)."""
    tree = {key: _public_tree(value) for key, value in dump(config).items() if key != "tracking"}
    tree["backbone"]["name"] = config.backbone.name
    return tree


def _public_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public_tree(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public_tree(inner) for inner in value]
    return public_path(value) if isinstance(value, str) else value


def _forget_origins(folder: Path) -> None:
    """Where the parts were loaded from, which diffusers notes in their configurations, is nobody's business."""
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        tree = json.loads(path.read_text()) if '"_name_or_path"' in path.read_text() else {}
        if tree.pop("_name_or_path", None):
            path.write_text(json.dumps(tree, indent=2) + "\n")


def exported(config: Config, folder: str | Path) -> nn.Module:
    """The generator that another run exported, as this config's backbone loads it; ``folder`` is the run's or its ``export``.

    Raises:
        DIDRError: nothing exported there, or nothing of this config's family.
    """
    backbone = config.backbone.exported(find_export(folder))
    network: nn.Module = build("backbones", backbone).load_network("generator")
    return network


def find_export(folder: str | Path) -> Path:
    """The exported pipeline of a run folder, or the folder itself where it is one."""
    for export in (locate(str(folder)) / "export", locate(str(folder))):
        if (export / "model_index.json").is_file():
            return export
    raise DIDRError(
        f"evaluation.control={str(folder)!r}: no export there. Expected the folder of a finished run (with export/model_index.json)"
        " or an exported pipeline."
    )


def _name_single_files(folder: Path, name: str) -> None:
    """``didr_1step_...`` to ``didr_<name>_1step_...``, as the official files are named."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    for path in folder.glob("didr_*.safetensors"):
        if not path.name.startswith(f"didr_{slug}_"):
            path.rename(path.with_name(path.name.replace("didr_", f"didr_{slug}_", 1)))
