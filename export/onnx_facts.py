"""What an ONNX file says about itself; weights are not read.

Tensors that lie in a file beside it are never opened, and large ones inside are let go of at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from diffcr_compile.errors import ArtifactError, UsageError, one_line
from diffcr_compile.export.onnx_model import node_map

# Shape inference looks at the values of small constants only.
LARGE_BYTES = 1 << 16
_NAMES = {"float": "float32", "double": "float64"}
_BITS = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}


@dataclasses.dataclass(frozen=True)
class Node:
    """One ONNX node, with the types and shapes of its values where they are known.

    Attributes:
        proto: the node itself.
        input_types: one per input; None where it is not known or the input is left out.
        output_types: one per output.
        output_shapes: one per output; an axis of unknown length is None, an unknown rank None.
        constant_inputs: positions of inputs that are initializers or constants.
        origin: the module or the line of the outer graph it came from; "" if nobody says.
    """

    proto: NodeProto
    input_types: tuple[str | None, ...]
    output_types: tuple[str | None, ...]
    output_shapes: tuple[tuple[int | None, ...] | None, ...]
    constant_inputs: frozenset[int]
    origin: str


@dataclasses.dataclass(frozen=True)
class GraphFacts:
    """An ONNX file without its weights.

    Attributes:
        path: the file.
        opset: of the standard operators; 0 if there are none.
        ir: IR version.
        nodes: of the graph and of the graphs inside it, in order.
        inputs: name -> (type, shape) of the graph's own inputs.
        weight_types: type of each initializer.
        weight_bytes: bytes of all initializers, without reading them.
    """

    path: Path
    opset: int
    ir: int
    nodes: tuple[Node, ...]
    inputs: dict[str, tuple[str | None, tuple[int | None, ...] | None]]
    weight_types: dict[str, str]
    weight_bytes: int


def read_facts(path: Path, origins: dict[str, str] | None = None) -> GraphFacts:
    """The facts about an ONNX file.

    Args:
        path: the file; weights beside it need not be there.
        origins: ONNX node name -> module name, where the file itself no longer says it.

    Raises:
        UsageError: there is no such file.
        ArtifactError: it is no ONNX file.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.HasField("graph"):
            raise ValueError("it has no graph")
        weight_bytes = sum(_bytes(tensor) for tensor in model.graph.initializer)
        _let_go(model)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        raise ArtifactError(f"{path} is no ONNX file: {one_line(error)}") from error
    named = node_map(model) | (origins or {})
    graph = model.graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return GraphFacts(
        path=path,
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
        ir=model.ir_version,
        nodes=tuple(_nodes(graph, {}, {}, frozenset(), named)),
        inputs={value.name: (_type(value), _shape(value)) for value in graph.input},
        weight_types={t.name: type_name(t.data_type) for t in graph.initializer},
        weight_bytes=weight_bytes,
    )


def type_name(number: int) -> str:
    """``TensorProto.FLOAT`` -> ``"float32"``."""
    name: str = TensorProto.DataType.Name(number).lower()
    return _NAMES.get(name, name)


def _nodes(
    graph: GraphProto,
    types: dict[str, str | None],
    shapes: dict[str, tuple[int | None, ...] | None],
    constants: frozenset[str],
    origins: dict[str, str],
) -> Iterator[Node]:
    """Nodes of a graph, with what the graphs around it know."""
    values = (*graph.input, *graph.value_info, *graph.output)
    types = types | {value.name: _type(value) for value in values}
    types |= {tensor.name: type_name(tensor.data_type) for tensor in graph.initializer}
    shapes = shapes | {value.name: _shape(value) for value in values}
    made = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    constants = constants | made | {tensor.name for tensor in graph.initializer}
    for proto in graph.node:
        yield Node(
            proto,
            tuple(types.get(name) for name in proto.input),
            tuple(types.get(name) for name in proto.output),
            tuple(shapes.get(name) for name in proto.output),
            frozenset(i for i, name in enumerate(proto.input) if name in constants),
            origins.get(proto.name) or _scope(proto.name),
        )
        for attribute in proto.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g, types, shapes, constants, origins)


def _scope(name: str) -> str:
    """``/blocks.0/attn/MatMul``, as other exporters name nodes -> ``blocks.0.attn``."""
    return ".".join(part for part in name.split("/")[:-1] if part)


def _type(value: ValueInfoProto) -> str | None:
    number = value.type.tensor_type.elem_type
    return type_name(number) if number else None


def _shape(value: ValueInfoProto) -> tuple[int | None, ...] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    axes = value.type.tensor_type.shape.dim
    return tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in axes)


def _bytes(tensor: TensorProto) -> int:
    name = type_name(tensor.data_type)
    digits = "".join(c for c in name.replace("e4m3", "").replace("e5m2", "") if c.isdigit())
    bits = _BITS.get(name) or int(digits or 8)  # bool is a byte
    return -(-math.prod(map(int, tensor.dims)) * bits // 8)


def _let_go(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and _bytes(tensor) > LARGE_BYTES:
            kind, dims, name = tensor.data_type, list(tensor.dims), tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(dims)
