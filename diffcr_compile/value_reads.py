"""Which inputs' values does a recorded forward read? Those decide its sizes and branches, and no graph follows.

A value is read where a tensor becomes a Python number (``.item()``, ``bool(tensor)``, ``.numpy()``), and
where it becomes a size (``nonzero``, a boolean index). The recorded graph has a node at each of these
places, and its inputs lead back to the model's inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from diffcr_compile.aliases import written_memory
from diffcr_compile.data_dependent import DATA_DEPENDENT

aten = torch.ops.aten
# They hand out a tensor's memory without an op that could be recorded.
_SILENT = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}

# Ops that pick from one tensor by the values of another -> position of the other.
_PICKED_BY: dict[Any, int] = {
    aten.index: 1,
    aten.masked_select: 1,
    aten.repeat_interleave: 1,
}
# Ops that look at the form of a tensor and not at its values.
_FORM_ONLY = {
    aten.empty_like,
    aten.full_like,
    aten.new_empty,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones_like,
    aten.rand_like,
    aten.randn_like,
    aten.zeros_like,
}

_DATA: Any = torch.Tensor.data


def read_mark(_: Tensor) -> None:
    """Stands in a recorded graph where the memory of a tensor is read; never runs."""
    raise NotImplementedError


class AliasesOfData(TorchFunctionMode):
    """``tensor.data`` is ``tensor.detach()``: tracers lose sight of the first, and of writes through it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == _DATA.__get__:  # another object at every look
            return args[0].detach()
        return func(*args, **(kwargs or {}))


class MarkedReads(AliasesOfData):
    """Leaves a :func:`read_mark` in the graph that is being recorded where memory is read."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        mode = get_proxy_mode()
        if func in _SILENT and mode is not None:
            tracer: Any = mode.tracer
            proxy = tracer.unwrap_proxy(args[0])
            if not isinstance(proxy, Tensor):
                tracer.create_proxy("call_function", read_mark, (proxy,), {})
        return super().__torch_function__(func, types, args, kwargs)


def value_reads(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Where values are read -> the placeholders and get_attr nodes that the values come from.

    Args:
        graph: recorded on real tensors; nodes have their tensors' form in ``meta["val"]``.
    """
    sources: dict[fx.Node, set[fx.Node]] = {}
    reads = {}
    for node in graph.nodes:
        if node.op in {"placeholder", "get_attr"}:
            sources[node] = {node}
            continue
        if getattr(node.target, "overloadpacket", None) in _FORM_ONLY:
            sources[node] = set()
            continue
        sources[node] = set().union(*(sources[n] for n in node.all_input_nodes))
        # later readers of that memory depend on what was written
        for base in written_memory(node):
            sources[base] = sources[base] | sources[node]
        if node.op == "call_function" and _reads_values(node):
            deciding = _deciding(node)
            reads[node] = set().union(*(sources[n] for n in deciding))
    return reads


def _deciding(node: fx.Node) -> list[fx.Node]:
    """The inputs of a reading node whose values are read; the others are only picked from."""
    position = _PICKED_BY.get(getattr(node.target, "overloadpacket", None))
    if position is None or len(node.args) <= position:
        return node.all_input_nodes
    found: list[fx.Node] = []
    map_arg(node.args[position], found.append)
    return found


def _reads_values(node: fx.Node) -> bool:
    """Whether a node cannot run on tensors that have a form and no values."""
    if node.target is read_mark:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.data_dependent_output in node.target.tags:
        return True
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(source: fx.Node) -> Any:
        value = source.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )

    try:
        with mode, torch.no_grad():
            args, kwargs = map_arg((node.args, node.kwargs), fake)
            node.target(*args, **kwargs)
    except DATA_DEPENDENT:
        return True
    except Exception:  # noqa: BLE001 - what else is wrong with it, the comparison with the model says
        return False
    return False
