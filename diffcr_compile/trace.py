"""Capture by running the model: what ``torch.export`` cannot trace, on real tensors.

The model runs once on its example inputs while every ATen op is recorded; blocks are recorded as one
call each and run on the side. Branches on values, ``.item()``, ``.numpy()``, formatted strings and
objects as inputs are no obstacle, because nothing is symbolic. The price: the batch size is baked into the
graph, and so is whatever the model read from its inputs as a Python number. The inputs that such numbers
come from (``value_reads.py``) are therefore no inputs of the graph any more but constants of it; and
``capture`` compares the graph with the model on other inputs before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from diffcr_compile.aliases import written_in_place
from diffcr_compile.block_calls import keeps
from diffcr_compile.blocks import Path, get_leaf, map_leaves
from diffcr_compile.errors import CaptureError
from diffcr_compile.program import identifier
from diffcr_compile.signature import call_arguments
from diffcr_compile.value_reads import MarkedReads, read_mark, value_reads

_FRESH = {torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default}
# What autograd switches leave behind, and aliases that only say "a fresh tensor".
_PASS_THROUGH = {
    *_FRESH,
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A recorded forward.

    Attributes:
        graph: without the fixed inputs.
        root: what its ``get_attr`` and ``call_module`` nodes refer to, by target.
        out_spec: pytree of the output.
        fixed: names of the inputs whose values the model read, so that they are constants of the graph.
    """

    graph: fx.Graph
    root: dict[str, Any]
    out_spec: pytree.TreeSpec
    fixed: tuple[str, ...]


def trace_graph(
    model: nn.Module,
    call: Mapping[str, Any],
    tensors: Mapping[str, Path],
    blocks: Sequence[str],
    fixable: Collection[str] = (),
) -> Recorded:
    """Record one forward.

    Args:
        model: in evaluation mode.
        call: arguments by parameter name.
        tensors: placeholder name -> path into `call`.
        blocks: qualified names of the modules that are recorded as one call.
        fixable: placeholders that may become constants if the model reads their values.

    Raises:
        CaptureError: the model reads the values of other inputs, or of its weights.
    """
    found: dict[str, pytree.TreeSpec] = {}
    parameters = list(inspect.signature(model.forward).parameters.values())

    def flat(*values: Tensor) -> list[Tensor]:
        given = dict(zip(tensors.values(), values, strict=True))
        inputs = map_leaves(dict(call), lambda path, leaf: given.get(path, leaf))
        args, kwargs = call_arguments(parameters, inputs)
        with MarkedReads():
            leaves, found["spec"] = pytree.tree_flatten(model(*args, **kwargs))
        return leaves

    values = {name: get_leaf(call, path).detach() for name, path in tensors.items()}
    with torch.no_grad(), _recorded_as_one(model, blocks):
        make = make_fx(
            flat, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
        )
        recorded = make(*(value.clone() for value in values.values()))
    fixed = _fixed(recorded, model, list(tensors), fixable)
    inputs = {name: values[name].clone() if name in fixed else None for name in tensors}
    graph, root = _rebuilt(recorded, model, inputs)
    return Recorded(graph, root, found["spec"], fixed)


def _fixed(
    recorded: fx.GraphModule, model: nn.Module, names: Sequence[str], fixable: Collection[str]
) -> tuple[str, ...]:
    """Names of the inputs whose values were read."""
    placeholders = (node for node in recorded.graph.nodes if node.op == "placeholder")
    inputs = dict(zip(placeholders, names, strict=True))
    weights = {id(parameter): name for name, parameter in model.named_parameters()}
    read: set[str] = set()
    for place, sources in value_reads(recorded.graph).items():
        found = {inputs[node] for node in sources if node in inputs}
        attributes = [
            getattr(recorded, str(n.target), None) for n in sources if n.op == "get_attr"
        ]
        found |= {weights[id(tensor)] for tensor in attributes if id(tensor) in weights}
        wrong = sorted(found - set(fixable))
        if wrong:
            raise CaptureError(
                f"forward reads a number from its inputs or weights: {place.name} needs the values of "
                f"{_some(wrong)} for a Python number, a branch or a size, which no graph can follow"
            )
        read |= found
    return tuple(name for name in names if name in read)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest


