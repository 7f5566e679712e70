"""Linear layers of tokens in int8: a pair of quantize and dequantize before each of their operands.

Runtimes fuse such pairs with the product into one int8 kernel. Weights have a scale per output channel,
activations one per tensor, both symmetric. Routers, norms, softmax, modulation and the residual stream are
not touched: they stay what ``compute_in_half`` made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from diffcr_compile.export.half import blocks_of_products
from diffcr_compile.program import Program

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed
LEVELS = 127
# The smallest normal float16: scales are float16 in the graph, and keep all their bits above it.
SMALLEST_SCALE = 2.0**-14
_TOKEN_RANK = 3  # (batch, tokens, width); modulation reads (batch, width)


def token_linears(exported: ExportedProgram, program: Program) -> dict[fx.Node, str]:
    """Linear layers of routed blocks that are applied to tokens -> name of their weight.

    It is the same name in the programs of all timestep buckets.
    """
    weights = {
        spec.arg.name: str(spec.target)
        for spec in exported.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    found = {}
    for node, block in blocks_of_products(exported.graph, program).items():
        if not block or node.target is not aten.linear.default:
            continue
        source, weight = node.all_input_nodes[:2]
        if weight.name in weights and source.meta["val"].dim() >= _TOKEN_RANK:
            found[node] = weights[weight.name]
    return found


def scale_of(largest: float | Tensor) -> Tensor:
    """The scale that takes `largest` to 127: a float16 number, as float32."""
    scale = torch.as_tensor(largest, dtype=torch.float32) / LEVELS
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def compute_in_int8(
    made: ExportedProgram, program: Program, largest: Mapping[str, float]
) -> ExportedProgram:
    """Put the linear layers of tokens of a float16 program into int8; it is changed in place and returned.

    Before:  ``y = linear(x, weight_16, bias_16)``
    After:   ``y = linear(dequantize(quantize(x)), dequantize(weight_8), bias_16)``

    Layers that ``compute_in_half`` left in float32 stay there.

    Args:
        made: of ``compute_in_half``.
        program: that it was made of.
        largest: name of a weight -> the largest magnitude that its layers read.
    """
    # registers the ops that say int8; it loads much of torch, for this precision alone
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    _Quantizer(made).run(token_linears(made, program), largest)
    made.graph.lint()
    made.graph_module.recompile()
    return made


class _Quantizer:
    def __init__(self, made: ExportedProgram) -> None:
        self._made, self._graph = made, made.graph
        self._inputs: dict[tuple[fx.Node, float], fx.Node] = {}
        self._weights: dict[fx.Node, fx.Node] = {}

    def run(self, linears: Mapping[fx.Node, str], largest: Mapping[str, float]) -> None:
        for node, name in linears.items():
            if node.meta["val"].dtype != torch.float16:
                continue
            source, weight = node.all_input_nodes[:2]
            scale = float(scale_of(largest[name]))
            node.replace_input_with(source, self._rounded(source, scale, node))
            node.replace_input_with(weight, self._rounded_weight(weight, node))

    def _rounded(self, source: fx.Node, scale: float, reader: fx.Node) -> fx.Node:
        """An activation on 255 levels; layers that read the same one share them."""
        key = (source, scale)
        if key not in self._inputs:
            levels = (scale, 0, -LEVELS, LEVELS, torch.int8)
            with self._graph.inserting_before(reader):
                narrow = self._call(
                    quantized.quantize_per_tensor.default, source, levels, reader, torch.int8
                )
            self._inputs[key] = self._back(
                quantized.dequantize_per_tensor.default, narrow, levels, reader
            )
        return self._inputs[key]

    def _rounded_weight(self, weight: fx.Node, reader: fx.Node) -> fx.Node:
        """A weight on 255 levels per output channel, stored in int8."""
        if weight not in self._weights:
            target = self._spec(weight).target
            wide = self._made.state_dict[target].detach().float()
            scales = scale_of(wide.abs().amax(dim=1))
            narrow = (wide / scales[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
            self._made.state_dict[target] = nn.Parameter(narrow, requires_grad=False)
            weight.meta["val"] = weight.meta["val"].to(torch.int8)
            scale = self._constant(f"{weight.name}_scale", scales)
            levels = (scale, None, 0, -LEVELS, LEVELS, torch.int8)
            self._weights[weight] = self._back(
                quantized.dequantize_per_channel.default, weight, levels, reader
            )
        return self._weights[weight]

    def _back(
        self, op: Any, narrow: fx.Node, levels: tuple[Any, ...], reader: fx.Node
    ) -> fx.Node:
        """The float16 values that int8 ones stand for."""
        with self._graph.inserting_before(reader):
            node = self._call(op, narrow, levels, reader, torch.float16)
        node.kwargs = {"out_dtype": torch.float16}
        return node

    def _call(
        self,
        op: Any,
        source: fx.Node,
        levels: tuple[Any, ...],
        reader: fx.Node,
        dtype: torch.dtype,
    ) -> fx.Node:
        node: fx.Node = self._graph.call_function(op, (source, *levels))
        kept = ("nn_module_stack", "stack_trace", "from_node")
        node.meta = {key: reader.meta[key] for key in kept if key in reader.meta}
        node.meta["val"] = source.meta["val"].to(dtype)
        return node

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        """A tensor of the program; it stands before the inputs."""
        specs = self._made.graph_signature.input_specs
        at = next(i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT)
        places = [node for node in self._graph.nodes if node.op == "placeholder"]
        with self._graph.inserting_before(places[at]):
            node: fx.Node = self._graph.placeholder(name)
        node.meta["val"] = places[at].meta["val"].fake_mode.from_tensor(value)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name)
        specs.insert(at, spec)
        self._made.constants[node.name] = value
        return node

    def _spec(self, node: fx.Node) -> Any:
        specs = self._made.graph_signature.input_specs
        return next(spec for spec in specs if spec.arg.name == node.name)


def dequantize_to_half(model: ModelProto) -> list[str]:
    """Let DequantizeLinear give float16 itself; the names of the casts that are gone.

    Before:  ``Cast(DequantizeLinear(x, scale_32))``        as torch's exporter says it
    After:   ``DequantizeLinear(x, scale_16)``

    Scales are float16 numbers, so nothing is rounded.
    """
    graph = model.graph
    scales = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    casts = [
        node
        for node in graph.node
        if node.op_type == "Cast"
        and node.input[0] in makers
        and makers[node.input[0]].op_type == "DequantizeLinear"
    ]
    for cast in casts:
        maker = makers[cast.input[0]]
        maker.output[0] = cast.output[0]
        _narrow(scales[maker.input[1]])
        graph.node.remove(cast)
    return [cast.name for cast in casts]


def _narrow(scale: TensorProto) -> None:
    if scale.data_type == TensorProto.FLOAT:
        half = numpy_helper.to_array(scale).astype("float16")
        scale.CopyFrom(numpy_helper.from_array(half, scale.name))
