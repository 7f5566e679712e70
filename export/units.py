"""The outer graph cut into units, one per block: the block's call with the routing around it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch import fx

from diffcr_compile.program import Program

Unit = tuple[fx.Node, ...]


def cut_into_units(program: Program) -> list[Unit]:
    """Consecutive nodes around each call of a block, in graph order; what is before and after belongs to none.

    Two units meet where the fewest values cross: behind a scatter and before the next router, whatever the
    blocks are. Equal units then begin and end alike.
    """
    nodes = list(program.graph.nodes)
    names = {spec.name for spec in program.blocks}
    calls = [
        place
        for place, node in enumerate(nodes)
        if node.op == "call_module" and node.target in names
    ]
    if len(calls) < 2:
        return []
    inner = [_narrowest(nodes, one, two) for one, two in itertools.pairwise(calls)]
    # There is no neighbour at the ends: as much before the first call and behind the last as elsewhere.
    first = calls[0] - (calls[1] - inner[0])
    last = calls[-1] + (inner[-1] - calls[-2])
    cuts = [max(first, 0), *inner, min(last, len(nodes) - 1)]
    return [tuple(nodes[start:end]) for start, end in itertools.pairwise(cuts)]


def _narrowest(nodes: Sequence[fx.Node], call: int, following: int) -> int:
    """Where the fewest values cross on the way from one call to the following; the earliest such place."""
    places = {node: place for place, node in enumerate(nodes)}
    last_reader = [max((places[user] for user in node.users), default=-1) for node in nodes]

    def crossing(cut: int) -> int:
        return sum(reader >= cut for reader in last_reader[:cut])

    # The values of a tuple belong to the call that made it: a tuple cannot be handed on in ONNX.
    cuts = [
        n for n in range(call + 1, following + 1) if nodes[n].target is not operator.getitem
    ]
    return min(cuts, key=crossing)
