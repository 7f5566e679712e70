"""Rows that are picked by a constant mask, or repeated a constant number of times, are picked by their numbers.

How many rows ``x[mask]`` has is not known from the forms of its inputs, also where the mask is a constant.
Which rows they are is known then::

    Before:  rows = index(x (B, L, C), [mask (B, L), a constant])   a size that depends on values
    After:   rows = index(x, [sample (M,), row (M,)])               static
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_MASKS = (torch.bool, torch.uint8)


@torch.no_grad()
def make_picks_static(graph: fx.Graph, root: MutableMapping[str, Any]) -> int:
    """Replace masks and repeats that are constants by numbers of rows, in place.

    Args:
        graph: after ``fold_constants``.
        root: what get_attr nodes refer to, by target; index tensors are added.

    Returns:
        How many nodes changed.
    """
    edits = 0
    for node in list(graph.nodes):
        if node.target in _INDEXED:
            edits += _index_by_numbers(graph, root, node)
        elif node.target is aten.repeat_interleave.self_Tensor:
            edits += _repeat_by_numbers(graph, root, node)
    return edits


def _index_by_numbers(graph: fx.Graph, root: MutableMapping[str, Any], node: fx.Node) -> bool:
    indices: list[Any] = []
    given: Any = node.args[1]
    for index in given:
        mask = _constant(root, index)
        if mask is None or mask.dtype not in _MASKS:
            indices.append(index)
            continue
        numbers = mask.nonzero(as_tuple=True)  # as torch itself does it
        indices += [_new_constant(graph, root, node, rows) for rows in numbers]
    changed = len(indices) != len(given) or any(
        one is not two for one, two in zip(indices, given, strict=True)
    )
    node.args = (node.args[0], indices, *node.args[2:])
    return changed


def _repeat_by_numbers(graph: fx.Graph, root: MutableMapping[str, Any], node: fx.Node) -> bool:
    repeats = _constant(root, node.args[1])
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if repeats is None or repeats.numel() < 2 or axis is None:
        return False
    rows = torch.arange(len(repeats), device=repeats.device).repeat_interleave(repeats)
    index = _new_constant(graph, root, node, rows)
    node.target = aten.index_select.default
    node.args, node.kwargs = (node.args[0], axis, index), {}
    return True


def _constant(root: MutableMapping[str, Any], node: Any) -> Tensor | None:
    """The value of a constant; None for what is computed or trained."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = root[str(node.target)]
    is_constant = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return value if is_constant and not value.is_meta else None


def _new_constant(
    graph: fx.Graph, root: MutableMapping[str, Any], before: fx.Node, value: Tensor
) -> fx.Node:
    name = f"rows_of_{before.name}"
    while name in root:
        name += "_"
    root[name] = value
    with graph.inserting_before(before):
        return graph.get_attr(name)
