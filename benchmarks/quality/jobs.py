"""The order of the runs, the most telling first, and what one of them leaves on disk."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.quality.case import Case
from benchmarks.quality.job import Job
from benchmarks.quality.sampling import measured
from benchmarks.quality.settings import Scale
from benchmarks.quality.variants import build

SHEET = 40  # images that are kept for the sample sheets
# At a budget, in the order of the table.
AT_A_BUDGET = (
    "ours",
    "uniform (Mixture-of-Depths)",
    "blocks dropped",
    "paper's recipe",
    "random router",
    "ratios from measured errors",
    "tokens merged (2-D ToMe)",
    "steps reuse blocks",
    "dense, fewer steps",
    "ours, a fifth of the steps",
    "training-free",
    "ours, two bins",
)
# With many steps, where leaving steps out is cheap.
MANY = ("ours", "dense, fewer steps", "steps reuse blocks", "blocks dropped")


def jobs(scale: Scale) -> list[Job]:
    """All of them, the most telling first: an interrupted comparison then has a table worth reading."""
    first, second, *rest = (*scale.budgets, None)
    one, *others = scale.seeds
    order = [Job("dense", 1.0, one, scale.few), Job("dense, fine-tuned", 1.0, one, scale.few)]
    order += at_a_budget(first, one, scale.few)
    if second:
        order += at_a_budget(second, one, scale.few)
    for seed in others:
        order.append(Job("dense", 1.0, seed, scale.few))
        order.append(Job("dense, fine-tuned", 1.0, seed, scale.few))
        order += at_a_budget(first, seed, scale.few)
    if second:
        for seed in others:
            order += at_a_budget(second, seed, scale.few)
    order += inpainting(scale)
    order.append(Job("dense", 1.0, one, scale.many))
    order += [Job(name, first, one, scale.many) for name in MANY]
    order += [Job("dense", 1.0, one, steps) for steps in scale.dense_steps]
    remaining = [
        (budget, seed) for budget in (second, *rest) if budget for seed in scale.seeds
    ]
    for budget, seed in remaining:
        order += at_a_budget(budget, seed, scale.few)
    order += at_a_budget(first, one, scale.fewest)
    return list(dict.fromkeys(order))


def at_a_budget(budget: float, seed: int, steps: int, task: str = "generation") -> list[Job]:
    return [Job(name, budget, seed, steps, task) for name in AT_A_BUDGET]


def inpainting(scale: Scale) -> list[Job]:
    """The second task, with one seed."""
    seed, task = scale.seeds[0], "inpainting"
    order = [Job(name, 1.0, seed, scale.few, task) for name in ("dense", "dense, fine-tuned")]
    for budget in scale.budgets[:2]:
        order += at_a_budget(budget, seed, scale.few, task)
    return order


def run(case: Case) -> dict[str, Any]:
    """Build and measure; what was measured is in ``<name>.json``, some images beside it."""
    job, work = case.job, case.work
    path = work / f"{job.name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    started = time.process_time()
    built = build(case)
    built_in = time.process_time() - started
    reference = work / f"{job.dense.name}.safetensors"
    dense_images = load_file(reference)["images"] if reference.exists() else None
    scores, images = measured(built, case, dense_images)
    # all of the dense model's, which the others are compared with
    kept = images if job.variant == "dense" else images[:SHEET]
    save_file({"images": kept.contiguous().clone()}, work / f"{job.name}.safetensors")
    result = {
        **dataclasses.asdict(job),
        **scores,
        "facts": built.facts,
        "cpu_seconds": {
            "build": round(built_in, 1),
            "all": round(time.process_time() - started, 1),
        },
    }
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
    return result
