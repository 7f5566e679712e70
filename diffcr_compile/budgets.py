"""What a budget is a share of: MACs, or the latency that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffcr_compile.block_graphs import block_groups, fingerprint_of
from diffcr_compile.config import BudgetConfig, CompileConfig, RoutingConfig
from diffcr_compile.errors import UsageError
from diffcr_compile.latency_table import LatencyTable, latency_costs, read_latency_table
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program
from diffcr_compile.schedule import CostTable


def cost_table(program: Program, config: RoutingConfig) -> CostTable:
    """MACs of every block at every allowed number of kept tokens."""
    return measure_costs(
        program,
        config.multiple_of,
        config.min_keep_ratio,
        config.max_keep_ratio,
        skip_blocks=config.skip_blocks,
        shortcut_rank=config.shortcut_rank,
    )


def budget_costs(program: Program, config: CompileConfig) -> CostTable:
    """What the budget counts: MACs, or milliseconds from the latency table.

    Raises:
        UsageError: the table is of another model, lacks a level, was not stable, or blocks may be skipped that have
            shortcuts.
        ArtifactError: the table was changed.
    """
    counted = cost_table(program, config.routing)
    table = read_table(config.budget)
    if table is None:
        return counted
    if config.routing.skip_blocks and program.module.shortcuts:
        raise UsageError(
            "the latency table does not serve here: a skipped block still takes its shortcut, and tables do not say how "
            "long that takes. Set routing.skip_blocks: false, routing.shortcut_rank: 0, or a budget of MACs",
            code="DCR-U061",
        )
    fingerprint = fingerprint_of(program, block_groups(program, counted.levels))
    return latency_costs(table, counted.levels, fingerprint, config.budget.fit)


def read_table(config: BudgetConfig) -> LatencyTable | None:
    """The latency table that the settings name; None where the budget is in MACs."""
    return read_latency_table(Path(config.table)) if config.table else None


def budget_identity(config: BudgetConfig) -> str:
    """What a result depends on beside the settings: the table's content, not its place."""
    table = read_table(config)
    return table.sha256 if table else config.metric


def table_facts(config: BudgetConfig) -> dict[str, Any] | None:
    """For the report: where measured costs come from, and what was done to them."""
    table = read_table(config)
    if table is None:
        return None
    return {**table.facts(), "fit": config.fit, "non_monotone": table.non_monotone()}
