"""Ops that ONNX lacks, worked out at export where they depend on weights and constants only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

_FIXED = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def work_out_constants(exported: ExportedProgram) -> int:
    """Replace decompositions of constant matrices by their values, in place; return how many values.

    Before:  ``q, r = linalg_qr(weight + 1e-8)``
    After:   ``q`` is a constant

    Other constant parts stay, so that weights keep their names and their place in the weights file.
    """
    graph = exported.graph
    values = _fixed_tensors(exported)
    lacking: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        if all(source in values for source in node.all_input_nodes):
            values[node] = None  # constant; worked out if it turns out to be needed
            if _is_linalg(node) or any(source in lacking for source in node.all_input_nodes):
                lacking[node] = None
    found = [n for n in lacking if any(user not in lacking for user in n.users)]
    for node in found:
        _become_constant(exported, node, _value(node, values))
    for node in reversed(lacking):  # also assertions, which nothing uses
        graph.erase_node(node)
    return len(found)


def _is_linalg(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.name.startswith("aten::linalg_")
    )


def _fixed_tensors(exported: ExportedProgram) -> dict[fx.Node, Any]:
    """The parameters, buffers and constants by placeholder."""
    tensors = {**exported.state_dict, **exported.constants}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    return {
        n: tensors[specs[n.name].target]
        for n in placeholders
        if specs[n.name].kind in _FIXED and isinstance(tensors[specs[n.name].target], Tensor)
    }


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if values[node] is None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(n, values))
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _become_constant(exported: ExportedProgram, node: fx.Node, value: Tensor) -> None:
    graph, specs = exported.graph, exported.graph_signature.input_specs
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        constant = graph.placeholder(f"c_{node.name}")
    constant.meta["val"] = node.meta["val"]
    name = f"worked_out.{node.name}"
    exported.constants[name] = value.detach().clone()
    specs.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(constant.name), name))
    node.replace_all_uses_with(constant)
    exported.graph_signature.replace_all_uses(node.name, constant.name)
