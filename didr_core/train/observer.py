"""Who wants to hear of a run's progress: console, MLflow, Ray Train, whoever watches over hangs."""

from __future__ import annotations

from didr_core.types import DIDRError, StepReport


class Observer:
    """Hears of a run's progress; every method may be left as it is."""

    def step(self, report: StepReport) -> None:
        """One iteration is done. Metrics are global means, plus ``time/step`` and ``time/data`` in seconds."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint after ``step`` is on its way to the disk; on ranks but 0: the step is reached."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """What is being done outside of steps: loading, exporting, scoring; counts where there is something to count."""

    def note(self, text: str, style: str = "") -> None:
        """What stays to be read."""

    def stuck(self, error: DIDRError) -> None:
        """The process hangs where no exception reaches it, and ends after this call, which comes from another thread."""
