"""One graph for several timestep buckets: K of a block is the length of an input there.

TensorRT builds one engine from it, with one optimization profile per bucket and the weights once. The
buckets' own graphs stay as they are; both lie over the same weights file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from diffcr_compile.errors import UsageError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.open_kept_tokens import OpenKeptTokens
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.planning.targets import Target, all_targets, largest_topk
from diffcr_compile.program import Program
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class BucketGroup:
    """Timestep buckets that one graph can serve.

    Attributes:
        buckets: their numbers.
        kept: block -> K in each of these buckets, of the blocks where they differ.
        remark: why the group has no more buckets; "" if it has all.
    """

    buckets: tuple[int, ...]
    kept: dict[str, tuple[int, ...]]
    remark: str = ""


def group_buckets(schedule: TokenSchedule, max_topk: int | None) -> tuple[BucketGroup, ...]:
    """The fewest groups of buckets that differ in nothing but an open K.

    A block that is skipped (K = 0) is not in the graph at all, and a K beyond `max_topk` is said in
    another number of TopK for each K: buckets that differ so cannot share a graph. K = N can be open: the
    block is then routed with all of its tokens, in another order.
    """
    groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for bucket in range(len(schedule.buckets)):
        fixed = [
            (block, kept)
            for block, kept in schedule.column(bucket).items()
            if kept == 0 or (max_topk is not None and kept > max_topk)
        ]
        groups.setdefault(tuple(fixed), []).append(bucket)
    every = {pair for key in groups for pair in key}
    remark = _remark({pair for pair in every if not all(pair in key for key in groups)})
    found = []
    for buckets in groups.values():
        columns = {b: [k[i] for i in buckets] for b, k in schedule.kept_tokens.items()}
        kept = {b: tuple(column) for b, column in columns.items() if len(set(column)) > 1}
        found.append(BucketGroup(tuple(buckets), kept, remark))
    return tuple(found)


def _remark(differing: set[tuple[str, int]]) -> str:
    if not differing:
        return ""
    skipped = sorted(block for block, kept in differing if kept == 0)
    large = sorted(block for block, kept in differing if kept)
    reasons = [
        f"{', '.join(blocks[:_SHOWN])}{' and others' if len(blocks) > _SHOWN else ''} {how}"
        for blocks, how in (
            (skipped, "skipped in some buckets"),
            (large, "with more kept tokens than one TopK takes in some"),
        )
        if blocks
    ]
    return "other buckets need other graphs: " + "; ".join(reasons)


def tensorrt_topk(targets: Sequence[Target]) -> int | None:
    """Largest K of a TopK in every TensorRT that is known, and on the given targets."""
    known = [t for t in all_targets() if t.engine.startswith("tensorrt")]
    return largest_topk((*known, *targets))


def open_program(frozen: Program, group: BucketGroup, max_topk: int | None) -> Program:
    """The OPEN program of a group of buckets, over the weights of the FROZEN ones.

    Args:
        frozen: the program of any bucket.
        group: with at least one block whose K differs.
        max_topk: of the TopK of blocks whose K does not.
    """
    routed, schedule = frozen.routed, frozen.schedule
    if routed is None or schedule is None:
        raise UsageError(
            "a graph for several buckets is made from the ROUTED program, which this FROZEN one "
            "does not know; freeze it with dcr.freeze, or export with profiles=False"
        )
    column = schedule.column(group.buckets[0])
    # Less than all of the tokens, or the block would lose its routing.
    column |= {block: min(kept) for block, kept in group.kept.items()}
    surrogate = TokenSchedule(
        {block: (kept,) for block, kept in column.items()},
        schedule.num_tokens,
        TimestepBuckets.even(1),
    )
    return run_passes(
        dataclasses.replace(routed, example=frozen.example),
        [
            FreezeKeptTokens(surrogate, 0, max_topk),
            RemoveFullBlocks(),
            OpenKeptTokens({block: max(kept) for block, kept in group.kept.items()}),
        ],
    )
