"""How much scratch memory a graph needs, from its shapes and the order of its nodes.

A runtime keeps a value until its last reader ran. The largest sum of living values is what it needs if it
reuses memory perfectly; TensorRT comes close to that, and fuses a few values away.
Score matrices of fused attention are never kept, and are left out where the target fuses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from diffcr_compile.durable import write_json_atomic
from diffcr_compile.export.device.memory import ACTIVATIONS

# A different view of the same bytes.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# What may stand between the two products of an attention.
_BETWEEN = frozenset({"Add", "Cast", "Div", "Mul", "Softmax", "Sub", "Where"})


def activation_bytes(path: Path, fused: bool = False) -> int:
    """Scratch memory of a graph in bytes.

    Args:
        path: the ONNX file, of static shapes; its weights are not read.
        fused: whether attention keeps no score matrix.
    """
    model = onnx.load(str(path), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    sizes = _sizes(inferred)
    if fused:
        sizes |= dict.fromkeys(_scores(inferred), 0)
    return _peak(inferred, sizes)


def write_activations(artifact: Path, graphs: Sequence[str]) -> None:
    """Write what the graph of each timestep bucket needs, for estimates on a device without onnx.

    Args:
        artifact: the artifact's folder.
        graphs: path of the static graph of each bucket. A profile needs what the static graph does.
    """
    sizes = {
        path: {
            "plain": activation_bytes(artifact / path),
            "fused": activation_bytes(artifact / path, fused=True),
        }
        for path in dict.fromkeys(graphs)
    }
    write_json_atomic(artifact / ACTIVATIONS, [sizes[path] for path in graphs])


def _sizes(model: ModelProto) -> dict[str, int]:
    """Bytes of every value whose shape is known; an axis that is not counts as 1."""
    graph = model.graph
    found: dict[str, int] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.UNDEFINED:
            continue
        item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        found[value.name] = item * math.prod(
            axis.dim_value if axis.HasField("dim_value") else 1 for axis in kind.shape.dim
        )
    return found


def _scores(model: ModelProto) -> set[str]:
    """Values between the two products of every attention."""
    makers = {output: node for node in model.graph.node for output in node.output}
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        found.add(node.output[0])
        todo = [node.input[0]]
        while todo:
            name = todo.pop()
            maker: NodeProto | None = makers.get(name)
            if maker is None or name in found:
                continue
            if maker.op_type in _BETWEEN:
                found.add(name)
                todo.append(maker.input[0])
            elif maker.op_type == "MatMul":
                found.add(name)
    return found


def _peak(model: ModelProto, sizes: Mapping[str, int]) -> int:
    graph = model.graph
    outside = {v.name for v in (*graph.input, *graph.output)}
    outside |= {tensor.name for tensor in graph.initializer}
    owner: dict[str, str] = {}  # a view -> the value whose bytes it shows
    last: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in node.input:
            last[owner.get(name, name)] = number
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    living: dict[str, int] = {}
    peak = 0
    for number, node in enumerate(graph.node):
        for name in node.output:
            if name and name not in outside and name not in owner:
                living[name] = sizes.get(name, 0)
        peak = max(peak, sum(living.values()))
        for name in [name for name in living if last.get(name, number) <= number]:
            del living[name]
    return peak
