"""Align in one process, without Ray.

    python -m didr_core.train --recipe tiny [--set drp.beta=0.5] [--output DIR] [--resume RUN]

An entry point stands above every room: it puts training, scores and export together.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from didr_core import config as configs
from didr_core.evaluate.finish import train_and_finish
from didr_core.plan import fit
from didr_core.plan.preflight import preflight
from didr_core.train.ending import stoppable
from didr_core.train.loop import outcome
from didr_core.train.observer import Observer
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError, NoAnswerError, StepReport


class _Lines(Observer):
    """A plain line a step."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        if done in (0, total):
            print(text, flush=True)

    def step(self, report: StepReport) -> None:
        shown = ("loss/generator", "reward/gain", "drs/ratio", "time/step")
        values = " ".join(f"{k}={report.metrics[k]:.4g}" for k in shown if k in report.metrics)
        print(f"step {report.step} {values} {' '.join(report.alarms)}".rstrip(), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m didr_core.train", description="Align in one process, without Ray.")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--output", help="this run's folder (default: runs/<name>-<time>)")
    parser.add_argument("--resume", metavar="RUN", help="continue a run: its folder or name")
    given = parser.parse_args(arguments)
    try:
        if given.resume:
            run = RunFolder.find(given.resume)
            config = run.config(given.overrides)
            index = preflight(config, output=run.path, note=print)
        else:
            config = configs.load(given.recipe, given.overrides)
            folder = RunFolder.at("--output", given.output) if given.output else None
            index = preflight(config, output=folder.path if folder else None, note=print)
            config, told = fit.here(config)
            print(told, end="\n" if told else "")
            run = RunFolder.create(config, given.output, " ".join(["python -m didr_core.train", *sys.argv[1:]]))
        with stoppable(), run.mirrored(config.train.keep_checkpoints), outcome(run):
            if changed := run.same_start(index.digest):
                print(changed)
            run.write_config(config)
            train_and_finish(config, run, index, _Lines())
    except DIDRError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, NoAnswerError):
            os._exit(1)
        return 1
    print(f"done: {run.place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
