"""Make the bundled world again from nothing: ``python -m examples.tiny_world.build [part ...]``.

Parts run in order and need the ones before them. Every part is seeded, prints the time it took (kept in quality.json) and writes a
checkpoint every two minutes: started again, it continues. A finished part is left alone unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.tiny_world import (
    assemble,
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
    "taste": {"groups": 8, "batch": 2, "steps": 4, "warmup": 2, "measure": 8},
    "judge": {"groups": 8, "batch": 2, "steps": 4, "warmup": 2, "align": 1, "measure": 8},
}


def _prompts(build: Path, world: Path, **settings: Any) -> None:
    prompts.build(world, **settings)


def _tokenizer(build: Path, world: Path) -> None:
    tokenizer.build(build)


def _vae(build: Path, world: Path, **settings: Any) -> None:
    train_vae.build(build, **settings)


def _reference(build: Path, world: Path, **settings: Any) -> None:
    train_reference.build(build, **settings)
    assemble.assemble_pipeline(build, world)


def _pairs(build: Path, world: Path, **settings: Any) -> None:
    train_generator.build_pairs(build, **settings)


def _regression(build: Path, world: Path, **settings: Any) -> None:
    train_generator.build_regression(build, world, **settings)


def _distill(build: Path, world: Path, **settings: Any) -> None:
    distill.build(build, world, **settings)


def _taste(build: Path, world: Path, **settings: Any) -> None:
    train_rewards.build("taste", build, world, **settings)


def _judge(build: Path, world: Path, **settings: Any) -> None:
    train_rewards.build("judge", build, world, **settings)


def _quality(build: Path, world: Path) -> None:
    for name in quality.MEASURES:
        print(name, quality.measure(name, world), flush=True)


def _card(build: Path, world: Path) -> None:
    card.write(world)


PARTS: dict[str, Callable[..., None]] = {
    "prompts": _prompts,
    "tokenizer": _tokenizer,
    "vae": _vae,
    "reference": _reference,
    "pairs": _pairs,
    "regression": _regression,
    "distill": _distill,
    "taste": _taste,
    "judge": _judge,
    "quality": _quality,
    "card": _card,
}
GROUPS = {"rewards": ("taste", "judge")}


def build_part(
    name: str,
    build: Path = training.BUILD_DIR,
    world: Path = training.WORLD_DIR,
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
        for leftover in (f"{name}_state.pt", f"{name}_groups.pt", "latents.pt" if name == "reference" else ""):
            (build / leftover).unlink(missing_ok=True) if leftover else None
        for folder in {"pairs": ("pair_blocks",), "distill": ("distill",)}.get(name, ()):
            shutil.rmtree(build / folder, ignore_errors=True)
    started = time.monotonic()
    PARTS[name](build, world, **(settings or {}))
    seconds = round(time.monotonic() - started, 1)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(f"{seconds}\n")
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
