"""Put each block back as one call into the flat graph of an exported program.

``torch.export`` with ``preserve_module_call_signature`` inlines everything, but remembers for each block
which nodes of the flat graph were its inputs and outputs. So a block's body is cut out by letting its
outputs come from one ``call_module`` node; what only the body needed is dead code then. The body that
will run is the user's own module, which takes any number of tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from diffcr_compile.aliases import is_write
from diffcr_compile.errors import CaptureError
from diffcr_compile.program import identifier

aten = torch.ops.aten
# Checks of the exporter that hold by construction; they would pin dtypes and devices.
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
}

# How the exporter says that the model runs something inside a ``with`` statement.
_WITH = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}


def keeps(node: fx.Node) -> bool:
    """Whether dead code elimination must keep a node: inputs, the output, and writes in place."""
    if node.op in {"placeholder", "output"}:
        return True
    return is_write(node)


def graph_with_block_calls(
    exported: ExportedProgram,
    model: nn.Module,
    blocks: Sequence[str],
    inputs: Sequence[Any],
) -> tuple[fx.Graph, dict[str, Any]]:
    """The flat graph of `exported` with one call per block.

    Args:
        exported: from ``torch.export.export(..., preserve_module_call_signature=blocks)``.
        model: where weights and blocks come from.
        blocks: qualified names.
        inputs: leaves of the call in the order of the export: the placeholder's name for a tensor, the
            value itself for everything else.

    Returns:
        The graph, and what its ``get_attr`` and ``call_module`` nodes refer to, by target.

    Raises:
        CaptureError: a block is called more than once, or the graph holds what cannot be inlined.
    """
    builder = _Builder(exported, model, set(blocks))
    return builder.build(inputs), builder.root


class _Builder:
    def __init__(self, exported: ExportedProgram, model: nn.Module, blocks: set[str]) -> None:
        self.exported, self.model = exported, model
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.values: dict[
            str, Any
        ] = {}  # flat node's name -> node of our graph, or a constant
        self._attributes: dict[str, fx.Node] = {}
        # flat node's name -> (block's entry, position among the block's output leaves)
        self.block_outputs: dict[str, tuple[Any, int]] = {}
        self._calls: dict[str, list[Any]] = {}
        for entry in exported.module_call_graph:
            if entry.fqn not in blocks or entry.signature is None:
                continue
            given = {argument.name for argument in entry.signature.inputs}
            for position, argument in enumerate(entry.signature.outputs):
                # an input that the block hands through is made elsewhere
                if not isinstance(argument, ConstantArgument) and argument.name not in given:
                    self.block_outputs.setdefault(argument.name, (entry, position))

    def build(self, inputs: Sequence[Any]) -> fx.Graph:
        signature = self.exported.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        waiting = iter(inputs)
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self.values[node.name] = self._placeholder(specs[node.name], waiting)
            elif node.op == "output":
                results = [
                    self._lookup(argument)
                    for argument, spec in zip(
                        node.args[0], signature.output_specs, strict=True
                    )
                    if spec.kind is OutputKind.USER_OUTPUT
                ]
                self.graph.output(results)
            elif node.name in self.block_outputs:
                entry, position = self.block_outputs[node.name]
                self.values[node.name] = self._call(entry)[position]
            else:
                self.values[node.name] = self._copy(node, self.exported.graph_module)
        self.graph.eliminate_dead_code(keeps)
        self.graph.lint()
        return self.graph

    def _lookup(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.values[node.name])

    def _placeholder(self, spec: Any, waiting: Iterator[Any]) -> Any:
        if spec.kind is InputKind.USER_INPUT:
            given = next(waiting)
            return self.graph.placeholder(given.name) if isinstance(given, Input) else given
        if spec.kind is InputKind.CONSTANT_TENSOR:
            traced = self.exported.constants[spec.target]
        elif spec.target in self.exported.state_dict:
            traced = self.exported.state_dict[spec.target]
        elif spec.target in self.exported.constants:  # a buffer that is not saved
            traced = self.exported.constants[spec.target]
        else:
            raise CaptureError(f"the export lifts {spec.target}, which is no tensor")
        return self._attribute(spec.target, user_tensor(self.model, spec.target, traced))

    def _attribute(self, name: str, tensor: Any) -> fx.Node:
        if name not in self._attributes:
            self.root[name] = tensor
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]

    def _call(self, entry: Any) -> list[Any]:
        """The leaves of a block's output; the call is made where the first of them is needed."""
        if entry.fqn not in self._calls:
            flat = [
                argument.value
                if isinstance(argument, ConstantArgument)
                else self.values[argument.name]
                for argument in entry.signature.inputs
            ]
            args, kwargs = pytree.tree_unflatten(flat, entry.signature.in_spec)
            self.root[entry.fqn] = self.model.get_submodule(entry.fqn)
            node = self.graph.create_node(
                "call_module",
                entry.fqn,
                tuple(args),
                dict(kwargs),
                name=identifier(entry.fqn),
            )
            self._calls[entry.fqn] = _leaves(node, entry.signature.out_spec, self.graph)
        return self._calls[entry.fqn]

    def _copy(self, node: fx.Node, owner: nn.Module) -> Any:
        if node.target in _ASSERTIONS:
            return None
        if node.op == "get_attr":
            value = getattr(owner, str(node.target))
            # a module is the body of an op that takes functions, such as flex attention
            is_held = isinstance(value, (Tensor, fx.GraphModule)) and not _is_with_body(node)
            return self._attribute(str(node.target), value) if is_held else value
        args, kwargs = self._lookup(node.args), self._lookup(node.kwargs)
        name = getattr(node.target, "__name__", "")
        if name in _WITH:
            return self._inline(node, name, args)
        if node.target is operator.getitem and not isinstance(args[0], fx.Node):
            return args[0][args[1]]
        return self.graph.create_node(
            "call_function", node.target, args, kwargs, name=node.name
        )

    def _inline(self, node: fx.Node, kind: str, args: tuple[Any, ...]) -> Any:
        """The body of a ``with`` block of the model; its output is a list of values."""
        where = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
        if kind == "wrap_with_autocast" and args[2] and args[0] == self._device():
            raise CaptureError(
                f"the model switches autocast on for {args[0]} inside its forward; convert the model "
                "to the type it should run in, and take autocast out"
            )
        body: fx.GraphModule = args[where]
        operands = iter(args[where + 1 :])
        outer, self.values = self.values, {}
        try:
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    self.values[inner.name] = next(operands)
                elif inner.op == "output":
                    return self._lookup(inner.args[0])
                elif inner.name in self.block_outputs:
                    raise CaptureError(
                        "a block is called inside a with statement of the model; move the statement "
                        "into the block"
                    )
                else:
                    self.values[inner.name] = self._copy(inner, body)
        finally:
            self.values = outer
        raise CaptureError(f"{node.name} has no output")

    def _device(self) -> str:
        first = next(iter(self.model.parameters()), None)
        return "cpu" if first is None else first.device.type


def _is_with_body(node: fx.Node) -> bool:
    """Whether a get_attr node is the body of a ``with`` block, which is inlined."""
    return any(getattr(u.target, "__name__", "") in _WITH for u in node.users)


class Input:
    """A leaf of the call that is a tensor: the graph gets a placeholder of this name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _leaves(node: fx.Node, spec: pytree.TreeSpec, graph: fx.Graph) -> list[Any]:
    """Leaves of a block's output: the block's node itself, or getitem nodes into it."""
    if spec.is_leaf():
        return [node]
    keys: Mapping[Any, Any] | Sequence[Any] | range = (
        spec.context if spec.type is dict else range(spec.num_children)
    )
    found: list[Any] = []
    for position, key in enumerate(keys):
        child = graph.call_function(operator.getitem, (node, key))
        found += _leaves(child, spec.child(position), graph)
    return found


def user_tensor(model: nn.Module, name: str, traced: Tensor) -> Tensor:
    """The user's own parameter or buffer of that name; the traced tensor if there is none."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
    if (
        isinstance(value, Tensor)
        and value.shape == traced.shape
        and value.dtype == traced.dtype
    ):
        return value
    return traced.detach()
