"""Engines for a named compute capability, built by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from diffcr_compile.errors import EnvironmentMissingError, UnsupportedModelError, UsageError
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.export.rtx_build import build_rtx_engine
from diffcr_compile.export.weights import WEIGHTS_FILE, write_shared_weights
from tests.conftest import Case


def small_graph(node: onnx.NodeProto, width: int = 8, kept: int = 1) -> bytes:
    """One node from ``x`` (4, width) and, for a TopK, the constant ``k`` to ``y``."""
    is_top_k = "k" in node.input
    kind, shape = (
        (TensorProto.FLOAT, [4, kept]) if is_top_k else (TensorProto.INT64, [2, None])
    )
    graph = helper.make_graph(
        [node],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, width])],
        [helper.make_tensor_value_info("y", kind, shape)],
        [onnx.numpy_helper.from_array(np.array([kept]), "k")] if is_top_k else [],
    )
    opset = [helper.make_opsetid("", 20)]
    model: ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return bytes(model.SerializeToString())


def top_k(kept: int) -> bytes:
    return small_graph(helper.make_node("TopK", ["x", "k"], ["y", "i"]), 5000, kept)


def test_without_tensorrt_rtx_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EnvironmentMissingError, match=r"pip install .*\[rtx\]"):
        build_rtx_engine(top_k(3))


def test_a_frozen_graph_builds_for_sm86_with_its_weights_inside_or_beside_it(
    cases: Callable[..., Case], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    case = cases("dit")
    frozen = case.frozen(dict.fromkeys(case.names, 16))
    model = onnx_from_program(frozen)
    ops = {node.op_type for node in model.graph.node}
    assert {"TopK", "Gather", "ScatterND"} <= ops
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    inside = build_rtx_engine(model.SerializeToString(), "SM86")
    assert len(inside) > weights
    write_shared_weights({"graph.onnx": model}, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size > weights / 2
    assert (tmp_path / "graph.onnx").stat().st_size < weights
    beside = build_rtx_engine(tmp_path / "graph.onnx", "SM86")
    assert len(beside) > weights
    assert build_rtx_engine(tmp_path / "graph.onnx", "SM86") == beside


def test_an_op_that_the_parser_refuses_is_named() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UnsupportedModelError, match=r"parser .* refuses .*NonZero"):
        build_rtx_engine(small_graph(helper.make_node("NonZero", ["x"], ["y"])))


def test_a_top_k_that_the_parser_takes_and_the_builder_refuses_is_an_error() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert build_rtx_engine(top_k(3840))
    with pytest.raises(UnsupportedModelError, match=r"cannot build .* for SM86: .*3840"):
        build_rtx_engine(top_k(3841))


def test_a_failed_build_says_nothing_in_the_next_one() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UnsupportedModelError, match="3840"):
        build_rtx_engine(top_k(4000))
    with pytest.raises(UnsupportedModelError) as caught:
        build_rtx_engine(small_graph(helper.make_node("NonZero", ["x"], ["y"])))
    assert "3840" not in str(caught.value)
    assert build_rtx_engine(top_k(3))


@pytest.mark.parametrize("name", ["SM87", "sm86", "CURRENT", "NONE"])
def test_an_unknown_compute_capability_is_refused_with_the_known_ones(name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UsageError, match=rf"{name}.*SM86"):
        build_rtx_engine(top_k(3), name)


def test_bytes_that_are_no_onnx_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UnsupportedModelError, match=r"parser"):
        build_rtx_engine(b"no model")
    with pytest.raises(UsageError, match=r"missing\.onnx"):
        build_rtx_engine(tmp_path / "missing.onnx")
