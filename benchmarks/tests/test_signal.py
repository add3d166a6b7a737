"""Signal and noise of gradients whose law is known."""

from __future__ import annotations

import pytest
import torch

from benchmarks import signal
from didr_core.config import load


def test_signal_noise_and_the_estimators_share() -> None:
    noise = torch.Generator().manual_seed(0)
    mean = torch.full((400,), 0.1)  # |E g|^2 = 4
    batches = 0.2 * torch.randn(300, 1, 400, generator=noise)  # 16
    proxy = 0.3 * torch.randn(300, 2, 400, generator=noise)  # 36
    found = signal.split(mean + batches + proxy)
    assert found["signal"] == pytest.approx(4, rel=0.1) and found["error"] < 0.4
    assert found["noise"] == pytest.approx(52, rel=0.05)
    assert found["estimator"] == pytest.approx(36, rel=0.05)
    row = {"particles": 8, "found": found}
    assert signal.predicted(row, 8) == pytest.approx(4 / 52, rel=0.15)
    assert signal.predicted(row, 10**9) == pytest.approx(4 / 16, rel=0.15)


def test_the_tilt_alone_is_a_valid_algorithm() -> None:
    config = load("tiny_blackbox", ["algorithm=benchmarks.signal:Tilt", "drp.particles=4"])
    assert isinstance(signal.Tilt(config.algorithm), signal.DIDR)  # type: ignore[arg-type]
