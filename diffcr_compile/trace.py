"""Capture by running the model: what ``torch.export`` cannot trace, on real tensors.

The model runs once on its example inputs while every ATen op is recorded; blocks are recorded as one
call each and run on the side. Branches on values, ``.item()``, ``.numpy()``, formatted strings and
objects as inputs are no obstacle, because nothing is symbolic. The price: whatever the model read from
its inputs as a Python number is baked into the graph, and so is the batch size. ``capture`` therefore
compares the graph with the model on other inputs before it is used.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from diffcr_compile.block_calls import keeps
from diffcr_compile.blocks import Path, get_leaf, map_leaves
from diffcr_compile.program import identifier
from diffcr_compile.signature import call_arguments

# What autograd switches leave behind, and aliases that only say "a fresh tensor".
_PASS_THROUGH = {
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.detach.default,
}


def trace_graph(
    model: nn.Module,
    call: Mapping[str, Any],
    tensors: Mapping[str, Path],
    blocks: Sequence[str],
) -> tuple[fx.Graph, dict[str, Any], pytree.TreeSpec]:
    """Record one forward.

    Args:
        model: in evaluation mode.
        call: arguments by parameter name.
        tensors: placeholder name -> path into `call`.
        blocks: qualified names of the modules that are recorded as one call.

    Returns:
        The graph, what its ``get_attr`` and ``call_module`` nodes refer to by target, and the pytree
        of the output.
    """
    found: dict[str, pytree.TreeSpec] = {}
    parameters = list(inspect.signature(model.forward).parameters.values())

    def flat(*values: Tensor) -> list[Tensor]:
        given = dict(zip(tensors.values(), values, strict=True))
        inputs = map_leaves(dict(call), lambda path, leaf: given.get(path, leaf))
        args, kwargs = call_arguments(parameters, inputs)
        leaves, found["spec"] = pytree.tree_flatten(model(*args, **kwargs))
        return leaves

    values = [get_leaf(call, path) for path in tensors.values()]
    with torch.no_grad(), _recorded_as_one(model, blocks):
        try:
            recorded = make_fx(flat, tracing_mode="real", pre_dispatch=True)(*values)
        except RuntimeError as error:
            if "get value out of a tracing tensor" not in str(error):
                raise
            raise ValueError(
                "forward reads a number from its inputs (.item(), or a branch on a tensor value), "
                "which no graph can follow"
            ) from error
    graph, root = _rebuilt(recorded, model, list(tensors))
    return graph, root, found["spec"]


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
        return track_tensor_tree(output, call, constant=None, tracer=tracer)

    return run


def _rebuilt(
    recorded: fx.GraphModule, model: nn.Module, placeholders: Sequence[str]
) -> tuple[fx.Graph, dict[str, Any]]:
    """The recorded graph with the model's own names for inputs, weights and blocks."""
    names = {id(t): name for name, t in model.named_parameters(remove_duplicate=False)}
    names |= {id(t): name for name, t in model.named_buffers(remove_duplicate=False)}
    graph, root = fx.Graph(), dict[str, Any]()
    values: dict[fx.Node, Any] = {}
    attributes: dict[str, fx.Node] = {}
    waiting = iter(placeholders)

    def lookup(argument: Any) -> Any:
        return map_arg(argument, lambda node: values[node])

    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(next(waiting))
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
            values[node] = lookup(node.args[0])
        elif node.target is torch._C._set_grad_enabled:
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
