"""A float16 ONNX graph with every float16 taken as float32, so that a CPU can be held to it exactly.

ONNX Runtime's CPU has hardly any float16 kernel. It computes in float32 and drops casts as it likes, so its
outputs on the graph itself agree with nothing to the last digits. On the widened graph they do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper


def write_widened(path: Path, to: Path) -> None:
    """Write `path`, an ONNX file, to `to` with float32 in the place of float16; weights lie beside it."""
    model = onnx.load(path)  # with its weights
    widen(model)
    to.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model, to, save_as_external_data=True, location=f"{to.name}.data", size_threshold=1024
    )


def widen(model: ModelProto) -> int:
    """Change float16 to float32 in place; return how many tensors, casts and values changed."""
    edits = 0
    for tensor in model.graph.initializer:
        edits += _widen_tensor(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
                edits += 1
            elif attribute.HasField("t"):
                edits += _widen_tensor(attribute.t)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            edits += 1
    return edits


def _widen_tensor(tensor: TensorProto) -> int:
    if tensor.data_type != TensorProto.FLOAT16:
        return 0
    wide = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    return 1
