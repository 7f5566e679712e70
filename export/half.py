"""Matrix products and attention of an exported program in float16 or bfloat16; all else stays float32.

The types stand in the graph (strong typing), because TensorRT 11 knows nothing else and older ones take it
too. Values that grow (the residual stream, modulation, norms) and the routers stay float32.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from diffcr_compile.program import Program, identifier, router_name

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.convolution.default,
        aten.scaled_dot_product_attention.default,
    }
)
HalfPrecision = Literal["fp16", "bf16"]
HALF_TYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
# ONNX has no bfloat16 for them at opset 20: Conv takes it from 22 on, Einsum never did.
_NO_BFLOAT16 = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.convolution.default,
        aten.einsum.default,
    }
)
# Ops that only move values: they pass half precision on as it is.
_MOVES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unsafe_split.Tensor,
        aten.unsqueeze.default,
        aten._unsafe_view.default,
        aten.view.default,
        operator.getitem,
    }
)
# A mask says "never" by a large negative number, and float16 ends at -65,504. In a softmax the exponential
# of -30,000 is 0 as well. bfloat16 has it too, as -29,952.
NEVER = -3e4
_FIXED = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_ROOT = "graph_module."
_MASK = 3


def compute_in_half(
    exported: ExportedProgram,
    program: Program,
    islands: Collection[str] = (),
    precision: HalfPrecision = "fp16",
) -> ExportedProgram:
    """The same program with its products in half precision, between casts; weights of these are halves too.

    Before:  ``y = linear(x, weight, bias)``
    After:   ``y = to_float32(linear(to_float16(x), weight_16, bias_16))``

    Inputs and outputs keep their types. Neighbouring products hand halves on without a cast. Convolutions and
    einsum stay float32 where `precision` is bf16.

    Args:
        exported: of `program`, in float32; it is left alone.
        program: says which modules are routers and blocks.
        islands: blocks that stay in float32 altogether; "" is everything outside of blocks.
        precision: the type.
    """
    dtype = HALF_TYPES[precision]
    made: ExportedProgram = exported.run_decompositions({})  # no writes in place
    for node in list(made.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            made.graph.erase_node(node)  # it says of the types what is no longer so
    found = products(made.graph, program, dtype)
    half = {node for node, block in found.items() if block not in islands}
    _Caster(made, half, dtype).run()
    made.graph.eliminate_dead_code()
    made.graph.lint()
    made.graph_module.recompile()
    return made


def products(
    graph: fx.Graph, program: Program, dtype: torch.dtype = torch.float16
) -> dict[fx.Node, str]:
    """Every product that may be of `dtype` -> its block, "" outside of blocks."""
    kept = _NO_BFLOAT16 if dtype == torch.bfloat16 else frozenset()
    found = blocks_of_products(graph, program)
    return {
        node: block
        for node, block in found.items()
        if _is_float32(node) and node.target not in kept
    }


def blocks_of_products(graph: fx.Graph, program: Program) -> dict[fx.Node, str]:
    """Every product but those of routers -> its block, "" outside of blocks."""
    routers = {router_name(spec.name) for spec in program.blocks}
    names = sorted((spec.name for spec in program.blocks), key=len, reverse=True)
    found = {}
    for node in graph.nodes:
        if node.target not in PRODUCTS and not _is_einsum_product(node):
            continue
        path = _module_of(node)
        if path.split(".")[0] in routers:
            continue
        found[node] = next((n for n in names if _inside(path, n)), "")
    return found


def _inside(path: str, block: str) -> bool:
    """Whether a module lies in a block; a span of blocks is one module of its own name."""
    return path == block or path.startswith((f"{block}.", f"{identifier(block)}."))


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix(_ROOT)


def _is_einsum_product(node: fx.Node) -> bool:
    return node.target is aten.einsum.default and len(node.all_input_nodes) > 1


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


class _Caster:
    """Gives every node its type, in order."""

    def __init__(
        self, exported: ExportedProgram, half: set[fx.Node], dtype: torch.dtype
    ) -> None:
        self._exported = exported
        self._graph = exported.graph
        self._half = half
        self._dtype = dtype
        self._narrow: set[fx.Node] = set()  # what was float32 and is half now
        self._casts: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self._graph.nodes):
            if node.op == "placeholder":
                if self._is_weight_of_products(node):
                    self._narrow_weight(node)
            elif node in self._half:
                self._narrow_mask(node)
                for source in node.all_input_nodes:
                    if _is_float32(source):
                        node.replace_input_with(source, self._cast(source, self._dtype))
                self._becomes_half(node)
            elif not any(source in self._narrow for source in node.all_input_nodes):
                continue
            elif node.target in _MOVES:
                self._becomes_half(node)
            else:
                for source in node.all_input_nodes:
                    if source in self._narrow:
                        node.replace_input_with(source, self._cast(source, torch.float32))

    def _becomes_half(self, node: fx.Node) -> None:
        node.meta["val"] = _narrowed(node.meta["val"], self._dtype)
        self._narrow.add(node)

    def _cast(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`source` in the other type, made once: a node is read in one other type only."""
        if source not in self._casts:
            with self._graph.inserting_after(self._after(source)):
                cast: fx.Node = self._graph.call_function(
                    aten._to_copy.default, (source,), {"dtype": dtype}
                )
            kept = ("nn_module_stack", "stack_trace", "from_node")
            cast.meta = {key: source.meta[key] for key in kept if key in source.meta}
            cast.meta["val"] = source.meta["val"].to(dtype)
            self._casts[source] = cast
        return self._casts[source]

    def _after(self, source: fx.Node) -> fx.Node:
        """Placeholders stay together at the front."""
        if source.op != "placeholder":
            return source
        first: list[fx.Node] = [n for n in self._graph.nodes if n.op == "placeholder"]
        return first[-1]

    def _narrow_mask(self, node: fx.Node) -> None:
        """A float mask of attention gets numbers that half precision has."""
        if node.target is not aten.scaled_dot_product_attention.default:
            return
        mask = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node) or not mask.meta["val"].is_floating_point():
            return
        with self._graph.inserting_before(node):
            clamped = self._graph.call_function(aten.clamp.default, (mask, NEVER))
        clamped.meta = {**mask.meta}
        node.replace_input_with(mask, clamped)

    def _is_weight_of_products(self, node: fx.Node) -> bool:
        """A float32 weight that is read, moved or not, by products in half precision only."""
        spec = self._spec(node)
        if spec.kind not in _FIXED or not _is_float32(node):
            return False
        pending = list(node.users)
        for user in pending:
            if user.target in _MOVES:
                pending += user.users
            elif user not in self._half:
                return False
        return bool(pending)

    def _narrow_weight(self, node: fx.Node) -> None:
        name, tables = (
            self._spec(node).target,
            (self._exported.state_dict, self._exported.constants),
        )
        table: Any = next(t for t in tables if name in t)
        narrow = table[name].detach().to(self._dtype)
        is_parameter = isinstance(table[name], nn.Parameter)
        table[name] = nn.Parameter(narrow, requires_grad=False) if is_parameter else narrow
        self._becomes_half(node)

    def _spec(self, node: fx.Node) -> Any:
        specs = self._exported.graph_signature.input_specs
        return next(spec for spec in specs if spec.arg.name == node.name)


def _narrowed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_narrowed(item, dtype) for item in value)
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.to(dtype)
    return value
