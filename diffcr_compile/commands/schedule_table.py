"""The schedule, block × timestep bucket, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from diffcr_compile.commands.terminal import console


def print_schedule(
    kept: Mapping[str, Sequence[int]],
    num_tokens: Mapping[str, int],
    ranges: Sequence[Sequence[float]],
) -> None:
    """Kept tokens of each block in each timestep bucket."""
    table = Table("block", *(f"{low:g} to {high:g}" for low, high in ranges), "of")
    for block, tokens in kept.items():
        table.add_row(block, *map(str, tokens), str(num_tokens[block]))
    console.print(table)
