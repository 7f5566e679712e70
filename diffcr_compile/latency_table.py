"""Read a latency table, and make of it the costs that budgets are solved over."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.runtime.latency import SCHEMA_VERSION, checksum
from diffcr_compile.schedule import CostTable, Floats

MAX_BYTES = 1 << 24
# Share by which the whole model may differ from what its blocks predict. Caches and fusion make a tenth;
# more comes of a machine that was busy, whose short runs escape what long ones suffer.
LARGEST_GAP = 0.25
Fit = Literal["measured", "isotonic"]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1000)]
_AGAIN = "Measure it again with diffcr bench MODEL --table."


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Part):
    """Blocks of equal structure."""

    blocks: Annotated[tuple[Name, ...], Field(min_length=1)]
    levels: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
    milliseconds: tuple[Positive, ...]
    errors: tuple[Milliseconds, ...]
    rounds: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits(self) -> Group:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError("levels must increase")
        if not len(self.levels) == len(self.milliseconds) == len(self.errors):
            raise ValueError("levels, milliseconds and errors must be equally many")
        return self


class Measured(_Part):
    """The model that was measured."""

    name: Name
    fingerprint: Name
    batch: Annotated[int, Field(ge=1)]


class Backend(_Part):
    """What ran it."""

    name: Name
    device: Name
    threads: Annotated[int, Field(ge=1)]


class Check(_Part):
    """The whole model at other kept tokens: whether the blocks add up."""

    kept_tokens: Mapping[Name, int]
    predicted_milliseconds: Annotated[float, Field(allow_inf_nan=False)]
    measured_milliseconds: Positive


class LatencyTable(_Part):
    """What ``diffcr bench --table`` writes, see ``runtime/latency.py``."""

    schema_version: Literal[1]
    created: Name
    machine: Mapping[Name, Any]
    versions: Mapping[Name, Name]
    backend: Backend
    model: Measured
    dense_milliseconds: Positive
    groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    check: Check
    stability: Positive
    worst_error: Milliseconds
    stable: bool
    sha256: Name

    @model_validator(mode="after")
    def _each_block_once(self) -> LatencyTable:
        names = [block for group in self.groups for block in group.blocks]
        if len(names) != len(set(names)):
            raise ValueError("a block stands in two groups")
        return self

    def group_of(self) -> dict[str, Group]:
        """Block -> its group."""
        return {block: group for group in self.groups for block in group.blocks}

    def non_monotone(self) -> list[str]:
        """Blocks that were slower with fewer tokens somewhere."""
        return [
            block
            for group in self.groups
            for block in group.blocks
            if any(more < less for less, more in itertools.pairwise(group.milliseconds))
        ]

    @property
    def outer(self) -> float:
        """Milliseconds outside the routed blocks: what their dense times leave of the whole model's."""
        inside = sum(g.milliseconds[-1] for g in self.groups for _ in g.blocks)
        return self.dense_milliseconds - inside

    @property
    def gap(self) -> float:
        """How far the whole model at other kept tokens was from what its blocks predict, as a share."""
        predicted = self.check.predicted_milliseconds
        return self.check.measured_milliseconds / predicted - 1 if predicted > 0 else math.inf

    def facts(self) -> dict[str, Any]:
        """For the report: where the figures come from."""
        return {
            "created": self.created,
            "machine": dict(self.machine),
            "backend": self.backend.model_dump(),
            "dense_milliseconds": self.dense_milliseconds,
            "worst_error": self.worst_error,
            "check": self.gap,
        }


def read_latency_table(path: Path) -> LatencyTable:
    """A table that ``diffcr bench --table`` wrote.

    Raises:
        UsageError: there is no such file.
        ArtifactError: it is no such table, or was changed after it was written.
    """
    if not path.is_file():
        raise UsageError(
            f"the latency table {path} does not exist. Measure one with diffcr bench MODEL --table.",
            code="DCR-U060",
        )
    if path.stat().st_size > MAX_BYTES:
        raise _damaged(path, f"it has more than {MAX_BYTES} bytes")
    try:
        table = LatencyTable.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise _damaged(path, f"{where}: {first['msg']}") from None
    found = checksum(_as_written(path))
    if found != table.sha256:
        raise _damaged(path, "it was changed after it was written: its checksum does not fit")
    return table