def _block_call(name: str, args: Any, kwargs: Any) -> Any:
    """Stands for a block's call while recording; never runs."""
    raise NotImplementedError(name)


@contextlib.contextmanager
def _recorded_as_one(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    patched = [(name, model.get_submodule(name)) for name in blocks]
    own = [module.__dict__.get("forward") for _, module in patched]
    try:
        for name, module in patched:
            module.forward = _recording(name, module.forward)
        yield
    finally:
        for (_, module), forward in zip(patched, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None:
            return forward(*args, **kwargs)
        with disable_proxy_modes_tracing():
            output = forward(*args, **kwargs)
        tracer: Any = mode.tracer
        proxies = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
        call = tracer.create_proxy("call_function", _block_call, (name, *proxies), {})
        # An input that the block hands through stays the input: a routed block returns it cut.
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        made = map_leaves(output, lambda _, leaf: None if id(leaf) in given else leaf)
        track_tensor_tree(made, call, constant=None, tracer=tracer)
        return output

    return run


def _rebuilt(
    recorded: fx.GraphModule, model: nn.Module, inputs: Mapping[str, Tensor | None]
) -> tuple[fx.Graph, dict[str, Any]]:
    """The recorded graph with the model's own names for inputs, weights and blocks.

    Args:
        recorded: from ``make_fx``.
        model: where weights and blocks come from.
        inputs: placeholder name -> its value if it is fixed, None if not.
    """
    names = {id(t): name for name, t in model.named_parameters(remove_duplicate=False)}
    names |= {id(t): name for name, t in model.named_buffers(remove_duplicate=False)}
    graph, root = fx.Graph(), dict[str, Any]()
    values: dict[fx.Node, Any] = {}
    attributes: dict[str, fx.Node] = {}
    waiting = iter(inputs.items())
    written = written_in_place(recorded.graph)

    def lookup(argument: Any) -> Any:
        return map_arg(argument, lambda node: values[node])

    def fresh(node: fx.Node, constant: fx.Node) -> fx.Node:
        """A copy for each call, where the graph writes to it."""
        if node not in written:
            return constant
        return graph.call_function(torch.ops.aten.clone.default, (constant,))

    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            name, fixed = next(waiting)
            if fixed is None:
                values[node] = graph.placeholder(name)
            else:
                root[f"fixed_{name}"] = fixed
                values[node] = fresh(node, graph.get_attr(f"fixed_{name}"))
        elif node.op == "get_attr":
            tensor = getattr(recorded, node.target)
            name = names.get(id(tensor), f"traced_{node.target.lstrip('_')}")
            if name not in attributes:
                root[name] = tensor if id(tensor) in names else tensor.detach()
                attributes[name] = graph.get_attr(name)
            values[node] = attributes[name]
        elif node.op == "output":
            graph.output(list(lookup(node.args[0])))
        elif node.target is _block_call:
            name, args, kwargs = node.args
            root[name] = model.get_submodule(name)
            values[node] = graph.create_node(
                "call_module",
                name,
                tuple(lookup(args)),
                dict(lookup(kwargs)),
                name=identifier(name),
            )
        elif node.target in _PASS_THROUGH:
            source = lookup(node.args[0])
            is_new = node.target in _FRESH
            values[node] = fresh(node, source) if is_new else source
        elif node.target in {torch._C._set_grad_enabled, read_mark}:
            continue
        else:
            values[node] = graph.create_node(
                "call_function",
                node.target,
                lookup(node.args),
                lookup(node.kwargs),
                name=node.name,
            )
    graph.eliminate_dead_code(keeps)
    graph.lint()
    return graph, root
