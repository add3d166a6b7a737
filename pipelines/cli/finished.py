"""Commands on runs that are there: runs, sample, compare, play, export."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


def _path(text: str) -> Path:
    """Shells leave the ``~`` of ``--output=~/x`` to us."""
    return Path(os.path.expanduser(text))


def _grid(text: str) -> Path:
    if not text.endswith((".png", ".html")):
        raise typer.BadParameter(f"{text!r}: expected a file name that ends in .png or .html")
    return _path(text)


Run = Annotated[str | None, typer.Option("--run", help="a run's folder or name")]
Export = Annotated[Path | None, typer.Option("--export", parser=_path, metavar="PATH", help="an export folder")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto")]
Beside = Annotated[
    list[str] | None,
    typer.Option("--beside", metavar="MODEL", help="draw the same noise by start or teacher, too; repeatable"),
]


@app.command(epilog="Example: didr runs")
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=_path, help="where runs lie")] = Path("runs"),
) -> None:
    """List the runs in a folder, the newest first: status, step, scores, alarms."""
    from pipelines.cli.runs import show_runs

    show_runs(folder)


@app.command(epilog='Example: didr sample --run runs/NAME --prompt "a red ring" --beside start')
def sample(
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="what to draw; repeatable")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="and all prompts of a file of any kind that `didr prompts` reads")
    ] = None,
    run: Run = None,
    export: Export = None,
    seed: Annotated[
        int, typer.Option(min=0, help="noise of the first picture; the next ones take seed + 1, + 2, ...")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="pictures a prompt")] = 1,
    beside: Beside = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=_path, metavar="PATH", help="folder for the PNGs")
    ] = Path("samples"),
    grid: Annotated[
        Path | None,
        typer.Option(
            parser=_grid, metavar="FILE", help="all of them together, too: a picture (.png) or a page (.html)"
        ),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Draw pictures in one step, from a finished run or an export folder."""
    from pipelines.cli.draw import draw, model_of, prompts_of

    texts = prompts_of(prompt or (), prompts)
    for path in draw(model_of(run, export, device, beside or ()), texts, seed, count, output, grid):
        typer.echo(path)


@app.command(epilog="Example: didr compare runs/ONE runs/OTHER")
def compare(
    run: Annotated[str, typer.Argument(help="a run's folder or name")],
    other: Annotated[str, typer.Argument(metavar="RUN", help="another's")],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="DIR", help="folder (default: compare-RUN-RUN beside the first)"),
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="prompts (default: the first run's held-out ones)")] = None,
    count: Annotated[int, typer.Option(min=1, help="of them, the first")] = 64,
    beside: Beside = None,
) -> None:
    """Write a page of two runs on the same prompts and noise, scored by the first run's reward and judge."""
    from pipelines.cli.draw import contest_of_runs
    from pipelines.evaluate import evaluate

    options, folder = contest_of_runs(run, other, prompts, count, beside or (), typed())
    evaluate(options, out or str(folder), local=True)


@app.command(epilog="Example: didr play runs/NAME")
def play(
    run: Annotated[str, typer.Argument(help="a run's folder or name")],
    beside: Beside = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the page, on this machine alone")] = 7860,
    device: Device = "cpu",
) -> None:
    """Open a local page with a prompt, a seed and the pictures before and after. Needs gradio."""
    from pipelines.cli.play import gradio, serve

    library = gradio()  # before any weights are read
    from pipelines.cli.draw import model_of

    serve(library, model_of(run, None, device, beside or ["start"]), run, port)


@app.command("export", epilog="Example: didr export --run runs/NAME --output share/model")
def export_command(
    run: Annotated[str, typer.Option("--run", help="a run's folder or name")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", parser=_path, metavar="PATH", help="folder to write (default: export/ in the run)"
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="ema (running average) or generator (raw)")] = "ema",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
) -> None:
    """Write a run's newest checkpoint as a diffusers folder with single-file weights and a model card."""
    from didr_core.types import DIDRError

    if weights not in ("ema", "generator"):
        raise DIDRError(f"--weights {weights!r}: expected ema or generator")
    from didr_core.evaluate.finish import export as export_of
    from didr_core.export.sample import trained_generator
    from didr_core.train.run_folder import RunFolder

    found = RunFolder.find(run)
    config = found.config()
    backbone, network, step = trained_generator(config, found, weights)
    folder = export_of(config, found, backbone, network, output, scored=weights == "ema", overwrite=overwrite)
    typer.echo(f"{folder} (weights of step {step})")


def typed() -> str:
    """The command line, for run.json and the model card: without the machine's own folders."""
    program = Path(sys.argv[0]).name
    name = "didr" if program in ("didr", "main.py") else f"python -m pipelines.{Path(program).stem}"
    return f"{name} {shlex.join(_relative(a) for a in sys.argv[1:])}"


def _relative(argument: str) -> str:
    path = Path(argument)
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else argument
