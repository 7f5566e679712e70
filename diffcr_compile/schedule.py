"""Keep ratios (learned, real), token schedules (frozen, integer), and what they cost."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from diffcr_compile.errors import BudgetError, UsageError

Floats = npt.NDArray[np.float64]
Metric = Literal["macs", "latency"]  # what a budget is a share of
UNITS: dict[Metric, str] = {"macs": "MACs", "latency": "latency"}


@dataclasses.dataclass(frozen=True, slots=True)
class TimestepBuckets:
    """Contiguous ranges (edges[i], edges[i + 1]] of the model's timestep input.

    The first bucket takes everything up to its upper edge and the last one everything above its
    lower edge, so every timestep has a bucket. Buckets are chosen by timestep value, never by
    step index.

    Attributes:
        edges: n + 1 increasing values, in the unit of the model's timestep input.
        weights: share of the sampling steps that falls into each bucket, sums to 1.
    """

    edges: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or list(self.edges) != sorted(set(self.edges)):
            raise UsageError(
                f"timestep bucket edges must increase, got {self.edges}", code="DCR-U032"
            )
        if len(self.weights) != len(self.edges) - 1 or abs(sum(self.weights) - 1) > 1e-6:
            raise UsageError(
                f"{len(self.edges) - 1} timestep buckets need as many weights that sum to 1, "
                f"got {self.weights}",
                code="DCR-U032",
            )

    @classmethod
    def even(cls, count: int, low: float = 0.0, high: float = 1000.0) -> TimestepBuckets:
        """`count` buckets of equal width and weight between `low` and `high`."""
        if count < 1:
            raise UsageError(f"the number of timestep buckets must be at least 1, got {count}")
        edges = [low + (high - low) * i / count for i in range(count + 1)]
        return cls(tuple(edges), (1.0 / count,) * count)

    def __len__(self) -> int:
        return len(self.weights)

    def weighted_by(self, timesteps: Sequence[float]) -> TimestepBuckets:
        """The same ranges, each weighted by its share of these sampling steps.

        Timesteps reach a model, and the choice of its graph, in fp32; inner edges are rounded alike, so that a step on an
        edge lies below it there and here.

        Raises:
            UsageError: a range that no step falls into: nothing could be learned for it, and it would cost nothing.
        """
        low, *inner, high = self.edges
        rounded = dataclasses.replace(self, edges=(low, *map(_in_fp32, inner), high))
        counts = [0] * len(self)
        for timestep in timesteps:
            counts[rounded.index_of(_in_fp32(timestep))] += 1
        empty = [span for span, count in zip(self.ranges(), counts, strict=True) if count == 0]
        if empty:
            raise UsageError(
                f"no sampling step has a timestep in {empty}; the {len(timesteps)} steps of the sampler run from "
                f"{min(timesteps):g} to {max(timesteps):g}. Set fewer routing.buckets, sample with more steps, or set "
                "routing.timestep_low and timestep_high to the sampler's range.",
                code="DCR-U073",
            )
        weights = tuple(count / len(timesteps) for count in counts)
        return dataclasses.replace(rounded, weights=weights)

    def index_of(self, timestep: float) -> int:
        """The bucket of a timestep value.

        Raises:
            UsageError: the timestep is not a finite number.
        """
        if not np.isfinite(timestep):
            raise UsageError(f"timestep must be a finite number, got {timestep}")
        return min(max(bisect.bisect_left(self.edges, timestep) - 1, 0), len(self) - 1)

    def ranges(self) -> list[list[float]]:
        """[low, high] of each bucket."""
        return [[a, b] for a, b in itertools.pairwise(self.edges)]


@dataclasses.dataclass(frozen=True, slots=True)
class KeepRatios:
    """Learned keep ratios, tokens processed / tokens present.

    Attributes:
        blocks: block names.
        values: (blocks, buckets), each in [0, 1].
    """

    blocks: tuple[str, ...]
    values: Floats

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) != len(self.blocks):
            raise UsageError(
                f"keep ratios must be (blocks, buckets) = ({len(self.blocks)}, ...), "
                f"got {self.values.shape}",
                code="DCR-U032",
            )
        if not np.all((self.values >= 0) & (self.values <= 1)):
            raise UsageError(
                f"keep ratios must lie in [0, 1], got {self.values.min()} to {self.values.max()}",
                code="DCR-U032",
            )


@dataclasses.dataclass(frozen=True, slots=True)
class CostTable:
    """What each block costs at each allowed number of kept tokens.

    Attributes:
        levels: block -> allowed kept tokens, ascending; the last is the block's num_tokens.
        per_level: block -> cost at each level, routing included: MACs per sample, or milliseconds.
        routing: block -> the part of `per_level` that the router takes, at each level; MACs only.
        moved_bytes: block -> bytes read and written by gathers and scatter, per sample; MACs only.
        outer: cost of everything outside the routable blocks.
        metric: what is counted.
    """

    levels: Mapping[str, tuple[int, ...]]
    per_level: Mapping[str, tuple[float, ...]]
    routing: Mapping[str, tuple[float, ...]]
    moved_bytes: Mapping[str, tuple[float, ...]]
    outer: float
    metric: Metric = "macs"

    @property
    def unit(self) -> str:
        """What the costs are, in words."""
        return UNITS[self.metric]

    @property
    def dense(self) -> float:
        """Cost of the dense model."""
        return self.outer + sum(cost[-1] for cost in self.per_level.values())

    def at(self, block: str, kept_tokens: int) -> float:
        """Cost of a block at one of its levels."""
        return self.per_level[block][self.levels[block].index(kept_tokens)]

    def interpolate(self, block: str, keep_ratio: float) -> tuple[float, float]:
        """Cost at a real keep ratio, linear between levels, and its slope per keep ratio."""
        levels, costs = self.levels[block], self.per_level[block]
        tokens = keep_ratio * levels[-1]
        upper = min(max(bisect.bisect_left(levels, tokens), 1), len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        slope = (costs[upper] - costs[upper - 1]) / (high - low)
        return costs[upper - 1] + slope * (tokens - low), slope * levels[-1]

    def smallest_budget(self) -> float:
        """The smallest reachable share of the dense model's cost."""
        return (self.outer + sum(min(cost) for cost in self.per_level.values())) / self.dense


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSchedule:
    """How many tokens each block processes in each timestep bucket.

    Attributes:
        kept_tokens: block name -> kept tokens per bucket; the rest bypass the block.
        num_tokens: block name -> image tokens present, before any routing.
        buckets: the timestep buckets.
        asked: the budget that was asked for, share of the dense model's cost; None if none was.
        reached: the share that this schedule costs; None if not measured.
        metric: what `asked` and `reached` are shares of.
    """

    kept_tokens: Mapping[str, tuple[int, ...]]
    num_tokens: Mapping[str, int]
    buckets: TimestepBuckets
    asked: float | None = None
    reached: float | None = None
    metric: Metric = "macs"

    def __post_init__(self) -> None:
        for block, column in self.kept_tokens.items():
            if len(column) != len(self.buckets):
                raise UsageError(
                    f"kept_tokens[{block!r}] needs one entry per timestep bucket "
                    f"({len(self.buckets)}), got {len(column)}",
                    code="DCR-U032",
                )
            for kept in column:
                if not 0 <= kept <= self.num_tokens[block]:
                    raise UsageError(
                        f"kept_tokens[{block!r}] must lie in [0, {self.num_tokens[block]}], got {kept}",
                        code="DCR-U032",
                    )

    def column(self, bucket: int) -> dict[str, int]:
        """Kept tokens per block in one bucket."""
        return {block: kept[bucket] for block, kept in self.kept_tokens.items()}

    def ratios(self) -> KeepRatios:
        """The same schedule as keep ratios."""
        rows = [[k / self.num_tokens[b] for k in kept] for b, kept in self.kept_tokens.items()]
        return KeepRatios(tuple(self.kept_tokens), np.array(rows, dtype=np.float64))

    def merged(self) -> TokenSchedule:
        """The same schedule with adjacent buckets of equal columns joined into one."""
        keep = [
            i
            for i in range(len(self.buckets))
            if i == 0 or self.column(i) != self.column(i - 1)
        ]
        starts = [*keep, len(self.buckets)]
        spans = list(itertools.pairwise(starts))
        edges = (*(self.buckets.edges[a] for a in keep), self.buckets.edges[-1])
        weights = tuple(sum(self.buckets.weights[a:b]) for a, b in spans)
        return dataclasses.replace(
            self,
            kept_tokens={b: tuple(k[i] for i in keep) for b, k in self.kept_tokens.items()},
            buckets=TimestepBuckets(edges, weights),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "kept_tokens": {block: list(kept) for block, kept in self.kept_tokens.items()},
            "num_tokens": dict(self.num_tokens),
            "edges": list(self.buckets.edges),
            "weights": list(self.buckets.weights),
            "asked": self.asked,
            "reached": self.reached,
            "metric": self.metric,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenSchedule:
        """The reverse of :meth:`to_json`.

        Raises:
            UsageError: something is missing, or has another type or range.
        """
        try:
            return cls(
                {str(b): tuple(map(_whole, kept)) for b, kept in data["kept_tokens"].items()},
                {str(block): _whole(count) for block, count in data["num_tokens"].items()},
                TimestepBuckets(
                    tuple(map(_number, data["edges"])), tuple(map(_number, data["weights"]))
                ),
                None if data["asked"] is None else _number(data["asked"]),
                None if data["reached"] is None else _number(data["reached"]),
                _metric(data.get("metric", "macs")),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(
                f"this is no schedule: {type(error).__name__}: {str(error)[:200]}. Expected kept_tokens, "
                "num_tokens, edges, weights, asked and reached, as TokenSchedule.to_json gives them.",
                code="DCR-U032",
            ) from error


def _in_fp32(value: float) -> float:
    return float(np.float32(value))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{str(value)[:40]} is no number of tokens")
    return value


def _number(value: Any) -> float:
    # whole numbers stay such, so that what is read is written again to the byte
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ValueError(f"{str(value)[:40]} is no finite number")
    return cast(float, value)


def _metric(value: Any) -> Metric:
    if value not in get_args(Metric):
        raise ValueError(f"{str(value)[:40]} is none of {get_args(Metric)}")
    return cast(Metric, value)


def cost_of(costs: CostTable, schedule: TokenSchedule) -> float:
    """Cost of a schedule, averaged over the sampling steps."""
    return costs.outer + sum(
        weight * costs.at(block, kept)
        for block, column in schedule.kept_tokens.items()
        for weight, kept in zip(schedule.buckets.weights, column, strict=True)
    )


def check_budget(costs: CostTable, budget: float) -> None:
    """Raise unless `budget` is a share of the dense model that some schedule reaches.

    Raises:
        UsageError: not in (0, 1].
        BudgetError: below the smallest reachable budget, which the error names.
    """
    if not 0 < budget <= 1:
        raise UsageError(
            f"budget must be in (0, 1] of the dense {costs.unit} (0.6 or '60%'), got {budget}"
        )
    smallest = costs.smallest_budget()
    if budget < smallest:
        raise BudgetError(
            f"budget {budget:.1%} of the dense {costs.unit} cannot be reached: with every routable block "
            f"at its smallest keep ratio the model still costs {smallest:.2%}. The smallest "
            f"reachable budget is {np.ceil(smallest * 1000) / 10:.1f}%; ask for that or more, or "
            "lower min_keep_ratio.",
            smallest,
        )
