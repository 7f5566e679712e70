"""From single runs to a table: means and spreads over seeds, who is ahead, where the knee is."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.quality.settings import DISTILLED, OTHER_SETTINGS, UNTRAINED

FIGURES = ("kid_x1000", "frechet", "class_accuracy", "psnr_to_dense_db", "macs")
HEADLINE = "kid_x1000"
# The two ways to keep ratios that the calibration has, each without and with distilled steps.
BY_GRADIENTS = ("ours", "ours" + DISTILLED)
BY_ERRORS = ("ratios from measured errors", "ratios from measured errors" + DISTILLED)
OUR_VARIANTS = (*BY_GRADIENTS, *BY_ERRORS, *OTHER_SETTINGS)
Run = Mapping[str, Any]


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per task, variant, budget, steps and training: mean, smallest and largest of every figure over seeds."""
    keys = ("task", "variant", "budget", "steps", "training")
    rows = []
    for key in dict.fromkeys(tuple(run[k] for k in keys) for run in runs):
        mine = [run for run in runs if tuple(run[k] for k in keys) == key]
        row = dict(zip(keys, key, strict=True))
        row |= {"seeds": len(mine), "steps_taken": mine[0]["steps_taken"]}
        rows.append(row | {name: _spread(mine, name) for name in FIGURES})
    return rows


def compared(
    rows: Sequence[Run], task: str, budget: float, steps: int, training: float
) -> list[Run]:
    """What stands in one table: a budget and the dense models, trained for equally long or not at all."""
    return [
        row
        for row in rows
        if (row["task"], row["steps"]) == (task, steps)
        and row["budget"] in (budget, 1.0)
        and (row["training"] == training or row["variant"] in UNTRAINED)
    ]


def standing_for(
    variants: Sequence[str],
    runs: Sequence[Run],
    budget: float,
    steps: int,
    training: float = 1.0,
) -> str:
    """Which of the variants of one way stands for it in generation: steps distilled where that was run; "" for none."""
    here = compared(runs, "generation", budget, steps, training)
    found = {run["variant"] for run in here if run["budget"] == budget}
    return max(found.intersection(variants), key=variants.index, default="")


def ahead_of(
    runs: Sequence[Run], budget: float, steps: int, ours: str = "ours", training: float = 1.0
) -> list[dict[str, Any]]:
    """Ours in generation against every other variant of a budget, and against the dense ones.

    Args:
        runs: of any task, budget and steps.
        budget: which budget.
        steps: which sampling steps.
        ours: the variant that is called so.
        training: share of the samples that training sees.

    Returns:
        For each: the difference and ratio of the means, and two answers to "is ours better?". ``better`` is True where
        the worst of our seeds is better than the best of theirs, False where it is the other way round, None where the
        seeds overlap. ``by_seed`` is the difference seed by seed, both with the same noise, so that what a draw of
        noise does to both is out of it; ``better_in_every_seed`` is True where all of these favour ours, False where
        all favour the other, None else or with one seed.
    """
    here = compared(runs, "generation", budget, steps, training)
    by_variant: dict[str, dict[int, float]] = {}
    for run in here:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run[HEADLINE]
    mine = by_variant.pop(ours)
    result = []
    for variant, other in by_variant.items():
        pairs = [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]
        means = statistics.fmean(mine.values()), statistics.fmean(other.values())
        result.append(
            {
                "variant": variant,
                "difference": means[0] - means[1],
                "ratio": means[0] / means[1],
                "better": _all_below(mine.values(), other.values()),
                "by_seed": pairs,
                "better_in_every_seed": _all_below(pairs, [0.0]) if len(pairs) > 1 else None,
            }
        )
    return result


def _all_below(ours: Collection[float], theirs: Collection[float]) -> bool | None:
    if max(ours) < min(theirs):
        return True
    return False if min(ours) > max(theirs) else None


def knee(rows: Sequence[Run], budget: float) -> dict[str, Any]:
    """How the dense model's score falls with its steps, and how many of them are as good as ours at a budget.

    Returns:
        ``dense_by_steps``, and for every row of ours its score, the dense steps that its MACs pay for, the largest number
        of dense steps that is worse than it, and the smallest that is as good; None where none was measured.
    """
    dense = {row["steps"]: row[HEADLINE]["mean"] for row in rows if row["variant"] == "dense"}
    ours = []
    for row in rows:
        if row["variant"] in OUR_VARIANTS and row["budget"] == budget:
            mine = row[HEADLINE]["mean"]
            ours.append(
                {
                    "variant": row["variant"],
                    "steps": row["steps"],
                    "score": mine,
                    "dense_steps_paid_for": budget * row["steps"],
                    "dense_steps_worse": max(
                        (s for s in dense if dense[s] > mine), default=None
                    ),
                    "dense_steps_as_good": min(
                        (s for s in dense if dense[s] <= mine), default=None
                    ),
                }
            )
    return {"dense_by_steps": dict(sorted(dense.items())), "ours": ours}


def _spread(found: Sequence[Run], name: str) -> dict[str, float] | None:
    values = [run[name] for run in found]
    if any(value is None for value in values):
        return None
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
    }
