"""Whether the disks beside the run folder's have room: MLflow's, and that of a Ray of our own."""

from __future__ import annotations

import os
from pathlib import Path

from didr_core.config import Tracking
from didr_core.data.storage import room
from pipelines.tracking.tracker import resolve

RAY_FREE = 256 * 2**20
"""For logs and what does not fit in the object store."""


def check_disks(tracking: Tracking, runs: Path, ray: bool) -> None:
    """Look before anything starts.

    Args:
        runs: folder in which the run's folder lies. ray: a Ray is started here.

    Raises:
        DIDRError: one of them is short; names the setting, path, needed and free.
    """
    uri = resolve(tracking, runs)
    if uri.startswith("sqlite:///"):
        room("tracking.uri", Path(uri.removeprefix("sqlite:///")).absolute().parent)
    if ray:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # where Ray looks
        room("RAY_TMPDIR", Path(folder), RAY_FREE)
