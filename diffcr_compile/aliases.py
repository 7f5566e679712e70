"""Which nodes of a graph share memory, and which of them write to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg


def is_write(node: fx.Node) -> bool:
    """Whether a node writes in place."""
    if (
        node.target is torch.ops.aten.detach_.default
    ):  # about autograd only; torch.tensor() has one
        return False
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def shared_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs whose memory the output of a node may share."""
    if not isinstance(node.target, torch._ops.OpOverload):  # a block, or a part of a tuple
        return node.all_input_nodes
    return [source for source, alias in _marked(node) if alias is not None]


def written_memory(node: fx.Node) -> set[fx.Node]:
    """The tensors that a node writes to, and those that these are views of."""
    if not is_write(node):
        return set()
    found: set[fx.Node] = set()
    pending = [
        source for source, alias in _marked(node) if alias is not None and alias.is_write
    ]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += shared_inputs(current)
    return found


def written_families(graph: fx.Graph) -> list[set[fx.Node]]:
    """Sets of nodes that may share memory with each other, those with a writing node among them."""
    family: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        mine = {node}
        shared = [] if node.op == "output" else shared_inputs(node)
        for other in [family[source] for source in shared]:
            if other is not mine:
                mine |= other
                for member in other:
                    family[member] = mine
        family[node] = mine
    found = {id(members): members for members in family.values()}
    return [members for members in found.values() if any(map(is_write, members))]


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that share memory which some node of the graph writes to, and the writing nodes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        memory = written_memory(node)
        if memory:
            found |= memory | {node}
    for node in graph.nodes:  # other views of that memory
        if any(source in found for source in shared_inputs(node)):
            found.add(node)
    return found


def _marked(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    """(input node, what the op's schema says about its memory)."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    by_name = {argument.name: argument for argument in arguments}
    given = [*zip(arguments, node.args, strict=False)]
    given += [(by_name[name], value) for name, value in node.kwargs.items() if name in by_name]
    for argument, value in given:
        nodes: list[fx.Node] = []
        map_arg(value, nodes.append)
        for source in nodes:
            yield source, argument.alias_info
