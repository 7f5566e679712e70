"""Views of views that end where they began."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_VIEWS = frozenset(
    {
        aten.alias.default,
        aten.contiguous.default,
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.unflatten.int,
        aten.view.default,
    }
)


def drop_undone_views(graph: fx.Graph) -> int:
    """Take views away that undo those before them; return how many nodes changed.

    Before:  ``y = view(x (B * N, C), (B, N, C)); z = flatten(y, 0, 1)``
    After:   ``z = alias(x)``

    A scatter ends in such a view, and router and gather of the next block begin with the other. The node keeps
    its name, because an exported program refers to its outputs by name.
    """
    edits = 0
    for node in graph.nodes:
        if node.target not in _VIEWS or node.target is aten.alias.default:
            continue
        source = _same_before(node)
        if source is not None:
            node.target, node.args, node.kwargs = aten.alias.default, (source,), {}
            edits += 1
    return edits


def _same_before(node: fx.Node) -> fx.Node | None:
    """The nearest value that `node` views in its own shape and order in memory."""
    layout = _layout(node)
    source = node.args[0]
    while layout is not None and isinstance(source, fx.Node):
        if _layout(source) == layout:
            return source
        if source.target not in _VIEWS and not _is_idle_cast(source):
            break
        source = source.args[0]
    return None


def _is_idle_cast(node: fx.Node) -> bool:
    """Whether a cast is one to the type that its input has."""
    if node.target is not aten.to.dtype:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return bool(node.meta["val"].dtype == source.meta["val"].dtype)


def _layout(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides: a copy that only puts a tensor in order is no view. None if a size is open."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(type(size) is int for size in value.shape):
        return None
    return tuple(value.shape), tuple(value.stride())
