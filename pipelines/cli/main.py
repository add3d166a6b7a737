"""`didr`: jobs, prompts, doctor, explain, config; more commands in `finished.py`. Each imports the heavy libraries that it needs itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli import finished
from pipelines.cli.finished import typed
from pipelines.cli.submit import submit

app = typer.Typer(
    no_args_is_help=True,
    epilog="Example: didr align --recipe tiny --local",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    no_args_is_help=True,
    epilog="Example: didr submit --address http://HEAD:8265 -- align --recipe tiny --output /mnt/runs/one",
)(submit)
config_app = typer.Typer(
    help="Look at recipes and resolved configurations.",
    no_args_is_help=True,
    epilog="Example: didr config show --recipe tiny",
)
app.add_typer(config_app, name="config")

STOPPED = (130, 143)  # exit codes: Ctrl-C, SIGTERM
AUTO = "auto: the newest unfinished one that was begun alike, else a new one"

Recipe = Annotated[str, typer.Option("--recipe", "-r", help="a name from `didr config list`, or a YAML file")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="override a setting, e.g. drp.beta=0.5; repeatable"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Ray's own log, and tracebacks")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"didr {version('didr')}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Align one-step text-to-image generators with human preference (DIDR)."""


@app.command(epilog="Example: didr align --recipe tiny --set drp.beta=0.5 --local")
def align(
    recipe: Recipe = "tiny",
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="this run's folder, a path or s3://... (default: <output>/<name>-<time>); with --resume: where runs lie"
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="go on with a run: its folder or name, latest, " + AUTO)
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="one process, without Ray")] = False,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster: auto, or HOST:PORT (default: a Ray of our own)")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="print where the time of a step went")] = False,
    verbose: Verbose = False,
) -> None:
    """Train: prompts -> encoder and reward actors -> worker group; then grids, scores, report, export."""
    from pipelines import align as job

    job.align(
        recipe,
        overrides or (),
        output=output,
        resume=resume,
        local=local,
        address=address,
        verbose=verbose,
        profile=profile,
        command=typed(),
    )


@app.command(epilog="Example: didr sweep --recipe tiny --space tilt_by_drp --trials 6")
def sweep(
    recipe: Recipe = "tiny",
    space: Annotated[str, typer.Option(help="a file of tune_spaces/ by name, or a path ending in .py")] = "tilt_by_drp",
    trials: Annotated[int | None, typer.Option(min=1, help="how many (default: 12, or the whole grid)")] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="the sweep's folder in the output folder")] = None,
    output: Annotated[str | None, typer.Option(help="where sweeps and runs lie (default: the recipe's)")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="go on with a sweep: its name or folder, latest, " + AUTO)
    ] = None,
    search: Annotated[str | None, typer.Option(help="grid, random or optuna (default: as the space says)")] = None,
    scheduler: Annotated[str, typer.Option(help="none, or asha: stop trials with a poor score early")] = "none",
    concurrent: Annotated[int | None, typer.Option(min=1, help="trials at once (default: as many as fit)")] = None,
    workers: Annotated[int, typer.Option(min=1, help="training workers of one trial; 1 = its own process")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the points, not of the trainings")] = 0,
    patience: Annotated[float, typer.Option(min=0.1, help="give up after so many minutes without news")] = 30.0,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster: auto, or HOST:PORT (default: a Ray of our own)")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Many trainings over a space: which beta, which K? Ends in a Pareto front and a recommended trial."""
    from pipelines import sweep as job
    from pipelines.sweeps.folder import SweepOptions

    options = SweepOptions(
        recipe=recipe,
        overrides=overrides or (),
        space=space,
        trials=trials or 0,
        search=search or "",
        scheduler=scheduler,
        concurrent=concurrent or 0,
        workers=workers,
        name=name or "",
        seed=seed,
        patience=patience,
        command=typed(),
    )
    job.sweep(options, output=output, resume=resume, address=address, verbose=verbose)


@app.command(epilog="Example: didr evaluate -m start -m ours=runs/NAME --out runs/contest")
def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            metavar="NAME[=PATH][,OPTION=VALUE...]",
            help="start, teacher (the recipe's), or NAME=PATH of a run, diffusers folder, network, LoRA or folder of pictures; options: "
            "steps, guidance, timesteps (999/749/...), scheduler, size, dtype, base; repeatable",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="folder; the same command again goes on in it")],
    recipe: Recipe = "tiny",
    prompts: Annotated[str | None, typer.Option(help="prompts (default: the recipe's held-out ones)")] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="of them, the first (default: all; of the recipe's, evaluation.prompts)"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="noise seeds a prompt (default: the recipe's)")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "--rewards",
            metavar="[NAME=]KEY[,OPTION=VALUE...]",
            help="e.g. hpsv2,path=FOLDER; repeatable (default: the recipe's reward and judge)",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="prompts drawn at once (default: 8; the bundled world's 64)")
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="a model: how far the others' pictures are from its, FID, KID, CMMD, coverage"
        ),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="REWARD", help="whose picture features --real measures in (default: judge)")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="diversity over seeds by LPIPS (pip install lpips)")] = False,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="pictures also as a scorer reads them: plain, geneval, geneval2, dpg, hpsv2, unigenbench"),
    ] = None,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="one process, without Ray")] = False,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster: auto, or HOST:PORT (default: a Ray of our own)")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Score any models on the same prompts and noise: pictures, rewards, intervals, who wins, report."""
    from pipelines import evaluate as job

    options = job.Options(
        model,
        recipe,
        overrides or (),
        prompts,
        count,
        seeds,
        reward or (),
        batch,
        real=real,
        features=features,
        lpips=lpips,
        layouts=layout or (),
        command=typed(),
    )
    job.evaluate(options, out, local=local, address=address, verbose=verbose)


