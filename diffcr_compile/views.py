"""Blocks whose streams are (tokens, batch, channels) or (tokens, channels), shown as (batch, tokens, channels).

Everything else here, from the experiments to the scatter in the ONNX graph, knows one layout only. So a
block of another layout is *shown* as one of that layout: a class made from the block's own turns the
arguments back before its ``forward`` and its result afterwards, and the graph turns them once more around
the call. A layout is a guess from shapes; the experiments (``legality.py``) say whether it holds.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, fx, nn

from diffcr_compile.blocks import (
    BlockSpec,
    Path,
    StreamView,
    get_leaf,
    leaves,
    map_leaves,
)
from diffcr_compile.recorded import Call
from diffcr_compile.residual import first_come, is_float

Layout = Literal["tokens_first", "unbatched"]


def batch_first(tensor: Tensor, layout: Layout) -> Tensor:
    """(N, B, ...) or (N, C) -> (B, N, ...) or (1, N, C), without a copy."""
    return tensor.transpose(0, 1) if layout == "tokens_first" else tensor.unsqueeze(0)


def as_given(tensor: Tensor, layout: Layout) -> Tensor:
    """The way back from :func:`batch_first`."""
    return tensor.transpose(0, 1) if layout == "tokens_first" else tensor.squeeze(0)


def guess_view(call: Call, batch: int) -> StreamView | None:
    """The layout of a block's streams, if they are not batch first; None if they are, or nobody knows.

    Args:
        call: a call of the block.
        batch: samples of the model's noisy input in that call.
    """
    pairs = first_come(call.tree, call.output)
    shapes = [
        tuple(get_leaf(call.output, out).shape)
        for out, source in pairs.items()
        if is_float(get_leaf(call.tree, source))
    ]
    layout: Layout
    if any(len(shape) == 3 and shape[0] == batch for shape in shapes):
        return None
    lengths = {shape[0] for shape in shapes if len(shape) == 3 and shape[1] == batch}
    if lengths:
        layout = "tokens_first"
    elif batch == 1:
        layout = "unbatched"
        lengths = {shape[0] for shape in shapes if len(shape) == 2 and shape[0] > 1}
    if not lengths:
        return None

    def has_layout(leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            return False
        if layout == "unbatched":
            return is_float(leaf) and tuple(leaf.shape) in shapes
        return leaf.ndim >= 2 and leaf.shape[0] in lengths and leaf.shape[1] in (1, batch)

    return StreamView(
        layout,
        tuple(path for path, leaf in leaves(call.tree) if has_layout(leaf)),
        tuple(path for path, leaf in leaves(call.output) if has_layout(leaf)),
    )


def shown_call(call: Call, view: StreamView) -> Call:
    """A call with its streams batch first."""
    return Call(
        _edited(call.tree, view.inputs, batch_first, view),
        _edited(call.output, view.outputs, batch_first, view),
    )


def given_call(call: Call, view: StreamView) -> Call:
    """The way back from :func:`shown_call`."""
    return Call(
        _edited(call.tree, view.inputs, as_given, view),
        _edited(call.output, view.outputs, as_given, view),
    )


def _edited(tree: Any, paths: tuple[Path, ...], edit: Any, view: StreamView) -> Any:
    return map_leaves(
        tree, lambda path, leaf: edit(leaf, view.layout) if path in paths else leaf
    )


class Shown:
    """What a shown block is, besides being of its own class."""

    _view: StreamView


class Turned(Shown):
    """A shown block that still stands in its model: it is called in the model's layout.

    Hooks see it batch first, like a shown block.
    """


def show_block(block: nn.Module, view: StreamView) -> nn.Module:
    """`block` as one with its streams batch first. It shares parameters and submodules with `block`."""
    kind: Any = type(block)

    class ShownBlock(Shown, kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _edited((args, kwargs), view.inputs, as_given, view)
            return _edited(super().forward(*args, **kwargs), view.outputs, batch_first, view)

    return _as(block, ShownBlock, view)


def turn_block(block: nn.Module, view: StreamView) -> nn.Module:
    """The same for a place in the model: it is called, and answers, as `block` does."""
    shown = show_block(block, view)
    kind: Any = type(shown)

    class TurnedBlock(Turned, kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _edited((args, kwargs), view.inputs, batch_first, view)
            return _edited(super().__call__(*args, **kwargs), view.outputs, as_given, view)

    return _as(shown, TurnedBlock, view)


def shown(block: nn.Module) -> nn.Module:
    """A turned block as a shown one; any other as it is."""
    if not isinstance(block, Turned):
        return block
    made = copy.copy(block)
    made.__class__ = type(block).__mro__[2]  # TurnedBlock, Turned, ShownBlock
    return made


def _as(block: nn.Module, kind: Any, view: StreamView) -> nn.Module:
    """A second object around the same parameters and submodules, of another class."""
    made = copy.copy(block)
    kind.__name__, kind.__qualname__ = type(block).__name__, type(block).__qualname__
    made.__class__ = kind
    object.__setattr__(made, "_view", view)
    return made


def with_turned_blocks(model: nn.Module, views: Mapping[str, StreamView]) -> nn.Module:
    """A copy of the containers of `model` in which some blocks are turned; weights are shared."""
    turned = {id(model.get_submodule(name)): view for name, view in views.items()}

    def rebuilt(module: nn.Module) -> nn.Module:
        if id(module) in turned:
            return turn_block(module, turned[id(module)])
        made = copy.copy(module)
        children = {
            name: rebuilt(child) if child is not None else None
            for name, child in module._modules.items()
        }
        object.__setattr__(made, "_modules", children)
        return made

    return rebuilt(model)


def show_in_graph(graph: fx.Graph, root: dict[str, Any], blocks: Iterable[BlockSpec]) -> None:
    """Show blocks that have a view in a captured graph, in place.

    Before:  ``y = block(x (N, B, C))``
    After:   ``y = as_given(shown_block(batch_first(x)))``

    Args:
        graph: calls each block at most once.
        root: what its ``call_module`` nodes refer to.
        blocks: all of them; those without a view stay as they are.
    """
    for spec in blocks:
        view = spec.view
        if view is None:
            continue
        root[spec.name] = show_block(root[spec.name], view)
        for call in graph.find_nodes(op="call_module", target=spec.name):
            _turn_call(graph, call, view)


def _turn_call(graph: fx.Graph, call: fx.Node, view: StreamView) -> None:
    results = [node for path in view.outputs for node in _result_nodes(call, path)]
    for node in results:
        readers = list(node.users)
        with graph.inserting_after(node):
            turned = graph.call_function(as_given, (node, view.layout))
        for reader in readers:
            reader.replace_input_with(node, turned)
    with graph.inserting_before(call):
        call.args, call.kwargs = _edited(
            (tuple(call.args), dict(call.kwargs)),
            view.inputs,
            lambda node, layout: graph.call_function(batch_first, (node, layout)),
            view,
        )


def _result_nodes(call: fx.Node, path: Path) -> list[fx.Node]:
    nodes = [call]
    for key in path:
        nodes = [
            user
            for node in nodes
            for user in node.users
            if user.target is operator.getitem and user.args[1] == key
        ]
    return nodes


def with_views(
    blocks: tuple[BlockSpec, ...], views: Mapping[str, StreamView]
) -> tuple[BlockSpec, ...]:
    """Specs that say how their blocks are shown."""
    return tuple(dataclasses.replace(s, view=views.get(s.name)) for s in blocks)
