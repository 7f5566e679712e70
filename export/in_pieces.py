"""Run an ONNX graph in ONNX Runtime a few nodes at a time, with no more weights in memory than those need.

A session copies the weights of a graph into the layout that its kernels like. Beside the model in torch that would be
a second copy, so graphs with many weights are checked in pieces: the same nodes in the same order, each piece a
session that ends before the next one starts. It reads the weights where they lie, mapped from their file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from diffcr_compile.durable import passing_file
from diffcr_compile.export.parity import run_onnx
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.complex_inputs import as_graph_input

Array = npt.NDArray[Any]
Runs = Callable[[Sequence[Mapping[str, Array]]], list[list[Array]]]
# Weights of one piece; graphs with fewer run as a whole, as the runtime runs them.
PIECE_BYTES = 1 << 28


def has_many_weights(model: ModelProto) -> bool:
    """Whether a graph is to be run in pieces; one with graphs inside of it is not."""
    inner = any(a.type == AttributeProto.GRAPH for n in model.graph.node for a in n.attribute)
    return not inner and sum(map(_bytes, model.graph.initializer)) > PIECE_BYTES


def run_checked(
    path: Path, inputs: Mapping[str, Array], threads: int | None = None
) -> list[Array]:
    """Outputs of an ONNX file on the CPU, in pieces if it has many weights."""
    run = piecewise(path, threads)
    if run is None:
        return run_onnx(path, inputs, threads)
    return run([{name: as_graph_input(array) for name, array in inputs.items()}])[0]


def piecewise(path: Path, threads: int | None = None) -> Runs | None:
    """Outputs of a file for each of several inputs, in pieces; None if it has few weights, and one session is better."""
    model = onnx.load(str(path), load_external_data=False)
    if not has_many_weights(model):
        return None
    outputs = [value.name for value in model.graph.output]
    return lambda inputs: run_in_pieces(path, model, outputs, inputs, threads=threads)


def run_in_pieces(
    path: Path,
    model: ModelProto,
    names: Sequence[str],
    inputs: Sequence[Mapping[str, Array]],
    piece_bytes: int | None = None,
    threads: int | None = None,
) -> list[list[Array]]:
    """Values of a graph for each of several inputs, computed on the CPU.

    Args:
        path: of the graph, beside which its weights lie.
        model: the graph.
        names: of the values.
        inputs: of the graph, once or more often; each piece runs for all of them.
        piece_bytes: weights of a piece, one node at least; ``PIECE_BYTES`` by default.
        threads: inside an operator; None for ONNX Runtime's default.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    last = {name: number for number, node in enumerate(graph.node) for name in node.input}
    last |= dict.fromkeys(names, len(graph.node))
    types = _types(model)
    living: list[dict[str, Array]] = [dict(given) for given in inputs]
    for start, nodes in _pieces(graph.node, weights, piece_bytes or PIECE_BYTES):
        end = start + len(nodes)
        made = {name for node in nodes for name in node.output if name}
        wanted = [name for name in made if last.get(name, -1) >= end]
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        given = [n for n in read if n not in made and n not in weights]
        entries = [_entry(name, [values[name] for values in living]) for name in given]
        piece = _piece(model, nodes, entries, [types[n] for n in wanted])
        piece.graph.initializer.extend(weights[n] for n in read if n in weights)
        found = _run(path, piece, wanted, [{n: v[n] for n in given} for v in living], threads)
        living = [
            {n: array for n, array in {**values, **new}.items() if last.get(n, -1) >= end}
            for values, new in zip(living, found, strict=True)
        ]
    return [[values[name] for name in names] for values in living]


def _pieces(
    nodes: Sequence[NodeProto], weights: Mapping[str, TensorProto], most: int
) -> Iterator[tuple[int, list[NodeProto]]]:
    """Consecutive nodes, and the number of the first of them."""
    start, piece, size = 0, list[NodeProto](), 0
    for number, node in enumerate(nodes):
        mine = sum(_bytes(weights[name]) for name in node.input if name in weights)
        if piece and size + mine > most:
            yield start, piece
            start, piece, size = number, [], 0
        piece.append(node)
        size += mine
    if piece:
        yield start, piece


def _entry(name: str, arrays: Sequence[Array]) -> onnx.ValueInfoProto:
    """An input of a piece for all of these arrays: where their lengths differ the axis is open."""
    lengths = [set(axis) for axis in zip(*(array.shape for array in arrays), strict=True)]
    shape = [axis.pop() if len(axis) == 1 else None for axis in lengths]
    kind = onnx.helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def _piece(
    model: ModelProto,
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> ModelProto:
    graph = onnx.helper.make_graph(nodes, "piece", inputs, outputs)
    return onnx.helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )


def _run(
    path: Path,
    piece: ModelProto,
    wanted: Sequence[str],
    inputs: Sequence[Mapping[str, Array]],
    threads: int | None,
) -> list[dict[str, Array]]:
    """The wanted values of a piece for each of several inputs."""
    # beside the weights, where ONNX Runtime looks for them
    with passing_file(path.parent, f"{path.stem}.", piece.SerializeToString()) as file:
        session = make_session(file, threads=threads, prepack=False)
    return [
        dict(zip(wanted, session.run(list(wanted), dict(given)), strict=True))
        for given in inputs
    ]


def _types(model: ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Type of every value, without its shape: an open axis has another name in every piece."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: onnx.helper.make_tensor_value_info(
            value.name, value.type.tensor_type.elem_type, None
        )
        for value in (*inferred.value_info, *inferred.output)
    }


def _bytes(tensor: TensorProto) -> int:
    return int(
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        * math.prod(tensor.dims)
    )
