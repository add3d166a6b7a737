"""Part "card": ``world/card.md`` from ``quality.json``, so that no number is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from didr_core.config.files import replace_text
from examples.tiny_world.pairs_data import FACET_PAIRS
from examples.tiny_world.quality import read_quality

HEAD = """---
license: cc0-1.0
---
# The bundled tiny world

Real models at toy size, of the very classes SDXL uses, made from nothing by `python -m examples.tiny_world.build` on two CPU cores.
No pretrained weight and no outside picture went in.

Licence: pictures, prompts and weights in this folder are CC0-1.0; where a software licence is wanted, Apache-2.0.

| path | what |
|---|---|
| `pipeline/` | `StableDiffusionXLPipeline` (UNet, two CLIP text encoders, AutoencoderTiny, DDIM schedule): the reference, or teacher |
| `generator/` | UNet folder: the one-step generator to start from, t = 399, pure noise in |
| `rewards/taste/` | `CLIPModel`: the training reward, PickScore's score and loss |
| `rewards/judge/` | BLIP as ImageReward uses it: the held-out judge, other pairs and seed, never trained against |
| `prompts/train`, `prompts/heldout` | Parquet shards (`id`, `prompt`), disjoint in what they say, see `captions.py` |

Utility ("people"): faithfulness facets, a clear bonus for a picture with everything right, plus taste = size + contrast.
Centring is measured but deliberately not preferred: captions leave position free and we measure the entropy of what they leave free.

What it is not: the pictures are 32x32 scenes of coloured shapes. It shows that the code works and which way methods differ; it says
nothing about how good a method is on photographs.
"""


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * float(value):.1f} %"


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.2f}"


def render_card(quality: dict[str, Any]) -> str:
    """Markdown text of the card; sections that were not measured are left out."""
    lines = [HEAD]
    if "checker" in quality:
        c = quality["checker"]
        lines += ["## Checker (`python -m examples.tiny_world.quality checker`)", ""]
        lines += [
            f"Own pictures right {_percent(c['right_strict'])}, captions with one fact wrong passed {_percent(c['wrong_strict'])} "
            f"(loose {_percent(c['wrong_loose'])}), {c['ms_per_picture']:.1f} ms a picture.",
            "",
        ]
    if "vae" in quality:
        v = quality["vae"]
        lines += ["## Autoencoder (`... quality vae`)", ""]
        lines += [
            f"Reconstructions strict {_percent(v['strict_noise_0.0'])}, with latent noise 0.1 {_percent(v['strict_noise_0.1'])}; "
            f"latents mean {v['latent_mean']:.3f}, standard deviation {v['latent_std']:.3f}.",
            "",
        ]
    rows = [(name, quality[name]) for name in ("reference", "generator") if name in quality]
    if rows:
        teacher = quality.get("reference", {})
        lines += ["## Reference and one-step generator (`... quality reference generator`)", ""]
        lines += [
            f"Held-out captions (the column `captions` says how many); reference: {teacher.get('steps', '-')} DDIM steps, guidance "
            f"{teacher.get('guidance', '-')}; generator: one step. Last two columns: entropy in bits.",
            "",
            "| | captions | strict | loose | single | count | pair | relation | size | contrast | utility | background | position |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, q in rows:
            shares = " | ".join(
                _percent(q.get(key))
                for key in ("strict", "loose", *(f"strict_{k}" for k in ("single", "count", "pair", "relation")))
            )
            numbers = " | ".join(
                _number(q.get(key)) for key in ("size", "contrast", "utility", "background_bits", "position_bits")
            )
            lines.append(f"| {name} | {q['pictures']:.0f} | {shares} | {numbers} |")
        lines.append("")
    seeds = quality.get("generator", {}).get("across_seeds")
    if seeds:
        lines += [
            "Across 16 seeds of 20 captions that leave background and place free (bits; difference to the teacher with 95 % interval):",
            "",
        ]
        lines += ["| | generator | teacher | difference |", "|---|---|---|---|"]
        for key in ("background_bits", "background_bits_within", "position_bits", "position_bits_within"):
            s = seeds[key]
            lines.append(
                f"| {key} | {s['a']:.2f} | {s['b']:.2f} | {s['difference']:+.2f} ({s['low']:+.2f} to {s['high']:+.2f}) |"
            )
        lines.append("")
    if "rewards" in quality:
        r = quality["rewards"]
        lines += ["## Rewards (`... quality rewards`): share of noise-free pairs ranked right, held-out captions", ""]
        keys = [("pair_accuracy", "all pairs"), ("pair_accuracy_clear", "pairs > 0.2 apart")]
        keys += [("generator_pairs", "generator's own pictures"), ("generator_pairs_clear", "the same, > 0.2 apart")]
        lines += ["| | " + " | ".join(text for _, text in keys) + " |", "|---|" + "---|" * len(keys)]
        lines += [
            f"| {name} | " + " | ".join(_percent(r[name].get(key)) for key, _ in keys) + " |"
            for name in ("taste", "judge")
        ]
        lines += [
            "",
            "By facet (clean pairs that differ in this facet only; where a reward is weak it can be hacked):",
            "",
        ]
        lines += ["| | " + " | ".join(FACET_PAIRS) + " |", "|---|" + "---|" * len(FACET_PAIRS)]
        lines += [
            f"| {name} | " + " | ".join(_percent(r[name]["facets"][facet]) for facet in FACET_PAIRS) + " |"
            for name in ("taste", "judge")
        ]
        lines.append("")
    if "seconds" in quality:
        lines += ["## Time to build (seconds of wall clock, two cores, shared with other work)", ""]
        lines += [", ".join(f"{name} {value:.0f}" for name, value in quality["seconds"].items()) + ".", ""]
    return "\n".join(lines)


def build(folder: Path, world: Path) -> None:
    """Write ``world``/card.md."""
    replace_text(world / "card.md", render_card(read_quality(world)))
