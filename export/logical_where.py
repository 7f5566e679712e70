"""Where on truth values -> And, Or, Not: ONNX allows it, ONNX Runtime has no kernel for it."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto, helper


def say_where_in_logic(model: ModelProto) -> int:
    """Replace each Where that chooses between truth values, in place; return how many there were.

    Before:  ``y = Where(c, a, b)``                     of bool
    After:   ``y = Or(And(c, a), And(Not(c), b))``      the same broadcasting

    The model must still say the types of its values in ``value_info``, as the exporter leaves it.
    """
    graph = model.graph
    boolean = {t.name for t in graph.initializer if t.data_type == TensorProto.BOOL}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BOOL:
            boolean.add(value.name)
    found = {n.name for n in graph.node if n.op_type == "Where" and n.output[0] in boolean}
    if not found:
        return 0
    nodes = [
        new
        for node in graph.node
        for new in (_in_logic(node) if node.name in found else [node])
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(found)


def _in_logic(node: NodeProto) -> Iterator[NodeProto]:
    condition, chosen, other = node.input
    name = node.output[0]
    for op, inputs, output in (
        ("And", [condition, chosen], f"{name}_chosen"),
        ("Not", [condition], f"{name}_not"),
        ("And", [f"{name}_not", other], f"{name}_other"),
        ("Or", [f"{name}_chosen", f"{name}_other"], name),
    ):
        made = helper.make_node(op, inputs, [output], name=f"{node.name}_{output}")
        made.metadata_props.extend(node.metadata_props)
        yield made
