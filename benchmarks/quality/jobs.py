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
    ERRORS_SHORTCUTS,
    FLOOR,
    FULL,
    QUARTER,
    SHORTCUTS,
    TRAINING_FREE_SHORTCUTS,
    TWO_BINS,
    UNTRAINED,
    Scale,
)
from benchmarks.quality.variants import build
from diffcr_compile.fast_bfloat16 import fast_bfloat16

SHEET = 40  # images that are kept for the sample sheets
# What others do: without training, and with.
TRICKS = ("tokens merged (2-D ToMe)", "steps reuse blocks", "dense, fewer steps")
OTHERS = ("paper's recipe", *TRICKS)
# Calibrated on images: at the first budget only, as they turn out alike there.
ON_IMAGES = ("ours", "uniform (Mixture-of-Depths)", "blocks dropped")
ON_IMAGES_TOO = ("random router", "ratios from measured errors")
UNIFORM = "uniform (Mixture-of-Depths)" + DISTILLED
DROPPED = "blocks dropped" + DISTILLED
RANDOM = "random router" + DISTILLED
ERRORS = "ratios from measured errors" + DISTILLED
STEPS_DISTILLED = ("ours" + DISTILLED, UNIFORM, DROPPED, RANDOM, ERRORS)
# With many steps, where leaving steps out is cheap.
MANY = ("ours", "dense, fewer steps", "steps reuse blocks")


def jobs(scale: Scale) -> list[list[Job]]:
    """All of them in groups, the most telling first: an interrupted comparison then has a table worth reading.

    A run takes ten minutes to an hour of a CPU core. So three seeds are for what is compared closely; one seed is for what the
    short training or another budget has settled already.
    """
    first, *rest = scale.budgets
    every, two, one, few = scale.seeds, scale.seeds[:2], scale.seeds[:1], scale.few

    def runs(
        variants: Sequence[str],
        budgets: Sequence[float],
        seeds: Sequence[int] = every,
        training: float = FULL,
    ) -> list[Job]:
        return [
            Job(name, budget, seed, few, training=training)
            for budget in budgets
            for seed in seeds
            for name in variants
        ]

    dense, main, tight, loose = (1.0,), (first,), rest[:1], rest[1:]
    groups = [
        [
            *runs(("dense", "dense, fine-tuned"), dense),
            *runs(("dense" + DISTILLED,), dense, one),
            *runs(ON_IMAGES, main),
            *runs(ON_IMAGES_TOO, main, two),
            *runs(OTHERS, main),
            *runs(("training-free",), main, two),
            *runs((TRAINING_FREE_SHORTCUTS,), main, one),
            *runs(("ours" + DISTILLED, UNIFORM, EARLY + DISTILLED), main),
            *runs((EARLY_FLOOR + DISTILLED, "ours, a fifth of the steps"), main),
            *runs((ERRORS,), main, two),
            *runs((DROPPED, RANDOM, FLOOR + DISTILLED), main, one),
            *runs((*OTHERS, UNIFORM, DROPPED, ERRORS), tight),
            *runs(("ours" + DISTILLED,), tight, two),
            *runs((RANDOM,), tight, one),
        ],
        [
            *runs(("dense, fine-tuned",), dense, every, QUARTER),
            *runs(("dense" + DISTILLED,), dense, one, QUARTER),
            *runs((*STEPS_DISTILLED, FLOOR + DISTILLED), main, every, QUARTER),
            *runs((TWO_BINS + DISTILLED,), main, two, QUARTER),
            *runs((EARLY_FLOOR + DISTILLED, SHORTCUTS + DISTILLED), main, one, QUARTER),
            *runs(("ours" + DISTILLED, SHORTCUTS + DISTILLED), tight, every, QUARTER),
            *runs((DROPPED, ERRORS), tight, every, QUARTER),
            *runs((UNIFORM, RANDOM, ERRORS_SHORTCUTS + DISTILLED), tight, one, QUARTER),
            *runs(("ours" + DISTILLED, UNIFORM), loose, one, QUARTER),
        ],
        runs(("ours" + DISTILLED, UNIFORM), main, every, BY_DEFAULT),
        inpainting(scale),
        [Job("dense", 1.0, *one, steps) for steps in (*scale.dense_steps, scale.many)],
        [Job(name, first, *one, scale.many, training=shortest(name)) for name in MANY],
        runs((*TRICKS, "training-free"), loose, one),
    ]
    seen: set[Job] = set()
    return [[j for j in group if not (j in seen or seen.add(j))] for group in groups]


def shortest(variant: str) -> float:
    """The short training; what is not trained stands in the table of every length, under the full one."""
    return FULL if variant in UNTRAINED else QUARTER


def inpainting(scale: Scale) -> list[Job]:
    """The second task: the first budget, one seed. What is trained has the short training, and ours the long one too."""
    first, one, few = scale.budgets[0], scale.seeds[0], scale.few
    shares = {"dense": 1.0, "dense, fine-tuned": 1.0} | dict.fromkeys(
        (*ON_IMAGES, *OTHERS, "training-free"), first
    )
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
