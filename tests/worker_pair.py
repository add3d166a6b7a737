"""Two worker processes for tests of training in a group, without what costs most of such a test: importing torch and diffusers twice."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "torch.distributed.fsdp", "peft"]


def spawn_pair(function: Callable[..., None], *arguments: Any) -> None:
    """``function(rank, *arguments)`` in two processes, which fork from a server that has imported the libraries once and done nothing.

    Raises:
        Exception: of the first that failed, with its traceback.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, arguments, nprocs=2, start_method="forkserver")
