"""What is left in an ONNX graph of gathers and scatters that take every token."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.export.full_in_onnx import drop_full_routing

SAMPLES, TOKENS, CHANNELS = 2, 4, 3
STREAM, TABLE = (SAMPLES, TOKENS, CHANNELS), (SAMPLES * TOKENS, CHANNELS)
CONSTANTS = {
    "k": np.array([TOKENS]),
    "table_shape": np.array(TABLE),
    "stream_shape": np.array(STREAM),
    "firsts": np.array([[0], [TOKENS]]),
    "last": np.array([-1]),
    "shared": np.arange(12, dtype=np.float32).reshape(TOKENS, CHANNELS),
    "longer": np.arange(15, dtype=np.float32).reshape(5, CHANNELS),
}
SELECT = [
    helper.make_node("TopK", ["logits", "k"], ["best", "index"], axis=1),
    helper.make_node("Reshape", ["x", "table_shape"], ["table"]),
    helper.make_node("Add", ["index", "firsts"], ["positions"]),
]


def graph(*nodes: NodeProto) -> ModelProto:
    """Inputs `x` (B, N, C) and `logits` (B, N); output `y` like `x`."""
    values = {"x": STREAM, "logits": STREAM[:2], "y": STREAM}
    x, logits, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in values.items()
    )
    constants = [onnx.numpy_helper.from_array(a, name) for name, a in CONSTANTS.items()]
    made = helper.make_graph([*SELECT, *nodes], "full", [x, logits], [y], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    logits = np.zeros(STREAM[:2], np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "logits": logits})
    return np.asarray(y)


def test_a_block_of_all_tokens_works_on_the_stream_as_it_is() -> None:
    model = graph(
        helper.make_node("Gather", ["table", "positions"], ["kept"]),
        helper.make_node("Abs", ["kept"], ["worked"]),
        helper.make_node("Unsqueeze", ["positions", "last"], ["places"]),
        helper.make_node("ScatterND", ["table", "places", "worked"], ["rows"]),
        helper.make_node("Reshape", ["rows", "stream_shape"], ["out"]),
        helper.make_node("Neg", ["out"], ["y"]),
    )
    x = np.random.default_rng(0).standard_normal(STREAM).astype(np.float32)
    before = run(model, x)
    drop_full_routing(model, {"index"})
    assert [node.op_type for node in model.graph.node] == ["Abs", "Neg"]
    np.testing.assert_array_equal(run(model, x), before)


def test_a_table_that_samples_share_is_expanded() -> None:
    model = graph(
        helper.make_node("Gather", ["shared", "index"], ["angles"]),
        helper.make_node("Add", ["x", "angles"], ["y"]),
    )
    drop_full_routing(model, {"index"})
    assert [node.op_type for node in model.graph.node] == ["Expand", "Add"]
    x = np.ones(STREAM, np.float32)
    np.testing.assert_array_equal(run(model, x), 1 + np.stack([CONSTANTS["shared"]] * SAMPLES))


def test_rows_of_a_longer_table_are_no_copy_of_it() -> None:
    model = graph(
        helper.make_node("Gather", ["longer", "index"], ["some"]),
        helper.make_node("Add", ["x", "some"], ["y"]),
    )
    with pytest.raises(UnsupportedModelError, match="changes a shape"):
        drop_full_routing(model, {"index"})
