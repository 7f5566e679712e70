"""Compute what a captured graph computes from constants alone, once.

Position grids, complex rotary tables and masks of fixed size are the same at every call. Folded, they
are plain tensors: no complex arithmetic that ONNX lacks, no ``nonzero`` whose shape depends on values,
and no work at run time. Parameters are never folded, because calibration trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from diffcr_compile.aliases import is_write, written_families
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
    known = _known(graph, root)
    for node in graph.nodes:
        if node in known and node.op == "get_attr":
            values[node] = root[str(node.target)]
        elif node in known:
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
    graph.eliminate_dead_code(lambda node: keeps(node) and node not in known)
    return made


def _use_number(node: fx.Node, value: bool | float) -> None:
    def swap(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), swap)


def _known(graph: fx.Graph, root: Mapping[str, Any]) -> set[fx.Node]:
    """Nodes whose value is the same at every call.

    Memory that is written to is known if all that is written is, if every call makes it anew, and if
    nobody else looks at it in between.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    families = written_families(graph)
    barred: set[fx.Node] = set()
    while True:
        known: set[fx.Node] = set()
        for node in graph.nodes:
            if node not in barred and _is_known(node, root, known):
                known.add(node)
        bad = [
            family
            for family in families
            if family & known and not _settles(family, known, place)
        ]
        if not bad:
            return known
        barred = barred.union(*bad)


def _settles(family: set[fx.Node], known: set[fx.Node], place: Mapping[fx.Node, int]) -> bool:
    writers = [node for node in family if is_write(node)]
    last = max(place[node] for node in writers)
    readers = {user for node in family & known for user in node.users} - known
    return (
        known.issuperset(writers)
        and not any(node.op == "get_attr" for node in family)
        and all(place[reader] > last for reader in readers)
    )


def _is_known(node: fx.Node, root: Mapping[str, Any], known: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        tensor = root[str(node.target)]
        if not isinstance(tensor, Tensor) or isinstance(tensor, (nn.Parameter, FakeTensor)):
            return False
        return not tensor.is_meta
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload) and node.target.__module__ != (
        "_operator"
    ):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    return known.issuperset(node.all_input_nodes)
