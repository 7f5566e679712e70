"""The solver: from keep ratios, or from what each choice costs in accuracy, to the schedule of a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from diffcr_compile.schedule import (
    CostTable,
    Floats,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
    cost_of,
)

# Share of the budget that the solver may leave unused. A cell of a small model is a few tenths of
# a percent of the whole, so this is about one cell.
UNUSED_SHARE = 0.004
# Costs are rounded up to this share of the budget per cell, so a solution is never over budget.
COST_STEPS_PER_CELL = 256
# Costs that differ by less than this share are equal.
EQUAL = 1e-9


def solve_schedule(
    ratios: KeepRatios, costs: CostTable, buckets: TimestepBuckets, budget: float
) -> TokenSchedule:
    """The schedule nearest to `ratios` that costs at most `budget` and wastes next to nothing.

    Nearest means least sum of squared differences of keep ratios, each weighted by what its cell costs
    when dense.

    Args:
        ratios: (blocks, buckets), what was learned.
        costs: what each block costs at each level.
        buckets: the timestep buckets, one per column of `ratios`.
        budget: share of the dense model's cost in (0, 1].

    Raises:
        BudgetError: no schedule is as cheap as that.
    """
    penalties = {}
    for row, block in enumerate(ratios.blocks):
        levels = np.array(costs.levels[block], dtype=np.float64)
        away = levels[None] / levels[-1] - ratios.values[row][:, None]  # (buckets, levels)
        penalties[block] = costs.per_level[block][-1] * away**2
    return solve_least(penalties, costs, buckets, budget, spend=True)


def solve_least(
    penalties: Mapping[str, Floats],
    costs: CostTable,
    buckets: TimestepBuckets,
    budget: float,
    *,
    spend: bool = False,
) -> TokenSchedule:
    """The schedule of least penalty that costs at most `budget` and, if there is one, wastes next to nothing.

    Exact multiple-choice knapsack by dynamic programming over the cost.

    Args:
        penalties: block -> (buckets, levels), what each choice is worth avoiding. A bucket counts by its
            share of the sampling steps.
        costs: what each block costs at each level.
        buckets: the timestep buckets.
        budget: share of the dense model's cost in (0, 1].
        spend: where no schedule wastes next to nothing, still waste as little as possible: for penalties that count too
            many tokens as well as too few. None of these is then chosen that costs as much as one with more tokens.

    Raises:
        BudgetError: no schedule is as cheap as that.
    """
    check_budget(costs, budget)
    available = budget * costs.dense - costs.outer
    cells = [(block, column) for block in penalties for column in range(len(buckets))]
    choices = [
        (
            np.array(costs.per_level[block], dtype=np.float64) * buckets.weights[column],
            penalties[block][column] * buckets.weights[column],
        )
        for block, column in cells
    ]
    picked = _least_penalty(choices, available, COST_STEPS_PER_CELL * len(cells), spend)
    kept: dict[str, list[int]] = {block: [0] * len(buckets) for block in penalties}
    for (block, column), level in zip(cells, picked, strict=True):
        kept[block][column] = costs.levels[block][level]
    schedule = TokenSchedule(
        {block: tuple(column) for block, column in kept.items()},
        {block: costs.levels[block][-1] for block in penalties},
        buckets,
        asked=budget,
        metric=costs.metric,
    )
    return dataclasses.replace(schedule, reached=cost_of(costs, schedule) / costs.dense)


def _least_penalty(
    choices: Sequence[tuple[Floats, Floats]], available: float, steps: int, spend: bool
) -> list[int]:
    """Pick one level per cell: least penalty with cost in ((1 - UNUSED_SHARE) * available, available].

    Where no choice lies in there: the least penalty of all that fit; or, to `spend`, that of the dearest that fit.
    """
    cheapest = sum(float(macs.min()) for macs, _ in choices)
    dense = sum(float(macs[-1]) for macs, _ in choices)
    # At both ends there is nothing to choose, and rounding the costs up would spoil the answer.
    if dense <= available * (1 + 1e-12):
        return [len(macs) - 1 for macs, _ in choices]
    if available - cheapest <= 1e-9 * dense:
        return [int(np.argmin(macs)) for macs, _ in choices]
    unit, window = available / steps, int(steps * (1 - UNUSED_SHARE))
    best, taken = _penalties(choices, unit, steps)
    reachable = np.flatnonzero(np.isfinite(best))
    if (
        len(reachable) == 0
    ):  # rounding up each cell left nothing: every cell at its cheapest fits
        return [int(np.argmin(macs)) for macs, _ in choices]
    open_to = reachable[reachable >= window]
    if len(open_to) == 0 and spend:
        best, taken = _penalties([_undercut(*choice) for choice in choices], unit, steps)
        reachable = np.flatnonzero(np.isfinite(best))
        open_to = reachable[reachable >= reachable[-1] - UNUSED_SHARE * steps]
    elif len(open_to) == 0:
        open_to = reachable
    return _walk_back(choices, taken, int(open_to[np.argmin(best[open_to])]), unit)


def _undercut(macs: Floats, penalty: Floats) -> tuple[Floats, Floats]:
    """The same choice without levels that cost as much as one with more tokens, as measured ones may: dear is no use."""
    least_above = np.append(np.minimum.accumulate(macs[::-1])[::-1][1:], np.inf)
    return macs, np.where(macs < least_above * (1 - EQUAL), penalty, np.inf)


def _penalties(
    choices: Sequence[tuple[Floats, Floats]], unit: float, steps: int
) -> tuple[Floats, list[npt.NDArray[np.int16]]]:
    """The least penalty at each cost in units, and which level of each cell it took."""
    best = np.full(
        steps + 1, np.inf
    )  # best[c]: least penalty of the cells so far at cost exactly c
    best[0] = 0.0
    taken = []
    for macs, penalty in choices:
        after = np.full(steps + 1, np.inf)
        choice = np.zeros(steps + 1, dtype=np.int16)
        for level, (cost, loss) in enumerate(
            zip(np.ceil(macs / unit - 1e-9), penalty, strict=True)
        ):
            shift = int(cost)
            if shift > steps:
                continue
            candidate = np.full(steps + 1, np.inf)
            candidate[shift:] = best[: steps + 1 - shift] + loss
            better = candidate < after
            after[better], choice[better] = candidate[better], level
        best = after
        taken.append(choice)
    return best, taken


def _walk_back(
    choices: Sequence[tuple[Floats, Floats]],
    taken: Sequence[npt.NDArray[np.int16]],
    at: int,
    unit: float,
) -> list[int]:
    """The levels that led to the cost `at`, in units."""
    picked = []
    for (macs, _), choice in zip(reversed(choices), reversed(taken), strict=True):
        level = int(choice[at])
        picked.append(level)
        at -= int(np.ceil(macs[level] / unit - 1e-9))
    return picked[::-1]
