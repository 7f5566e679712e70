"""bfloat16 inside a float32 model -> float32, rounded where the model rounds: ONNX lacks most bfloat16 ops."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

aten = torch.ops.aten
# These may read and write bfloat16 as they are: ONNX's Cast can.
_CASTS = (aten._to_copy.default,)


def has_bfloat16(exported: ExportedProgram) -> bool:
    """Whether a bfloat16 tensor occurs in the program."""
    return any(_gives_bfloat16(node) for node in exported.graph.nodes)


def compute_in_float32(exported: ExportedProgram) -> ExportedProgram:
    """The same program with no op on bfloat16 but casts; the same object if it has none.

    Before:  ``y = mul(a, b)``                      of bfloat16
    After:   ``y = to_bfloat16(mul(to_float32(a), to_float32(b)))``

    PyTorch's elementwise ops on bfloat16 do just that. Sums and products of matrices differ from its
    own by the order of summation, before one rounding to bfloat16 (2**-8).

    Args:
        exported: static shapes; it is left alone. Parameters, buffers and inputs are not bfloat16.
    """
    if not has_bfloat16(exported):
        return exported
    # Without in-place writes, and casts in one spelling.
    program: ExportedProgram = exported.run_decompositions({})
    graph = program.graph
    wide: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CASTS:
            _drop_if_idle(node)
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it says of the types what is no longer so
            continue
        reads = [n for n in node.all_input_nodes if _gives_bfloat16(n)]
        if not reads and not _gives_bfloat16(node):
            continue
        if node.target is operator.getitem:
            node.meta["val"] = _float32(node.meta["val"])
            _round_after(graph, node)
            continue
        for source in reads:
            if isinstance(source.meta["val"], Tensor):
                node.replace_input_with(source, _widened(graph, source, wide))
        node.kwargs = {
            name: torch.float32 if value is torch.bfloat16 else value
            for name, value in node.kwargs.items()
        }
        if _gives_bfloat16(node):
            node.meta["val"] = _float32(node.meta["val"])
            if isinstance(node.meta["val"], Tensor):
                _round_after(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _drop_if_idle(cast: fx.Node) -> None:
    """A copy from bfloat16 to bfloat16 would become an op on bfloat16 that is no cast."""
    source = cast.all_input_nodes[0]
    if _gives_bfloat16(source) and _gives_bfloat16(cast):
        cast.replace_all_uses_with(source)


def _gives_bfloat16(node: fx.Node) -> bool:
    value = node.meta.get("val")
    every = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, Tensor) and v.dtype == torch.bfloat16 for v in every)


def _float32(value: Any) -> Any:
    """Fake tensors of the same shapes in float32."""
    if isinstance(value, (tuple, list)):
        return type(value)(_float32(item) for item in value)
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        return value.to(torch.float32)
    return value


def _widened(graph: fx.Graph, source: fx.Node, wide: dict[fx.Node, fx.Node]) -> fx.Node:
    """`source` in float32, made once."""
    if source not in wide:
        wide[source] = _cast_after(graph, source, torch.float32)
    return wide[source]


def _round_after(graph: fx.Graph, node: fx.Node) -> None:
    """Let the readers of `node`, which is float32 now, see it rounded to bfloat16."""
    readers = list(node.users)
    rounded = _cast_after(graph, node, torch.bfloat16)
    for reader in readers:
        reader.replace_input_with(node, rounded)


def _cast_after(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    with graph.inserting_after(node):
        cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = {name: value for name, value in node.meta.items() if name != "tensor_meta"}
    cast.meta["val"] = node.meta["val"].to(dtype)
    return cast
