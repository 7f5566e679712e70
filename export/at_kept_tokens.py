"""The static graph of a timestep bucket, made of the graph whose K is open instead of by another export."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import ModelProto

from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.export.fold_static import (
    drop_equal_nodes,
    drop_unused,
    fold_static,
    static_shapes,
)
from diffcr_compile.export.full_in_onnx import drop_full_routing, positions_of
from diffcr_compile.export.onnx_model import merge_equal_constants, shorten_names

Origins = dict[str, str]


def at_kept_tokens(
    opened: ModelProto,
    origins: Origins,
    kept: Mapping[str, int],
    num_tokens: Mapping[str, int],
) -> tuple[ModelProto, Origins]:
    """The graph at fixed numbers of kept tokens, and the node map of it.

    Before:  ``k = Shape(kref_blocks_3); index = TopK(logits, k)``, shapes are computed from k
    After:   ``index = TopK(logits, 128)``, shapes are constants; where K = N nothing of the routing

    Args:
        opened: the ONNX graph of an OPEN program. Its weights may lie in a file, they are not read.
        origins: its node map.
        kept: input whose length is a K -> that K.
        num_tokens: the same inputs -> N.

    Raises:
        UnsupportedModelError: a shape still depends on K; export the bucket by itself.
    """
    model = ModelProto()
    model.CopyFrom(opened)
    graph = model.graph
    readers = {
        name: {n.output[0] for n in graph.node if n.op_type == "Shape" and n.input[0] == name}
        for name in kept
    }
    full = {name for name, count in kept.items() if count == num_tokens[name]}
    selects = positions_of(graph, {value for name in full for value in readers[name]})
    _fix_lengths(model, kept)
    fold_static(model)
    drop_full_routing(model, selects)
    fold_static(model)
    _drop_inputs(model, kept)
    _check(model, [kept[name] for name in kept if name not in full])
    merge_equal_constants(model)
    drop_equal_nodes(graph)
    drop_unused(graph)
    old = [node.name for node in graph.node]
    shorten_names(model, [value.name for value in graph.input])
    return model, {
        node.name: origins[name] for node, name in zip(graph.node, old, strict=True)
    }


def _fix_lengths(model: ModelProto, kept: Mapping[str, int]) -> None:
    for value in model.graph.input:
        if value.name in kept:
            axis = value.type.tensor_type.shape.dim[0]
            axis.Clear()
            axis.dim_value = kept[value.name]


def _drop_inputs(model: ModelProto, names: Mapping[str, int]) -> None:
    read = {name for node in model.graph.node for name in node.input}
    left = [value for value in model.graph.input if value.name in names]
    if any(value.name in read for value in left):
        raise UnsupportedModelError("the graph reads an input that only says K")
    for value in left:
        model.graph.input.remove(value)


def _check(model: ModelProto, kept: list[int]) -> None:
    """Every shape is known, none is computed, and the TopK of open blocks are those that were asked for."""
    graph = model.graph
    shapes = static_shapes(model)
    made = {name for node in graph.node for name in node.output if name}
    unknown = sorted(made - set(shapes))
    computed = [node.name for node in graph.node if node.op_type == "Shape"]
    if unknown or computed:
        raise UnsupportedModelError(
            f"shapes still depend on K: {[*computed, *unknown][:5]}, of {len(unknown)}"
        )
    constants = {t.name: t for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "TopK" and node.input[1] in constants:
            found += onnx.numpy_helper.to_array(constants[node.input[1]]).ravel().tolist()
    missing = list(kept)
    for count in found:
        if count in missing:
            missing.remove(count)
    if missing:
        raise UnsupportedModelError(f"no TopK selects {missing} tokens")
