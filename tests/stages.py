"""Cheap stand-ins for encoder and reward-model actors; a module of its own, because Ray's workers import it."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np


class Encoder:
    """Cheap, and slower for some blocks than for others, so that actors of a pool overtake each other."""

    width = 5

    def __init__(self, tree: dict[str, Any]) -> None:
        pass

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.03 * (int(batch["index"][0]) // 4 % 3))
        value = np.asarray(batch["index"], np.float32)
        return {
            **batch,
            "condition/x": np.repeat(value[:, None], self.width, 1),
            "condition/pid": value * 0 + os.getpid(),
        }


class Preparer:
    def __init__(self, tree: dict[str, Any]) -> None:
        pass

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        value = np.asarray(batch["index"], np.float32)
        return {**batch, "baseline": value, "spread": value}


class WideEncoder(Encoder):
    """A megabyte a block, at once: what a fast encoder before a slow trainer makes."""

    width = 65_536

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "condition/x": np.zeros((len(batch["index"]), self.width), np.float32)}
