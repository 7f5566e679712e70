"""The order of the runs, the most telling first, and what one of them leaves on disk."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.case import Case
from benchmarks.quality.job import Job
from benchmarks.quality.sampling import measured
from benchmarks.quality.settings import (
    BY_DEFAULT,
    DISTILLED,
    EARLY,
    EARLY_FLOOR,
    FLOOR,
    FULL,
    OTHER_SETTINGS,
    QUARTER,
    ROUTED,
    SHORTCUTS,
    TRAINING_FREE_SHORTCUTS,
    TWO_BINS,
    UNTRAINED,
    Scale,
)
from benchmarks.quality.variants import build
from diffcr_compile.fast_bfloat16 import fast_bfloat16

SHEET = 40  # images that are kept for the sample sheets
# What others do, and what is done without training: at every budget.
OTHERS = (
    "paper's recipe",
    "tokens merged (2-D ToMe)",
    "steps reuse blocks",
    "dense, fewer steps",
    "training-free",
    TRAINING_FREE_SHORTCUTS,
)
# Calibrated on images: at the first budget only, as they turn out alike there.
ON_IMAGES = (
    "ours",
    "uniform (Mixture-of-Depths)",
    "blocks dropped",
    "random router",
    "ratios from measured errors",
)
# At the first budget only: what training costs.
FIFTH = "ours, a fifth of the steps"
DENSE = ("dense", "dense, fine-tuned")
TRAINED_DENSE = ("dense, fine-tuned", "dense" + DISTILLED)
EARLIER_SETTLED = (EARLY + DISTILLED, EARLY_FLOOR + DISTILLED)
STEPS_DISTILLED = tuple(
    name for name in ROUTED if name.endswith(DISTILLED) and name not in OTHER_SETTINGS
)
# With many steps, where leaving steps out is cheap.
MANY = ("dense", "ours", "dense, fewer steps", "steps reuse blocks", "blocks dropped")


def jobs(scale: Scale) -> list[list[Job]]:
    """All of them in groups, the most telling first: an interrupted comparison then has a table worth reading."""
    first, *rest = scale.budgets
    one, few = scale.seeds[0], scale.few
    groups = [
        [
            *with_all_seeds(("dense", *TRAINED_DENSE), (1.0,), scale),
            *with_all_seeds((*ON_IMAGES, *OTHERS), (first,), scale),
            *with_all_seeds((*STEPS_DISTILLED, *EARLIER_SETTLED, FIFTH), (first,), scale),
            Job(FLOOR + DISTILLED, first, one, few),
            *with_all_seeds((*OTHERS, *STEPS_DISTILLED), rest[:1], scale),
        ],
        [
            *with_all_seeds(TRAINED_DENSE, (1.0,), scale, QUARTER),
            *with_all_seeds(
                (*STEPS_DISTILLED, TWO_BINS + DISTILLED, FLOOR + DISTILLED),
                (first,),
                scale,
                QUARTER,
            ),
            Job(EARLY_FLOOR + DISTILLED, first, one, few, training=QUARTER),
            *with_all_seeds((SHORTCUTS + DISTILLED,), (first, *rest[:1]), scale, QUARTER),
            *with_all_seeds(("ours" + DISTILLED,), rest[:1], scale, QUARTER),
            *(
                Job(name, budget, one, few, training=QUARTER)
                for budget in rest
                for name in STEPS_DISTILLED
            ),
        ],
        with_all_seeds(
            ("ours" + DISTILLED, "uniform (Mixture-of-Depths)" + DISTILLED),
            (first,),
            scale,
            BY_DEFAULT,
        ),
        inpainting(scale),
        [Job(name, 1.0 if name == "dense" else first, one, scale.many) for name in MANY],
        [Job("dense", 1.0, one, steps) for steps in scale.dense_steps if steps != few],
        [
            Job(name, budget, one, few, training=shortest(name))
            for budget in rest[1:]
            for name in OTHERS
        ],
    ]
    seen: set[Job] = set()
    return [[j for j in group if not (j in seen or seen.add(j))] for group in groups]


def with_all_seeds(
    variants: Sequence[str], budgets: Sequence[float], scale: Scale, training: float = FULL
) -> list[Job]:
    return [
        Job(name, budget, seed, scale.few, training=training)
        for budget in budgets
        for seed in scale.seeds
        for name in variants
    ]


def shortest(variant: str) -> float:
    """The short training; what is not trained stands in the table of every length, under the full one."""
    return FULL if variant in UNTRAINED else QUARTER


def inpainting(scale: Scale) -> list[Job]:
    """The second task: the first budget, one seed. What is trained has the short training, and ours the long one too."""
    first, one, few = scale.budgets[0], scale.seeds[0], scale.few
    shares = dict.fromkeys(DENSE, 1.0) | dict.fromkeys((*ON_IMAGES, *OTHERS), first)
    return [
        *(
            Job(name, share, one, few, "inpainting", shortest(name))
            for name, share in shares.items()
        ),
        Job("ours", first, one, few, "inpainting"),
    ]


def run(case: Case) -> dict[str, Any]:
    """Build and measure; what was measured is in ``<name>.json``, some images beside it."""
    job, work = case.job, case.work
    path = work / f"{job.name}.json"
    if case.done and (job.variant != "dense" or case.dense_images.exists()):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    started = time.process_time()
    built = build(case)
    built_in = time.process_time() - started
    reference = case.dense_images
    dense_images = load_file(reference)["images"] if reference.exists() else None
    scores, images = measured(built, case, dense_images)
    # all of the dense model's, which the others are compared with
    kept = images if job.variant == "dense" else images[:SHEET]
    save_file({"images": kept.contiguous().clone()}, work / f"{job.name}.safetensors")
    result = {
        **dataclasses.asdict(job),
        **scores,
        "facts": built.facts,
        "made": made_where(case.scale.device),
        "cpu_seconds": {
            "build": round(built_in, 1),
            "all": round(time.process_time() - started, 1),
        },
    }
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
    return result


def made_where(device: str) -> dict[str, str]:
    """Device, version of torch and day of a run: a table may be put together from several machines."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    made = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if not fast_bfloat16(device):
        made["bfloat16_products"] = "in float32"
    return made
