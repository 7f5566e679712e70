"""A half-precision ONNX graph with every half taken as float32, so that a CPU can be held to it exactly.

ONNX Runtime's CPU has hardly any float16 kernel. It computes in float32 and drops casts as it likes, so its
outputs on the graph itself agree with nothing to the last digits. On the widened graph they do. bfloat16 graphs it
does not run at all.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from diffcr_compile.manifest import Manifest

_HALF_KINDS = {"bf16": TensorProto.BFLOAT16}  # of all other precisions float16


@contextlib.contextmanager
def for_cpu(path: Path, manifest: Manifest) -> Iterator[Path]:
    """A file that ONNX Runtime's CPU runs: `path` itself, or of a bf16 graph a widened copy while the context lasts.

    Args:
        path: a graph of an artifact.
        manifest: of it.
    """
    if manifest.runs_on_cpu:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        widened = Path(folder) / path.name
        write_widened(path, widened, manifest.precision["type"])
        yield widened


def write_widened(path: Path, to: Path, precision: str = "fp16") -> None:
    """Write `path`, an ONNX file, to `to` with float32 in the place of halves; weights lie beside it."""
    model = onnx.load(path)  # with its weights
    widen(model, precision)
    to.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model, to, save_as_external_data=True, location=f"{to.name}.data", size_threshold=1024
    )


def widen(model: ModelProto, precision: str = "fp16") -> int:
    """Change the half type of a precision to float32 in place; return how many tensors, casts and values changed."""
    half = _HALF_KINDS.get(precision, TensorProto.FLOAT16)
    edits = 0
    for tensor in model.graph.initializer:
        edits += _widen_tensor(tensor, half)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == half:
                attribute.i = TensorProto.FLOAT
                edits += 1
            elif attribute.HasField("t"):
                edits += _widen_tensor(attribute.t, half)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            edits += 1
    return edits


def _widen_tensor(tensor: TensorProto, half: int) -> int:
    if tensor.data_type != half:
        return 0
    wide = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    return 1
