"""What routing costs in a block, and the keep ratio at which it costs as much as it saves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from diffcr_compile.blocks import BlockSpec, Path, get_leaf
from diffcr_compile.macs import moved_rows
from diffcr_compile.recorded import Call
from diffcr_compile.schedule import CostTable

# The keep ratio at which routing costs are shown.
SHOWN_KEEP_RATIO = 0.5


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What routing costs in one block, per sample.

    Attributes:
        router_macs: MACs of the router, and of the shortcut where there is one.
        moved_bytes: read and written by gathers and scatter at ``SHOWN_KEEP_RATIO``.
        break_even: keep ratio below which routing saves more than it costs, bytes moved included;
            None if it never does.
        break_even_macs: the same in MACs alone.
    """

    router_macs: float
    moved_bytes: float
    break_even: float | None
    break_even_macs: float | None


def routing_overhead(
    spec: BlockSpec, costs: CostTable, call: Call | None, balance: float
) -> Overhead:
    pairs = [
        (kept, macs)
        for kept, macs in zip(costs.levels[spec.name], costs.per_level[spec.name], strict=True)
        if kept > 0
    ]
    router = float(spec.num_tokens * spec.width)
    routing = max(router, *costs.routing[spec.name])
    has_shortcut = routing > router
    shown = round(SHOWN_KEEP_RATIO * spec.num_tokens)
    return Overhead(
        router_macs=routing,
        moved_bytes=moved_bytes(spec, call, shown, has_shortcut),
        break_even=break_even(
            pairs,
            routing,
            lambda kept: balance * moved_bytes(spec, call, kept, has_shortcut),
        ),
        break_even_macs=break_even(pairs, routing, lambda _: 0.0),
    )


def moved_bytes(
    spec: BlockSpec, call: Call | None, kept_tokens: int, has_shortcut: bool
) -> float:
    """Bytes that gathers, scatter and shortcut read and write, per sample.

    Those of the stream, and K rows read and written of every token-aligned argument.
    """
    size = _stream(spec, call).element_size() if call else 4
    aligned = (
        sum(_row_bytes(spec, call, axis.path, axis.axis) for axis in spec.aligned)
        if call
        else 0
    )
    rows = moved_rows(spec, kept_tokens, has_shortcut=has_shortcut)
    return float(size * spec.width * rows + 2 * kept_tokens * aligned)


def _stream(spec: BlockSpec, call: Call) -> Tensor:
    stream: Tensor = get_leaf(call.tree, spec.stream.path)
    return stream


def _row_bytes(spec: BlockSpec, call: Call, path: Path, axis: int) -> float:
    """Bytes of one token in a token-aligned argument, of one sample."""
    leaf: Tensor = get_leaf(call.tree, path)
    batch = _stream(spec, call).shape[0]
    samples = leaf.shape[0] if axis > 0 and leaf.shape[0] == batch else 1
    return leaf.numel() * leaf.element_size() / leaf.shape[axis] / samples


def break_even(
    pairs: Sequence[tuple[int, float]], router_macs: float, moving: Callable[[int], float]
) -> float | None:
    """The keep ratio at which a routed block costs as much as a dense one; None if it always does.

    Args:
        pairs: (kept tokens, MACs) ascending, router and shortcut included; the last is the dense block.
        router_macs: MACs of router and shortcut.
        moving: kept tokens -> cost of moving bytes, in MACs.
    """
    num_tokens, dense = pairs[-1]
    # The last point: routed, though all tokens are kept.
    points = [(kept, macs + moving(kept) - dense) for kept, macs in pairs[:-1]]
    points.append((num_tokens, router_macs + moving(num_tokens)))
    for (low, gain), (high, loss) in reversed(list(itertools.pairwise(points))):
        if gain < 0 <= loss:
            return (low + (high - low) * -gain / (loss - gain)) / num_tokens
    return None
