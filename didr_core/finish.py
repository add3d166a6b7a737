"""What a run leaves behind when its steps are done: the export. (Grids and scores follow.)"""

from __future__ import annotations

from collections.abc import Callable

from didr_core.config import Config
from didr_core.learner import Learner
from didr_core.runs import RunFolder


def finish(learner: Learner, config: Config, run: RunFolder, say: Callable[[str], None] = lambda _: None) -> None:
    """Export the running average of the generator to ``export/``."""
    say("exporting")
    learner.backbone.export(learner.generator("ema"), str(run.path / "export"))
