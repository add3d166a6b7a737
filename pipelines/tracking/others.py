"""Trackers beside MLflow (`tracking.also`): TensorBoard and Weights & Biases, each an optional package.

What they are told is a copy, as with MLflow: a tracker that fails is warned of once, and a training goes on.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from didr_core.config import Config, dump, flatten
from didr_core.config.files import replace_text
from didr_core.train.run_folder import RunFolder
from didr_core.types import DIDRError
from pipelines.tracking.address import reason
from pipelines.tracking.base import Status, Tracker

CODES: dict[Status, int] = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}


def open_others(config: Config, folder: Path, *, group: str = "") -> list[Tracker]:
    """Those that `tracking.also` names, for the run in ``folder``.

    Args:
        group: of runs that belong together (a sweep).

    Raises:
        DIDRError: one that cannot begin, a server that is away for instance; asked before training starts.
    """
    made: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(config, folder),
        "wandb": lambda: WandbTracker(config, folder, group),
    }
    opened = []
    for name in config.tracking.also:
        try:
            opened.append(made[name]())
        except Exception as error:
            raise DIDRError(
                f"tracking.also={list(config.tracking.also)}: {name} cannot begin ({reason(error)}). Mend that, or leave it out;"
                " WANDB_MODE=offline needs no server."
            ) from error
    return opened


class TensorBoardTracker(Tracker):
    """Event files in ``<run>/tensorboard``. A resumed run takes back the steps after its checkpoint."""

    title = "TensorBoard"

    def __init__(self, config: Config, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # Ray Tune brings it; to look at the files takes `tensorboard`

        self._step = RunFolder(folder).last_step()
        again = self._step + 1 if self._step else None
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=again, flush_secs=30, filename_suffix=f".{self._step:08d}"
        )
        rows = "".join(f"| {key} | {value} |\n" for key, value in flatten(dump(config)).items())
        self._try(self._writer.add_text, "config", f"| key | value |\n|---|---|\n{rows}", self._step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._step = step
        for key, value in values.items():
            self._try(self._writer.add_scalar, key, value, step)

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """A 1 for every alarm that rings."""
        self.metrics(step, {f"alarm/{name}": 1.0 for name in names})

    def final(self, values: Mapping[str, float]) -> None:
        """At the last step."""
        self.metrics(self._step, values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Pictures alone."""
        if path.suffix == ".png":
            self._try(self._picture, path)

    def _picture(self, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(path.stem, pixels, self._step, dataformats="HWC")

    def close(self, status: Status = "FINISHED") -> None:
        """See :class:`Tracker`."""
        self._try(self._writer.close)


def _own_id(folder: Path) -> str:
    """The run's id there, of its folder's name and kept in it: another folder of that name is another run."""
    file = folder / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, f"{folder.name}-{uuid.uuid4().hex[:8]}")
    return file.read_text()


class WandbTracker(Tracker):
    """One run of Weights & Biases, in the project `tracking.experiment`, its files in ``<run>/wandb``; a resumed run goes on in it."""

    title = "Weights & Biases"

    def __init__(self, config: Config, folder: Path, group: str = "") -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.init(
            project=config.tracking.experiment,
            id=_own_id(folder),
            name=folder.name,
            group=group or None,
            dir=str(folder),
            config=flatten(dump(config)),
            tags=[config.name, config.algorithm.name],
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`; a step that the run has is left out there."""
        self._try(self._run.log, dict(values), step=step)

    def alarms(self, step: int, names: Sequence[str]) -> None:
        """A 1 for every alarm that rings."""
        self.metrics(step, {f"alarm/{name}": 1.0 for name in names})

    def final(self, values: Mapping[str, float]) -> None:
        """Into the summary, by which runs are ranked."""
        self._try(self._run.summary.update, dict(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Into the run's config: its own tags have no values."""
        self._try(self._run.config.update, dict(values), allow_val_change=True)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Pictures and the page are shown, other files kept."""
        if path.suffix == ".png":
            self._try(lambda: self._run.log({path.stem: self._wandb.Image(str(path))}))
        elif path.suffix == ".html":
            self._try(lambda: self._run.log({path.stem: self._wandb.Html(path.read_text())}))
        elif path.is_file():
            self._try(self._run.save, str(path), base_path=str(path.parent), policy="now")

    def close(self, status: Status = "FINISHED") -> None:
        """See :class:`Tracker`."""
        self._try(self._run.finish, exit_code=CODES[status])
