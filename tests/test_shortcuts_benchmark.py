"""What ``benchmarks/shortcuts`` counts, and what its committed record says."""

from __future__ import annotations

import json

import pytest

from benchmarks.shortcuts import HOW, RANK, RESULTS, summary


def test_ways_are_compared_seed_by_seed() -> None:
    def run(rank: int, seed: int, error: float) -> dict:
        return {"variant": "a", "rank": rank, "seed": seed, "error": error}

    runs = [
        run(0, 0, 4.0),
        run(RANK, 0, 1.0),
        run(0, 1, 2.0),
        run(RANK, 1, 1.0),
        run(0, 2, 6.0),
    ]
    found = summary(runs)["a"]
    assert found["without"] == {"mean": 4.0, "min": 2.0, "max": 6.0}
    assert found["with"] == {"mean": 1.0, "min": 1.0, "max": 1.0}
    assert found["ratio_by_seed"] == [0.25, 0.5]  # the third seed has no partner
    assert summary(runs[:1])["a"]["with"] is None


def test_where_weights_are_not_trained_shortcuts_help_with_every_seed() -> None:
    """Of the committed record; with all weights trained they are not claimed to."""
    budgets = json.loads(RESULTS.read_text(encoding="utf-8"))["budgets"]
    for budget, part in budgets.items():
        assert part["summary"] == summary(part["runs"])
        for how in set(HOW) - {"all weights trained"}:
            ratios = part["summary"][how]["ratio_by_seed"]
            assert ratios, (budget, how)
            assert max(ratios) < 0.8, (budget, how)
        for run in part["runs"]:
            assert run["macs_share"] == pytest.approx(float(budget), rel=0.01)
            assert run["macs_share"] <= float(budget)
