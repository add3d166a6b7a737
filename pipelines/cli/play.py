"""`didr play`: a page on this machine with a prompt, a seed and the pictures before and after."""

from __future__ import annotations

import importlib
from typing import Any

from PIL.Image import Image

from didr_core.export.sample import OneStep, to_image
from didr_core.types import DIDRError
from pipelines.report.figures import MODEL_LABELS


def gradio() -> Any:
    """The library that makes the page.

    Raises:
        DIDRError: it is not installed.
    """
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise DIDRError(
            f"play: needs gradio, which cannot be imported ({error}). Say `pip install gradio`, or use `didr sample --grid`."
        ) from error


def serve(library: Any, model: OneStep, name: str, port: int) -> None:
    """Show the page until Ctrl-C."""

    def pictures(prompt: str, seed: float | None) -> list[Image]:
        (row,) = model.rows([prompt], [int(seed or 0)])
        return [to_image(picture) for picture in row.values()]

    library.Interface(
        fn=pictures,
        inputs=[library.Textbox(label="prompt"), library.Number(value=0, precision=0, label="seed")],
        outputs=[library.Image(label=MODEL_LABELS.get(model_name, model_name)) for model_name in model.samplers],
        title=f"DIDR: {name}",
        flagging_mode="never",
        analytics_enabled=False,
    ).launch(server_name="127.0.0.1", server_port=port)