app.add_typer(finished.app)  # its commands, in this place of the list


@app.command(epilog="Example: didr prompts prompts.csv --out prompts/train --drop")
def prompts(
    files: Annotated[
        list[str], typer.Argument(help="txt, csv, tsv, json, jsonl, arrow, Parquet: files, folders, globs")
    ],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    column: Annotated[str, typer.Option(help="text column")] = "prompt",
    id_column: Annotated[str, typer.Option(help="id column, where there is one")] = "id",
    against: Annotated[list[str] | None, typer.Option(help="another set: what do both hold? repeatable")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="leave out duplicates, and what the other set holds")] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="count what its encoder and reward would cut off")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Turn prompt files of any kind into Parquet shards, and say what is wrong with them."""
    from pipelines.cli.prompts import prompts as turn

    turn(files, out, column, id_column, against or (), drop, recipe, overrides or ())


@app.command(epilog="Example: didr pairs --recipe tiny --count 64 --out pairs.safetensors")
def pairs(
    out: Annotated[Path, typer.Option(help="file to write, .safetensors")],
    recipe: Recipe = "tiny",
    count: Annotated[int, typer.Option(min=1, help="of training prompts, and of pairs")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="pictures at once")] = 16,
    overrides: Overrides = None,
) -> None:
    """What the guided teacher makes of noise, for `train.anchor`: the regression that holds what captions leave free."""
    from didr_core import config as configs
    from didr_core.evaluate.pairs import make_pairs
    from didr_core.plan.preflight import preflight

    config = configs.load(recipe, [*(overrides or ()), "train.anchor=null"])
    preflight(config)
    make_pairs(config, count, out, batch, tell=lambda made: typer.echo(f"{made:,} of {count:,} pairs"))
    typer.echo(f'{out}; in the recipe: train: {{anchor: {{pairs: "{out}", weight: 0.3}}}}')


@app.command(epilog="Example: didr doctor --recipe sdxl_1gpu --gpu-gb 40")
def doctor(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="plan memory and FLOPs of this recipe; needs no weights")
    ] = None,
    overrides: Overrides = None,
    gpu_gb: Annotated[
        float | None, typer.Option("--gpu-gb", min=1, help="GPU to plan for (default: the smallest here, else 80)")
    ] = None,
    address: Annotated[str | None, typer.Option(help="look at a Ray cluster too: auto, or HOST:PORT")] = None,
    load_code: Annotated[
        bool, typer.Option("--load-code", help="run the Python code that the recipe names, to plan with it")
    ] = False,
) -> None:
    """What is installed, GPUs, cluster; with a recipe: does it fit, and what to change. Exit code 1 where it does not."""
    from pipelines.cli.doctor import doctor as examine

    if not examine(recipe, overrides or (), gpu_gb, address, load_code):
        raise typer.Exit(1)


@app.command(epilog="Example: didr explain drp.beta")
def explain(
    key: Annotated[str | None, typer.Argument(help="e.g. drp.beta, or a section: drp (default: every key)")] = None,
    recipe: Recipe = "tiny",
    overrides: Overrides = None,
) -> None:
    """What a key of a recipe means, what it may be, and what it is in a recipe."""
    from pipelines.cli.explain import explain as tell

    tell(key, recipe, overrides or ())


@config_app.command("show", epilog="Example: didr config show --recipe zimage_1gpu")
def config_show(recipe: Recipe = "tiny", overrides: Overrides = None) -> None:
    """The resolved configuration, the sizes that follow from it, and where each part comes from."""
    from pipelines.cli.show import show

    show(recipe, overrides or ())


@config_app.command("list", epilog="Example: didr config list")
def config_list() -> None:
    """Recipes and components."""
    from pipelines.cli.show import show_known

    show_known()


def main(arguments: Sequence[str] | None = None, prog: str = "didr") -> None:
    """The entry point: runs, and exits with 0, 1 (an error, its reason last), 2 (wrong usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, prog_name=prog, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = STOPPED[0]
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        sys.exit(_explain(error, verbose="-v" in given or "--verbose" in given))
    if code in STOPPED and given[:1] != ["submit"]:  # 130 is also what typer makes of Ctrl-C
        typer.echo(
            "interrupted; `didr align --resume RUN`, `didr sweep --resume NAME` or the same `didr evaluate` goes on from there",
            err=True,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Any, verbose: bool) -> int:
    """A user's mistake is one clear block, a wrong option one line; anything else is a defect and keeps its traceback."""
    from didr_core.config.passwords import redacted
    from didr_core.types import DIDRError, NoAnswerError

    hangs = isinstance(error, NoAnswerError)
    if hangs or (isinstance(error, DIDRError) and not verbose):
        typer.echo(redacted(f"error: {error}"), err=True)
        if hangs:
            sys.stdout.flush()
            os._exit(1)
        return 1
    if hasattr(error, "format_message"):
        error.show()
        return int(error.exit_code)
    raise error


if __name__ == "__main__":
    main()
