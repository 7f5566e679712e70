"""Quality against MACs, and samples of every variant from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.quality.job import Job
from benchmarks.quality.jobs import ON_IMAGES, ON_IMAGES_TOO, OTHERS
from benchmarks.quality.settings import DISTILLED
from benchmarks.quality.table import OUR_VARIANTS
from diffcr_compile.report import write_sample_sheet

COLUMNS = 10


def curve(rows: Sequence[Mapping[str, Any]], steps: int, path: Path) -> None:
    """KID against MACs with few steps, a line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 4.5))
    variants = list(dict.fromkeys(row["variant"] for row in rows if row["steps"] == steps))
    # a colour for each way to route, in whichever way it is trained
    ways = list(dict.fromkeys(variant.removesuffix(DISTILLED) for variant in variants))
    colours = dict(zip(ways, plt.get_cmap("tab20").colors, strict=False))
    for variant in variants:
        mine = [r for r in rows if r["variant"] == variant and r["steps"] == steps]
        mine.sort(key=lambda row: row["macs"]["mean"])
        x = [100 * row["macs"]["mean"] for row in mine]
        y = [row["kid_x1000"]["mean"] for row in mine]
        spread = [
            [row["kid_x1000"]["mean"] - row["kid_x1000"]["min"] for row in mine],
            [row["kid_x1000"]["max"] - row["kid_x1000"]["mean"] for row in mine],
        ]
        look = {"lw": 2.5, "zorder": 3} if variant in OUR_VARIANTS else {"lw": 1}
        look["color"] = colours[variant.removesuffix(DISTILLED)]
        look |= {"marker": "s", "ls": "--"} if DISTILLED in variant else {"marker": "o"}
        axes.errorbar(x, y, spread, capsize=3, label=variant, **look)
    axes.set_xlabel("MACs of the sampling loop, % of dense")
    axes.set_ylabel("KID x 1000, lower is better")
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sheet(budget: float, seed: int, steps: int, work: Path, path: Path) -> list[str]:
    """A row of samples per variant, few steps; returns the names of the rows, top to bottom."""
    candidates = [Job(name, 1.0, seed, steps) for name in ("dense", "dense, fine-tuned")]
    compressed = (*ON_IMAGES, *ON_IMAGES_TOO, *OTHERS, "training-free")
    candidates += [Job(name, budget, seed, steps) for name in compressed]
    there = [job for job in candidates if (work / f"{job.name}.safetensors").exists()]
    images = [load_file(work / f"{job.name}.safetensors")["images"][:COLUMNS] for job in there]
    write_sample_sheet(torch.cat(images).numpy(), path, columns=COLUMNS, scale=2)
    return [job.variant for job in there]