def _as_written(path: Path) -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(path.read_bytes())
    return data


def _damaged(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is no latency table (schema version {SCHEMA_VERSION}): {problem[:400]}. {_AGAIN}",
        code="DCR-A020",
    )


def latency_costs(
    table: LatencyTable,
    levels: Mapping[str, Sequence[int]],
    fingerprint: str,
    fit: Fit = "measured",
) -> CostTable:
    """The costs of a model in milliseconds per call.

    Args:
        table: measured.
        levels: block -> the allowed kept tokens; the table may have more.
        fingerprint: of the model, see ``block_graphs.fingerprint_of``.
        fit: ``measured`` takes the figures as they are, also where fewer tokens take longer;
            ``isotonic`` replaces those of each block by the nearest that do not.

    Raises:
        UsageError: the table is of another model, lacks a level, or was not stable.
    """
    _check_table(table, levels, fingerprint)
    groups, per_level = table.group_of(), {}
    for block, wanted in levels.items():
        known = dict(zip(groups[block].levels, groups[block].milliseconds, strict=True))
        # A block at 0 kept tokens is not in the graph.
        found = np.array([known[kept] if kept else 0.0 for kept in wanted])
        per_level[block] = tuple(map(float, isotonic(found) if fit == "isotonic" else found))
    return CostTable(
        levels={block: tuple(wanted) for block, wanted in levels.items()},
        per_level=per_level,
        routing={},
        moved_bytes={},
        # Anchored at the whole model, also where a fit has moved a block's last level.
        outer=table.dense_milliseconds - sum(row[-1] for row in per_level.values()),
        metric="latency",
    )


def _check_table(
    table: LatencyTable, levels: Mapping[str, Sequence[int]], fingerprint: str
) -> None:
    groups = table.group_of()
    problem = None
    if set(groups) != set(levels):
        missing, unknown = sorted(set(levels) - set(groups)), sorted(set(groups) - set(levels))
        problem = f"its blocks are others: it lacks {missing[:5]} and has {unknown[:5]}"
    elif table.model.fingerprint != fingerprint:
        problem = (
            f"it was measured on {table.model.name} at batch {table.model.batch}, and layers, "
            "sizes, batch or routing are not those of this model"
        )
    else:
        for block, wanted in levels.items():
            lacking = sorted(set(wanted) - set(groups[block].levels) - {0})
            if lacking or groups[block].levels[-1] != wanted[-1]:
                problem = f"{block} was not measured at {lacking[:10]} kept tokens"
                break
    if problem is None and table.outer < 0:
        problem = (
            f"its blocks alone take {-table.outer:.3g} ms longer than the whole model of "
            f"{table.dense_milliseconds:.3g} ms, so it cannot say what a schedule takes"
        )
    if problem is None and not table.stable:
        problem = (
            f"it is not stable: a figure is uncertain by {table.worst_error:.1%} of its dense block, "
            f"{table.stability:.1%} was asked for"
        )
    if problem is None and abs(table.gap) > LARGEST_GAP:
        problem = (
            "its blocks do not add up: at other kept tokens the whole model took "
            f"{1 + table.gap:.0%} of what they predict"
        )
    if problem:
        raise UsageError(
            f"the latency table does not serve here: {problem}. {_AGAIN}", code="DCR-U061"
        )


def isotonic(values: Floats) -> Floats:
    """The nearest values in the least-squares sense that never fall (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, count), (other, more) = pools[-2:]
            pools[-2:] = [((mean * count + other * more) / (count + more), count + more)]
    return np.concatenate([np.full(count, mean) for mean, count in pools])
