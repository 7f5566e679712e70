"""Buckets, schedules and the solver, against brute force and slow loops."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from diffcr_compile.errors import BudgetError, UsageError
from diffcr_compile.schedule import (
    CostTable,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
    cost_of,
)
from diffcr_compile.solver import (
    COST_STEPS_PER_CELL,
    UNUSED_SHARE,
    solve_least,
    solve_schedule,
)

ROUNDING = 1 / COST_STEPS_PER_CELL  # the solver's costs are rounded up by at most this share
# Where nothing costs as much as that, the budget is not used up: the window's edge is rounded too, down by a step.
NOT_USED_UP = UNUSED_SHARE + 2 * ROUNDING
quick = settings(max_examples=60, deadline=None)


def make_costs(
    blocks: dict[str, tuple[tuple[int, ...], tuple[float, ...]]], outer: float
) -> CostTable:
    levels = {name: level for name, (level, _) in blocks.items()}
    macs = {name: cost for name, (_, cost) in blocks.items()}
    zeros = {name: (0.0,) * len(level) for name, level in levels.items()}
    return CostTable(levels, macs, zeros, zeros, outer)


COSTS = make_costs(
    {
        "a": ((4, 8, 12, 16), (40.0, 85.0, 135.0, 190.0)),
        "b": ((4, 8, 16), (20.0, 45.0, 110.0)),
    },
    30.0,
)


@st.composite
def buckets_of(draw: st.DrawFn, most: int = 6) -> TimestepBuckets:
    edges = draw(
        st.lists(
            st.floats(-1e4, 1e4, allow_subnormal=False),
            min_size=2,
            max_size=most + 1,
            unique=True,
        )
    )
    shares = draw(
        st.lists(st.floats(0.05, 1), min_size=len(edges) - 1, max_size=len(edges) - 1)
    )
    return TimestepBuckets(tuple(sorted(edges)), tuple(s / sum(shares) for s in shares))


@st.composite
def problems(draw: st.DrawFn) -> tuple[CostTable, TimestepBuckets, KeepRatios, float]:
    """At most 4 cells of at most 4 levels, so that all 256 schedules can be listed."""
    count, columns = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1)]))
    blocks = {}
    for number in range(count):
        num_tokens = draw(st.sampled_from([16, 48, 64]))
        levels = draw(st.sets(st.sampled_from([0, 1, 2, 5, 8, 11]), min_size=1, max_size=3))
        levels = (*sorted(levels), num_tokens)
        per_token, squared = draw(st.floats(0.5, 50)), draw(st.floats(0, 1))
        blocks[f"b{number}"] = (levels, tuple(per_token * k + squared * k * k for k in levels))
    costs = make_costs(blocks, draw(st.floats(0, 500)))
    shares = draw(st.lists(st.floats(0.1, 1), min_size=columns, max_size=columns))
    weights = tuple(s / sum(shares) for s in shares)
    buckets = TimestepBuckets(tuple(float(i) for i in range(columns + 1)), weights)
    values = draw(
        st.lists(st.floats(0, 1), min_size=count * columns, max_size=count * columns)
    )
    ratios = KeepRatios(tuple(blocks), np.array(values).reshape(count, columns))
    smallest = costs.smallest_budget()
    budget = smallest + draw(st.floats(0, 1)) * (1 - smallest)
    return costs, buckets, ratios, min(max(budget, smallest, 1e-6), 1.0)


def every_schedule(
    costs: CostTable, buckets: TimestepBuckets, ratios: KeepRatios
) -> list[tuple[float, float]]:
    """(cost of the routed cells, penalty) of all schedules, by slow loops."""
    cells = []
    for row, block in enumerate(ratios.blocks):
        for column in range(len(buckets)):
            dense = costs.per_level[block][-1] * buckets.weights[column]
            cells.append(
                [
                    (
                        macs * buckets.weights[column],
                        dense
                        * (level / costs.levels[block][-1] - ratios.values[row, column]) ** 2,
                    )
                    for level, macs in zip(
                        costs.levels[block], costs.per_level[block], strict=True
                    )
                ]
            )
    return [
        (sum(c for c, _ in picked), sum(p for _, p in picked))
        for picked in itertools.product(*cells)
    ]


def penalty_of(schedule: TokenSchedule, costs: CostTable, ratios: KeepRatios) -> float:
    return sum(
        costs.per_level[block][-1]
        * schedule.buckets.weights[column]
        * (
            schedule.kept_tokens[block][column] / costs.levels[block][-1]
            - ratios.values[row, column]
        )
        ** 2
        for row, block in enumerate(ratios.blocks)
        for column in range(len(schedule.buckets))
    )


@quick
@given(problems())
def test_the_solver_against_brute_force(
    problem: tuple[CostTable, TimestepBuckets, KeepRatios, float],
) -> None:
    costs, buckets, ratios, budget = problem
    schedule = solve_schedule(ratios, costs, buckets, budget)
    spent = cost_of(costs, schedule)
    assert spent <= budget * costs.dense * (1 + 1e-9)
    assert schedule.asked == budget
    assert schedule.reached == pytest.approx(spent / costs.dense)
    available = budget * costs.dense - costs.outer
    listed = every_schedule(costs, buckets, ratios)
    assert any(math.isclose(spent - costs.outer, cost, abs_tol=1e-6) for cost, _ in listed)
    # Costs may be rounded up by ROUNDING in all: whatever fits even then was open to the solver.
    fits = [(c, p) for c, p in listed if c <= available * (1 - ROUNDING)]
    well_used = [p for c, p in fits if c >= available * (1 - UNUSED_SHARE)]
    slack = 1e-6 * costs.dense
    if well_used:
        assert penalty_of(schedule, costs, ratios) <= min(well_used) + slack
    elif fits:  # nothing comes that near, then next to nothing of what could be used is wasted
        most = max(c for c, _ in fits)
        assert spent - costs.outer >= most - available * (ROUNDING + UNUSED_SHARE) - slack


@st.composite
def measured(
    draw: st.DrawFn,
) -> tuple[CostTable, TimestepBuckets, dict[str, np.ndarray], float]:
    """Costs that need not fall with the tokens, as measured ones, and penalties that do."""
    count, columns = draw(st.sampled_from([(2, 1), (2, 2), (3, 1), (4, 1)]))
    numbers = st.lists(st.floats(1, 10), min_size=3, max_size=3)
    blocks = {f"b{n}": ((4, 8, 16), tuple(draw(numbers))) for n in range(count)}
    costs = make_costs(blocks, draw(st.floats(0, 5)))
    errors = st.lists(st.floats(0, 1), min_size=2, max_size=2)
    penalties = {
        name: np.array([[*sorted(draw(errors), reverse=True), 0.0] for _ in range(columns)])
        for name in blocks
    }
    smallest = costs.smallest_budget()
    budget = smallest + draw(st.floats(0, 1)) * (1 - smallest)
    return costs, TimestepBuckets.even(columns), penalties, min(max(budget, smallest), 1.0)


def every_choice(
    costs: CostTable, buckets: TimestepBuckets, penalties: dict[str, np.ndarray]
) -> Iterator[tuple[tuple[int, ...], float, float]]:
    """(levels of all cells, cost of the routed cells, penalty), by slow loops."""
    cells = [(name, column) for name in penalties for column in range(len(buckets))]
    for levels in itertools.product(range(3), repeat=len(cells)):
        picked = list(zip(cells, levels, strict=True))
        share = buckets.weights[0]
        cost = sum(costs.per_level[name][level] * share for (name, _), level in picked)
        penalty = sum(penalties[name][c][level] * share for (name, c), level in picked)
        yield levels, cost, penalty


def levels_of(schedule: TokenSchedule) -> tuple[int, ...]:
    return tuple((4, 8, 16).index(k) for kept in schedule.kept_tokens.values() for k in kept)


@quick
@given(measured())
def test_over_measured_errors_nothing_that_fits_is_better_where_nothing_uses_the_budget_up(
    problem: tuple[CostTable, TimestepBuckets, dict[str, np.ndarray], float],
) -> None:
    costs, buckets, penalties, budget = problem
    schedule = solve_least(penalties, costs, buckets, budget)
    assert cost_of(costs, schedule) <= budget * costs.dense * (1 + 1e-9)
    available = budget * costs.dense - costs.outer
    found = {levels: (cost, penalty) for levels, cost, penalty in every_choice(costs, buckets, penalties)}  # fmt: skip
    fits = [(c, p) for c, p in found.values() if c <= available * (1 - ROUNDING)]
    assume(budget < 1 and fits)
    assume(not any(c >= available * (1 - NOT_USED_UP) for c, _ in found.values() if c <= available))  # fmt: skip
    assert found[levels_of(schedule)][1] <= min(p for _, p in fits) + 1e-9


@quick
@example(
    (
        make_costs({"b0": ((4, 8, 16), (1.0, 1.0, 2.0)), "b1": ((4, 8, 16), (1.0, 1.0, 1.0 + 2**-52))}, 0.0),
        TimestepBuckets.even(1),
        {"b0": np.zeros((1, 3)), "b1": np.zeros((1, 3))},
        0.8333333333333333,
    ),
    [0.0] * 4,
)  # fmt: skip
@given(measured(), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_near_learned_ratios_no_schedule_costs_as_much_as_one_with_more_tokens(
    problem: tuple[CostTable, TimestepBuckets, dict[str, np.ndarray], float],
    values: list[float],
) -> None:
    costs, buckets, penalties, budget = problem
    cells = len(penalties) * len(buckets)
    ratios = KeepRatios(tuple(penalties), np.array(values[:cells]).reshape(len(penalties), -1))
    schedule = solve_schedule(ratios, costs, buckets, budget)
    available = budget * costs.dense - costs.outer
    found = {levels: cost for levels, cost, _ in every_choice(costs, buckets, penalties)}
    assume(not any(available * (1 - NOT_USED_UP) <= c <= available for c in found.values()))  # fmt: skip
    assume(any(c <= available * (1 - ROUNDING) for c in found.values()) and budget < 1)
    mine = levels_of(schedule)
    for levels, cost in found.items():
        if levels != mine and all(a >= b for a, b in zip(levels, mine, strict=True)):
            assert cost > found[mine]


def test_a_schedule_that_costs_more_and_errs_more_is_not_chosen() -> None:
    """Nothing lies just below the budget; the dearest that fits is the worst, and there is a better one for less."""
    costs = make_costs({"a": ((4, 8, 16), (9.0, 5.0, 12.0)), "b": ((8, 16), (1.0, 1.1))}, 0.0)
    errors = {"a": np.array([[0.9, 0.2, 0.0]]), "b": np.array([[0.3, 0.0]])}
    best = solve_least(errors, costs, TimestepBuckets.even(1), 11.5 / 13.1)
    assert best.kept_tokens == {"a": (8,), "b": (16,)}
    ratios = KeepRatios(("a", "b"), np.array([[0.3], [0.9]]))
    near = solve_schedule(ratios, costs, TimestepBuckets.even(1), 11.5 / 13.1)
    assert near.kept_tokens == {"a": (8,), "b": (16,)}


@pytest.mark.parametrize("high", [1.0, 1000.0])
def test_buckets_are_weighted_by_the_sampling_steps_in_them(high: float) -> None:
    even = TimestepBuckets.even(5, 0.0, high)
    steps = [high * (1 - i / 20) for i in range(20)]  # four of them on an edge
    weighted = even.weighted_by(steps)
    assert weighted.weights == even.weights
    assert weighted.edges == pytest.approx(even.edges, rel=1e-7)
    # what the runtime looks up: values in fp32, edges as they stand in the manifest
    found = [weighted.index_of(float(np.float32(t))) for t in steps]
    assert [found.count(i) for i in range(5)] == [4] * 5
    shifted = [high * 3 * t / (1 + 2 * t) for t in (1 - i / 20 for i in range(20))]
    assert TimestepBuckets.even(4, 0.0, high).weighted_by(shifted).weights == (0.1, 0.15, 0.25, 0.5)  # fmt: skip
    with pytest.raises(UsageError, match="no sampling step has a timestep in") as caught:
        even.weighted_by([high])
    assert caught.value.code == "DCR-U073"


@quick
@given(problems())
def test_the_smallest_budget_named_is_reachable(
    problem: tuple[CostTable, TimestepBuckets, KeepRatios, float],
) -> None:
    costs, buckets, ratios, _ = problem
    smallest = costs.smallest_budget()
    if smallest > 1e-6:
        with pytest.raises(BudgetError) as caught:
            solve_schedule(ratios, costs, buckets, smallest * 0.99)
        smallest = caught.value.smallest
        schedule = solve_schedule(ratios, costs, buckets, smallest)
        assert schedule.reached == pytest.approx(smallest)


def test_the_whole_budget_keeps_everything() -> None:
    buckets = TimestepBuckets.even(3)
    ratios = KeepRatios(("a", "b"), np.ones((2, 3)))
    schedule = solve_schedule(ratios, COSTS, buckets, 1.0)
    assert schedule.kept_tokens == {"a": (16, 16, 16), "b": (16, 16, 16)}
    assert schedule.reached == 1.0


def test_higher_ratios_get_more_tokens() -> None:
    buckets = TimestepBuckets.even(2)
    ratios = KeepRatios(("a", "b"), np.array([[0.25, 1.0], [0.25, 1.0]]))
    schedule = solve_schedule(ratios, COSTS, buckets, 210 / 330 * (1 + 2 * ROUNDING))
    assert schedule.kept_tokens["a"][0] < schedule.kept_tokens["a"][1]
    assert schedule.kept_tokens["b"][0] < schedule.kept_tokens["b"][1]


def test_the_budget_error_names_the_smallest_budget() -> None:
    # (30 + 40 + 20) / (30 + 190 + 110) = 27.27 %
    with pytest.raises(BudgetError) as caught:
        check_budget(COSTS, 0.05)
    assert caught.value.smallest == pytest.approx(90 / 330)
    assert caught.value.exit_code == 2
    assert "budget 5.0% of the dense MACs cannot be reached" in str(caught.value)
    assert "27.27%" in str(caught.value)
    assert "smallest reachable budget is 27.3%" in str(caught.value)
    check_budget(COSTS, 0.273)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, 60.0, math.nan])
def test_a_budget_outside_0_to_1_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match=r"budget must be in \(0, 1\]") as caught:
        check_budget(COSTS, budget)
    assert not isinstance(caught.value, BudgetError)


def test_cost_tables_add_up() -> None:
    assert COSTS.dense == 330.0
    assert COSTS.at("a", 8) == 85.0
    schedule = TokenSchedule(
        {"a": (4, 16), "b": (8, 8)}, {"a": 16, "b": 16},
        TimestepBuckets((0.0, 1.0, 2.0), (0.25, 0.75)),
    )  # fmt: skip
    assert cost_of(COSTS, schedule) == 30 + 0.25 * 40 + 0.75 * 190 + 45


@quick
@given(st.floats(0.25, 1))
def test_interpolated_cost_is_linear_between_levels(ratio: float) -> None:
    value, slope = COSTS.interpolate("a", ratio)
    levels = np.array(COSTS.levels["a"]) / 16
    assert value == pytest.approx(float(np.interp(ratio, levels, COSTS.per_level["a"])))
    nearby = COSTS.interpolate("a", ratio - 1e-7)[0]
    assert (value - nearby) / 1e-7 == pytest.approx(slope, rel=1e-4)


# ------------------------------------------------------------------------------------ buckets


def slow_index(buckets: TimestepBuckets, timestep: float) -> int:
    for index in range(len(buckets)):
        if buckets.edges[index] < timestep <= buckets.edges[index + 1]:
            return index
    return 0 if timestep <= buckets.edges[0] else len(buckets) - 1


@quick
@given(buckets_of(), st.lists(st.floats(-2e4, 2e4), max_size=20))
@example(TimestepBuckets.even(4), [0.0, 250.0, 250.1, 1000.0, 1001.0, -5.0])
def test_every_timestep_has_the_bucket_that_a_slow_loop_finds(
    buckets: TimestepBuckets, timesteps: list[float]
) -> None:
    nearby = [math.nextafter(e, way) for e in buckets.edges for way in (-math.inf, math.inf)]
    for timestep in (*timesteps, *buckets.edges, *nearby):
        assert buckets.index_of(timestep) == slow_index(buckets, timestep)


def test_even_buckets() -> None:
    buckets = TimestepBuckets.even(4)
    assert len(buckets) == 4
    assert buckets.ranges() == [[0, 250], [250, 500], [500, 750], [750, 1000]]
    found = [buckets.index_of(t) for t in (-1, 0, 250, 250.001, 500, 999, 1000, 1e9)]
    assert found == [0, 0, 0, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("timestep", [math.nan, math.inf, -math.inf])
def test_a_timestep_that_is_no_number_is_refused(timestep: float) -> None:
    with pytest.raises(UsageError, match="finite"):
        TimestepBuckets.even(4).index_of(timestep)


@pytest.mark.parametrize(
    ("edges", "weights", "message"),
    [
        ((0.0,), (), "edges must increase"),
        ((0.0, 0.0, 1.0), (0.5, 0.5), "edges must increase"),
        ((1.0, 0.0), (1.0,), "edges must increase"),
        ((0.0, 1.0, 2.0), (1.0,), "2 timestep buckets need as many weights"),
        ((0.0, 1.0, 2.0), (0.6, 0.6), "sum to 1"),
    ],
)
def test_broken_buckets_are_refused(
    edges: tuple[float, ...], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TimestepBuckets(edges, weights)


def test_no_bucket_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1, got 0"):
        TimestepBuckets.even(0)


# ---------------------------------------------------------------------------------- schedules


@st.composite
def schedules(draw: st.DrawFn) -> TokenSchedule:
    buckets = draw(buckets_of())
    blocks = [f"b{i}" for i in range(draw(st.integers(1, 3)))]
    kept = {
        block: tuple(
            draw(
                st.lists(
                    st.sampled_from([0, 8, 16]), min_size=len(buckets), max_size=len(buckets)
                )
            )
        )
        for block in blocks
    }
    asked = draw(st.none() | st.floats(0.1, 1))
    return TokenSchedule(kept, dict.fromkeys(blocks, 16), buckets, asked, asked)


@quick
@given(schedules(), st.lists(st.floats(-2e4, 2e4), max_size=20))
def test_merging_changes_no_lookup(schedule: TokenSchedule, timesteps: list[float]) -> None:
    merged = schedule.merged()
    nearby = [math.nextafter(e, math.inf) for e in schedule.buckets.edges]
    for timestep in (*timesteps, *schedule.buckets.edges, *nearby):
        before = schedule.column(schedule.buckets.index_of(timestep))
        assert merged.column(merged.buckets.index_of(timestep)) == before
    columns = [merged.column(i) for i in range(len(merged.buckets))]
    assert all(a != b for a, b in itertools.pairwise(columns))
    assert (merged.asked, merged.reached) == (schedule.asked, schedule.reached)
    for block in schedule.kept_tokens:
        mean = np.average(schedule.kept_tokens[block], weights=schedule.buckets.weights)
        other = np.average(merged.kept_tokens[block], weights=merged.buckets.weights)
        assert mean == pytest.approx(other)
    assert merged.merged() == merged


@quick
@given(schedules())
def test_json_round_trip(schedule: TokenSchedule) -> None:
    again = TokenSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert again == schedule


def test_ratios_of_a_schedule() -> None:
    schedule = TokenSchedule({"a": (0, 8)}, {"a": 16}, TimestepBuckets.even(2))
    ratios = schedule.ratios()
    assert ratios.blocks == ("a",)
    assert ratios.values.tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((4,), r"kept_tokens\['a'\] needs one entry per timestep bucket \(2\), got 1"),
        ((4, 17), r"kept_tokens\['a'\] must lie in \[0, 16\], got 17"),
        ((-1, 4), r"kept_tokens\['a'\] must lie in \[0, 16\], got -1"),
    ],
)
def test_broken_schedules_are_refused(kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenSchedule({"a": kept}, {"a": 16}, TimestepBuckets.even(2))


def test_broken_keep_ratios_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(blocks, buckets\) = \(2, \.\.\.\), got \(1, 3\)"):
        KeepRatios(("a", "b"), np.ones((1, 3)))
    for value in (1.5, -0.1, math.nan):
        with pytest.raises(UsageError, match=r"must lie in \[0, 1\]"):
            KeepRatios(("a",), np.array([[0.5, value]]))
