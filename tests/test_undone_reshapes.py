"""Reshapes that undo each other leave the graph; others stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from diffcr_compile.export.undone_reshapes import drop_undone_reshapes

START = (6, 4)
WRITTEN = [
    numpy_helper.from_array(np.array([[2], [0]]), "at"),
    numpy_helper.from_array(np.ones((2, 4), np.float32), "rows"),
]


def chain(maker: str, *shapes: tuple[int, ...]) -> ir.Model:
    """ScatterND, reshapes to these shapes one after the other, Neg."""
    nodes = [
        helper.make_node(
            maker, ["x", "at", "rows"][: 3 if maker == "ScatterND" else 1], ["v0"]
        )
    ]
    constants, values, last = (
        list(WRITTEN),
        [helper.make_tensor_value_info("v0", 1, START)],
        "v0",
    )
    for number, shape in enumerate(shapes, 1):
        name = f"v{number}"
        constants.append(numpy_helper.from_array(np.array(shape), f"s{number}"))
        nodes.append(helper.make_node("Reshape", [last, f"s{number}"], [name]))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        last = name
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, START)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[-1])
    graph = helper.make_graph(nodes, "chain", [x], [y], constants, value_info=values)
    made: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return ir.from_proto(made)


@pytest.mark.parametrize(
    ("maker", "shapes", "left"),
    [
        ("ScatterND", [(2, 3, 4), START], []),
        ("ScatterND", [(2, 3, 4), (2, 12)], ["Reshape", "Reshape"]),
        ("ScatterND", [(2, 3, 4), START, (24,)], ["Reshape"]),
        ("Abs", [(2, 3, 4), START], ["Reshape", "Reshape"]),  # the model's own
    ],
)
def test_what_a_scatter_wrote_is_read_as_it_is(
    maker: str, shapes: list[tuple[int, ...]], left: list[str]
) -> None:
    model = chain(maker, *shapes)
    assert drop_undone_reshapes(model) == (len(left) < len(shapes))
    assert [node.op_type for node in model.graph] == [maker, *left, "Neg"]
