"""Take the routing of a block that keeps all of its tokens out of an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto

from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.export.fold_static import drop_unused, replace_uses, static_shapes

# What may stand between a TopK and the gathers and the scatter that take its positions.
_POSITIONS = frozenset(
    {"Cast", "Concat", "Expand", "Gather", "Max", "Mul", "Add", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip


def drop_full_routing(model: ModelProto, selects: Collection[str]) -> None:
    """Make blocks run on the stream as it is, in place.

    Before:  ``index = TopK(router(x), N)``, gathers, ``y = block(...)``, scatter
    After:   ``y = block(x, ...)``

    Args:
        model: of static shapes.
        selects: the values with the positions, the second output of each TopK, of blocks with K = N.

    Raises:
        UnsupportedModelError: positions go where this does not follow them.
    """
    if not selects:
        return
    graph, shapes = model.graph, static_shapes(model)
    positions = set(selects)
    passed_on: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "TopK" or not positions & set(node.input):
            continue
        source = _passed_on(node, positions)
        if source is None:
            if node.op_type not in _POSITIONS:
                raise UnsupportedModelError(f"{node.op_type} reads the positions of tokens")
            positions |= set(node.output)
        elif shapes.get(source) == shapes.get(node.output[0]):
            passed_on[node.output[0]] = source
        else:
            _only_reshape(graph, node, source, shapes)
    replace_uses(graph, passed_on)
    drop_unused(graph)
    if any(set(selects) & set(node.output) for node in graph.node):
        raise UnsupportedModelError("the positions of tokens are used otherwise")
    _undo_pairs(model)


def _passed_on(node: NodeProto, positions: set[str]) -> str | None:
    """What a gather or a scatter of all tokens gives on; None for another node."""
    if node.op_type in ("Gather", "GatherND") and node.input[0] not in positions:
        return str(node.input[0])
    if node.op_type == "ScatterND" and node.input[2] not in positions:
        return str(node.input[2])
    return None


def _only_reshape(
    graph: GraphProto, node: NodeProto, source: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Turn a gather or a scatter of all tokens into what is left of it: rows of a table by sample, or the reverse.

    Before:  ``y = Gather(table (B * N, C), positions (B, N))``
    After:   ``y = Reshape(table, (B, N, C))``      or Expand, where the samples share a table of N rows
    """
    before, after = shapes.get(source), shapes.get(node.output[0])
    if before is None or after is None:
        raise UnsupportedModelError(f"{node.op_type} has no static shape")
    if math.prod(before) == math.prod(after):
        op = "Reshape"
    elif before == after[1:]:
        op = "Expand"
    else:
        raise UnsupportedModelError(f"{node.op_type} changes a shape with all tokens kept")
    shape = f"{node.output[0]}.shape"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(after, np.int64), shape))
    node.op_type, node.input[:] = op, [source, shape]
    del node.attribute[:]


def _undo_pairs(model: ModelProto) -> None:
    """Drop transposes and reshapes that undo each other, and slices that are put together again."""
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    outputs = {value.name for value in graph.output}
    constants = {t.name: t for t in graph.initializer}
    shapes = static_shapes(model)
    renamed: dict[str, str] = {}
    for node in graph.node:
        if outputs & set(node.output):
            continue
        source = None
        if node.op_type == "Transpose":
            source = _before_both(node, makers)
        elif node.op_type == "Reshape":
            source = _before_reshapes(node, makers, shapes)
        elif node.op_type == "Concat":
            source = _whole(node, makers, constants, shapes)
        if source is not None:
            renamed[node.output[0]] = source
    replace_uses(graph, renamed)
    drop_unused(graph)


def _before_both(node: NodeProto, makers: dict[str, NodeProto]) -> str | None:
    first = makers.get(node.input[0])
    if first is None or first.op_type != "Transpose":
        return None
    one, two = _axes(first), _axes(node)
    if not one or not two or [one[axis] for axis in two] != list(range(len(two))):
        return None
    return str(first.input[0])


def _before_reshapes(
    node: NodeProto, makers: dict[str, NodeProto], shapes: dict[str, tuple[int, ...]]
) -> str | None:
    """The value of the same shape that a chain of reshapes starts from."""
    first: NodeProto | None = node
    while first is not None and first.op_type == "Reshape":
        source = str(first.input[0])
        if shapes.get(source, ()) == shapes.get(node.output[0]):
            return source
        first = makers.get(source)
    return None


def _whole(
    node: NodeProto,
    makers: dict[str, NodeProto],
    constants: dict[str, onnx.TensorProto],
    shapes: dict[str, tuple[int, ...]],
) -> str | None:
    """The value whose consecutive slices a Concat puts together."""
    parts = [makers.get(name) for name in node.input]
    if len(parts) < 2:
        return None
    end, sources = 0, set()
    for part in parts:
        if part is None or part.op_type != "Slice" or part.input[0] not in shapes:
            return None
        shape = shapes[part.input[0]]
        numbers = [_integers(constants.get(name)) for name in part.input[1:]]
        if len(numbers) < 3 or any(n is None or len(n) != 1 for n in numbers):
            return None
        (start,), (stop,), (axis,) = (n for n in numbers[:3] if n is not None)
        axis %= len(shape)
        wanted = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(shape)
        step = numbers[3][0] if len(numbers) > 3 and numbers[3] else 1
        if axis != wanted or step != 1 or start != end:
            return None
        end = min(stop, shape[axis]) if stop >= 0 else shape[axis] + stop
        sources.add(part.input[0])
    (source, *others) = sources
    return None if others or shapes[source] != shapes.get(node.output[0]) else str(source)


def _axes(node: NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])


def _integers(tensor: onnx.TensorProto | None) -> list[int] | None:
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return [int(n) for n in np.ravel(onnx.numpy_helper.to_array(tensor))]


def positions_of(graph: GraphProto, lengths: Collection[str]) -> set[str]:
    """The positions of every TopK whose K is one of these values."""
    return {
        node.output[1]
        for node in graph.node
        if node.op_type == "TopK" and node.input[1] in set(lengths)
    }
