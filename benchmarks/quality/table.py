"""From single runs to a table: means and spreads over seeds, who is ahead, where the knee is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = ("kid_x1000", "frechet", "class_accuracy", "psnr_to_dense_db", "macs")
HEADLINE = "kid_x1000"
Run = Mapping[str, Any]


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per task, variant, budget and steps: mean, smallest and largest of every figure over seeds."""
    keys = ("task", "variant", "budget", "steps")
    rows = []
    for key in dict.fromkeys(tuple(run[k] for k in keys) for run in runs):
        mine = [run for run in runs if tuple(run[k] for k in keys) == key]
        row = dict(zip(keys, key, strict=True))
        row |= {"seeds": len(mine), "steps_taken": mine[0]["steps_taken"]}
        rows.append(row | {name: _spread(mine, name) for name in FIGURES})
    return rows


def ahead_of(rows: Sequence[Run], budget: float, steps: int) -> list[dict[str, Any]]:
    """Ours against every other variant of a budget, and against the dense ones: difference and spreads.

    ``better`` is True where the worst of our seeds is better than the best of theirs, False where it is the
    other way round, and None where the seeds overlap.
    """
    here = [r for r in rows if r["budget"] in (budget, 1.0) and r["steps"] == steps]
    mine = next(r for r in here if r["variant"] == "ours")[HEADLINE]
    result = []
    for row in here:
        other = row[HEADLINE]
        better = True if mine["max"] < other["min"] else None
        if mine["min"] > other["max"]:
            better = False
        result.append(
            {
                "variant": row["variant"],
                "difference": mine["mean"] - other["mean"],
                "ratio": mine["mean"] / other["mean"],
                "better": better,
            }
        )
    return [entry for entry in result if entry["variant"] != "ours"]


def knee(rows: Sequence[Run], budget: float) -> dict[str, Any]:
    """How the dense model's score falls with its steps, and how many of them are as good as ours."""
    dense = {row["steps"]: row[HEADLINE]["mean"] for row in rows if row["variant"] == "dense"}
    ours = {
        row["steps"]: row[HEADLINE]["mean"]
        for row in rows
        if row["variant"] == "ours" and row["budget"] == budget
    }
    as_good = {
        steps: min((s for s, value in dense.items() if value <= mine), default=None)
        for steps, mine in ours.items()
    }
    return {
        "dense_by_steps": dict(sorted(dense.items())),
        "ours_by_steps": ours,
        "dense_steps_as_good_as_ours": as_good,
        "dense_steps_that_the_budget_pays_for": {steps: budget * steps for steps in ours},
    }


def _spread(found: Sequence[Run], name: str) -> dict[str, float] | None:
    values = [run[name] for run in found]
    if any(value is None for value in values):
        return None
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
    }
