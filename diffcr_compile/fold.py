"""Compute what a captured graph computes from constants alone, once.

Position grids, complex rotary tables and masks of fixed size are the same at every call. Folded, they
are plain tensors: no complex arithmetic that ONNX lacks, no ``nonzero`` whose shape depends on values,
and no work at run time. Parameters are never folded, because calibration trains them.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from diffcr_compile.aliases import written_in_place
from diffcr_compile.block_calls import keeps


@torch.no_grad()
def fold_constants(graph: fx.Graph, root: MutableMapping[str, Any]) -> int:
    """Replace every value that depends on no input and no parameter by a constant, in place.

    Args:
        graph: nodes are placeholders, get_attr, call_function, call_module and the output.
        root: what get_attr nodes refer to, by target; folded tensors are added.

    Returns:
        How many constants were made.
    """
    values: dict[fx.Node, Any] = {}
    written = written_in_place(graph)  # every call must begin afresh with them
    for node in graph.nodes:
        if node in written:
            continue
        if node.op == "get_attr":
            tensor = root[str(node.target)]
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                if isinstance(tensor, FakeTensor) or tensor.is_meta:
                    continue
                values[node] = tensor
        elif node.op == "call_function" and _may_fold(node, values):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    made = 0
    for node, value in values.items():
        if node.op == "get_attr" or all(user in values for user in node.users):
            continue
        if isinstance(value, Tensor):
            name = f"folded_{node.name}"
            root[name] = value.contiguous()
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
        elif isinstance(value, (bool, int, float)):
            _use_number(node, value)
        else:
            continue
        made += 1
    graph.eliminate_dead_code(keeps)
    return made


def _use_number(node: fx.Node, value: bool | float) -> None:
    def swap(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), swap)


def _may_fold(node: fx.Node, values: MutableMapping[fx.Node, Any]) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) and node.target.__module__ != (
        "_operator"
    ):
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return all(source in values for source in node.all_input_nodes)
