"""Work out, at export, what an ONNX graph of static shapes computes of sizes: it leaves nothing of it.

An open K is read with Shape, and positions and shapes are computed from it. With K given, all of that is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, MutableSequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[np.generic]
# Row numbers of all tokens of a batch are the largest thing that is computed of sizes.
MAX_ELEMENTS = 1 << 22
MOST_ROUNDS = 20
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"}
)


def fold_static(model: ModelProto) -> None:
    """Replace in place what depends on sizes and small constants only, and drop what does nothing.

    Before:  ``s = Shape(x (2, 64, C)); y = Expand(rows, Slice(s, ...))``
    After:   ``y`` is an initializer

    Weights that lie in a file are not read.
    """
    for _ in range(MOST_ROUNDS):
        shapes = static_shapes(model)
        if not _fold_once(model, shapes):
            break
    drop_unused(model.graph)


def static_shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every value whose axes are all known."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {t.name: tuple(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return found


def replace_uses(graph: GraphProto, renamed: Mapping[str, str]) -> None:
    """Let every reader of a value read another one; chains are followed."""

    def final(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    for node in graph.node:
        node.input[:] = [final(name) for name in node.input]
    made = {output for node in graph.node for output in node.output}
    for value in graph.output:
        source = final(value.name)
        if source != value.name and source in made:
            _rename(graph, source, value.name)


def drop_equal_nodes(graph: GraphProto) -> None:
    """Keep the first of nodes that do the same to the same values."""
    first: dict[bytes, NodeProto] = {}
    renamed: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type in _RANDOM or outputs & set(node.output):
            continue
        other = first.setdefault(_work(node), node)
        if other is not node:
            renamed |= dict(zip(node.output, other.output, strict=True))


def drop_unused(graph: GraphProto) -> None:
    """Drop nodes and initializers that lead to no output."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
            needed |= {n for a in node.attribute for s in a.g.node for n in s.input}
    _refill(graph.node, list(reversed(kept)))
    _refill(graph.initializer, [t for t in graph.initializer if t.name in needed])


def _fold_once(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """One sweep; whether anything changed."""
    graph = model.graph
    known = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
    outputs = {value.name for value in graph.output}
    cache: dict[bytes, Array] = {}
    left, renamed, changed = [], dict[str, str](), False
    for node in graph.node:
        value = _value(node, known, shapes, cache, model)
        if value is not None and not outputs & set(node.output):
            known[node.output[0]] = value
            graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
            changed = True
        elif _does_nothing(node, shapes, known) and not outputs & set(node.output):
            renamed[node.output[0]] = node.input[0]
            changed = True
        else:
            left.append(node)
    _refill(graph.node, left)
    replace_uses(graph, renamed)
    return changed


def _is_small(tensor: TensorProto) -> bool:
    return tensor.data_location != TensorProto.EXTERNAL and (
        math.prod(tensor.dims) <= MAX_ELEMENTS
    )


def _value(
    node: NodeProto,
    known: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    cache: dict[bytes, Array],
    model: ModelProto,
) -> Array | None:
    """What a node makes; None if that depends on data."""
    if len(node.output) != 1 or node.op_type in _RANDOM or not node.input:
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        axes = {a.name: a.i for a in node.attribute}
        shape = shapes[node.input[0]][axes.get("start", 0) : axes.get("end")]
        return np.array(shape, np.int64)
    if any(name and name not in known for name in node.input):
        return None
    if math.prod(shapes.get(node.output[0], ())) > MAX_ELEMENTS:
        return None
    if any(a.type == AttributeProto.GRAPH for a in node.attribute):
        return None
    arrays = {name: known[name] for name in node.input if name}
    if all(array.dtype.kind == "f" for array in arrays.values()):
        return None  # arithmetic on weights is the exporter's business
    key = _work(node, arrays)
    if key not in cache:
        cache[key] = np.asarray(_evaluate(node, arrays, model))
    return cache[key]


def _evaluate(node: NodeProto, arrays: Mapping[str, Array], model: ModelProto) -> Array:
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in arrays.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(node.output[0])],
    )
    alone = onnx.helper.make_model(graph, opset_imports=list(model.opset_import))
    (found,) = ReferenceEvaluator(alone).run(None, dict(arrays))
    return np.asarray(found)


def _does_nothing(
    node: NodeProto, shapes: Mapping[str, tuple[int, ...]], known: Collection[str]
) -> bool:
    """Whether a node passes on its first input as it is."""
    if node.op_type == "Identity":
        return node.input[0] not in known
    if node.op_type not in ("Expand", "Slice", "Reshape"):
        return False
    before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
    if before is None or before != after:
        return False
    return node.op_type != "Slice" or len(node.input) < 5 or math.prod(before) <= 1


def _work(node: NodeProto, arrays: Mapping[str, Array] | None = None) -> bytes:
    """Equal for nodes that do the same, to the same values or to values equal in content."""
    same = NodeProto()
    same.CopyFrom(node)
    same.ClearField("name")
    same.output[:] = [""] * len(node.output)
    if arrays is None:
        return bytes(same.SerializeToString(deterministic=True))
    same.input[:] = [""] * len(node.input)
    read = [
        (a.dtype.str, a.shape, a.tobytes())
        for a in map(arrays.get, node.input)
        if a is not None
    ]
    return bytes(same.SerializeToString(deterministic=True)) + repr(read).encode()


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _refill(field: MutableSequence[Any], items: list[Any]) -> None:
    """Replace the messages of a repeated field, which may be among the new ones."""
    copies = [type(item)() for item in items]
    for copy, item in zip(copies, items, strict=True):
        copy.CopyFrom(item)
    del field[:]
    field.extend(copies)
