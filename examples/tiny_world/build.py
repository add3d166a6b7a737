"""Make the bundled world again from nothing: ``python -m examples.tiny_world.build [part ...]``.

Parts run in order and need the ones before them. Every part is seeded, prints the time it took (kept in quality.json) and writes a
checkpoint every two minutes: started again, it continues. A finished part is left alone unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from didr_core.config import WORLD
from didr_core.config.files import replace_text
from examples.tiny_world import (
    anchor,
    card,
    distill,
    prompts,
    quality,
    tokenizer,
    train_generator,
    train_reference,
    train_rewards,
    train_vae,
    training,
)

# A world of the right shapes in seconds, for tests of the build itself.
MINIATURE: dict[str, dict[str, Any]] = {
    "prompts": {"train": 60, "held_out": 40, "shards": 2},
    "vae": {"pictures": 64, "crop_steps": 2, "full_steps": 2, "decoder_steps": 2, "batch": 4, "processes": 1},
    "reference": {"scenes": 64, "steps": 4, "batch": 4, "processes": 1},
    "pairs": {"count": 8, "steps": 2, "batch": 4, "processes": 1},
    "regression": {"steps": 4, "batch": 4, "processes": 1},
    "distill": {"train.steps": 2, "train.batch": 4, "train.anchor.batch": 4},
    "anchor": {"count": 8, "steps": 2, "batch": 4},
    "taste": {"groups": 8, "batch": 2, "steps": 4, "warmup": 2, "measure": 8},
    "judge": {"groups": 8, "batch": 2, "steps": 4, "warmup": 2, "align": 1, "measure": 8},
}


PARTS: dict[str, Callable[..., None]] = {
    "prompts": prompts.build,
    "tokenizer": tokenizer.build,
    "vae": train_vae.build,
    "reference": train_reference.build,
    "pairs": train_generator.build_pairs,
    "regression": train_generator.build_regression,
    "distill": distill.build,
    "anchor": anchor.build,
    "taste": partial(train_rewards.build, "taste"),
    "judge": partial(train_rewards.build, "judge"),
    "quality": quality.build,
    "card": card.build,
}
GROUPS = {"rewards": ("taste", "judge")}


def build_part(
    name: str,
    build: Path = training.BUILD_DIR,
    world: Path = WORLD,
    again: bool = False,
    settings: dict[str, Any] | None = None,
) -> bool:
    """Build one part; returns False when it was finished before. ``settings`` override the part's defaults."""
    if name not in PARTS:
        raise ValueError(f"unknown part {name!r}; expected one of {', '.join([*PARTS, *GROUPS])}")
    done = build / "done" / name
    if done.exists() and not again:
        return False
    if again:
        kept = [*build.glob(f"{name}*_state.pt"), build / f"{name}_groups.pt"]
        for leftover in kept + ([build / "latents.pt"] if name == "reference" else []):
            leftover.unlink(missing_ok=True)
        for folder in {"pairs": ("pair_blocks",), "distill": ("distill",)}.get(name, ()):
            shutil.rmtree(build / folder, ignore_errors=True)
    started = time.monotonic()
    PARTS[name](build, world, **(settings or {}))
    seconds = round(time.monotonic() - started, 1)
    replace_text(done, f"{seconds}\n")
    quality.write_quality(world, seconds={name: seconds})
    print(f"{name}: {seconds:.0f} s", flush=True)
    return True


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join([*PARTS, *GROUPS])}; all by default")
    parser.add_argument("--again", action="store_true", help="build finished parts anew")
    parser.add_argument(
        "--miniature", type=Path, help="a folder for a tiny untrained world (tests); leaves the bundled one alone"
    )
    arguments = parser.parse_args()
    names = [part for name in arguments.parts or list(PARTS) for part in GROUPS.get(name, (name,))]
    for name in names:
        if arguments.miniature:
            build_part(
                name, arguments.miniature / "build", arguments.miniature / "world", arguments.again, MINIATURE.get(name)
            )
        elif not build_part(name, again=arguments.again):
            print(f"{name}: finished before, see {training.BUILD_DIR / 'done'} (--again builds it anew)")


if __name__ == "__main__":
    main()
