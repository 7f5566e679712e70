"""What engines need of memory: estimates from the graph, against TensorRT-RTX and against numbers by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffcr_compile.engine_plan import plan_engines
from diffcr_compile.errors import ArtifactError
from diffcr_compile.export.activation_memory import activation_bytes, write_activations
from diffcr_compile.export.device.memory import (
    ACTIVATIONS,
    FIXED_ACTIVATION,
    MemoryNeed,
    memory_need,
    read_activations,
    verdicts,
)
from diffcr_compile.manifest import read_manifest
from tests import device_artifact as small


def chain(path: Path) -> Path:
    """x (4, 8) -> Relu -> Reshape -> MatMul with (8, 100) -> Relu -> MatMul with (100, 8) -> y."""
    weights = [
        numpy_helper.from_array(np.ones((8, 100), np.float32), "a"),
        numpy_helper.from_array(np.ones((100, 8), np.float32), "b"),
        numpy_helper.from_array(np.array([4, 8]), "shape"),
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),  # 128 bytes
        helper.make_node("Reshape", ["r", "shape"], ["v"]),  # the same bytes
        helper.make_node("MatMul", ["v", "a"], ["m"]),  # 1600 bytes
        helper.make_node("Relu", ["m"], ["n"]),  # 1600 bytes
        helper.make_node("MatMul", ["n", "b"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", [values[0]], [values[1]], weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, str(path))
    return path


def test_a_value_lives_until_its_last_reader_and_a_view_costs_nothing(tmp_path: Path) -> None:
    # Largest: m and n together. r is gone by then, x and y belong to the caller.
    assert activation_bytes(chain(tmp_path / "chain.onnx")) == 1600 + 1600


def attention(path: Path, tokens: int) -> Path:
    shape = [2, 4, tokens, 16]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkvy"]
    turned = helper.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2])
    scale = numpy_helper.from_array(np.float32(0.25), "scale")
    nodes = [
        turned,
        helper.make_node("MatMul", ["q", "t"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", values[:3], values[3:], [scale])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, str(path))
    return path


def test_fused_attention_keeps_no_score_matrix(tmp_path: Path) -> None:
    path = attention(tmp_path / "attention.onnx", 64)
    scores, turned = 4 * 2 * 4 * 64 * 64, 4 * 2 * 4 * 64 * 16
    assert activation_bytes(path) == max(turned + scores, 2 * scores)
    assert activation_bytes(path, fused=True) == turned


def blocks(path: Path, count: int, tokens: int, width: int = 32, heads: int = 4) -> Path:
    """A stack of attention and feed-forward over x (2, tokens, width), residuals included."""
    generator = np.random.default_rng(0)
    shape, split = [2, tokens, width], np.array([2, tokens, heads, width // heads])
    constants = [
        numpy_helper.from_array(split, "split"),
        numpy_helper.from_array(np.array(shape), "joined"),
        numpy_helper.from_array(np.float32(0.35), "scale"),
    ]
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def product(x: str, name: str, rows: int, columns: int) -> str:
        weight = generator.standard_normal((rows, columns)).astype(np.float32) / rows
        constants.append(numpy_helper.from_array(weight, f"{name}_w"))
        return add("MatMul", [x, f"{name}_w"], name)

    x = "x"
    for n in range(count):
        parts = []
        for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            flat = product(x, f"{part}{n}", width, width)
            rows = add("Reshape", [flat, "split"], f"{part}r{n}")
            parts.append(add("Transpose", [rows], f"{part}t{n}", perm=perm))
        scores = add("MatMul", parts[:2], f"scores{n}")
        scaled = add("Mul", [scores, "scale"], f"scaled{n}")
        shares = add("Softmax", [scaled], f"shares{n}", axis=-1)
        mixed = add("MatMul", [shares, parts[2]], f"mixed{n}")
        turned = add("Transpose", [mixed], f"turned{n}", perm=[0, 2, 1, 3])
        joined = add("Reshape", [turned, "joined"], f"flat{n}")
        x = add("Add", [x, product(joined, f"o{n}", width, width)], f"a{n}")
        wide = add("Relu", [product(x, f"up{n}", width, 4 * width)], f"wide{n}")
        last = "y" if n == count - 1 else f"x{n}"
        x = add("Add", [x, product(wide, f"down{n}", 4 * width, width)], last)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", [values[0]], [values[1]], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(("count", "tokens"), [(1, 64), (4, 256), (2, 1024)])
def test_the_estimate_bounds_what_tensorrt_rtx_reports(
    tmp_path: Path, count: int, tokens: int
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    path = blocks(tmp_path / "graph.onnx", count, tokens)
    found, living = reported(trt, path), activation_bytes(path)
    # A small graph is fused further than a large one, and sizes are rounded up to pages.
    assert 0.4 * living <= found - FIXED_ACTIVATION <= 1.1 * living, (living, found)


def reported(trt: Any, path: Path) -> int:
    """``Total Activation Memory`` in the builder's log."""
    lines: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None
    (line,) = (line for line in lines if line.startswith("Total Activation Memory"))
    (size,) = re.findall(r"(\d+) bytes", line)
    return int(size)


def test_the_need_counts_weights_once_per_engine_and_scratch_memory_once(
    tmp_path: Path,
) -> None:
    out = small.write(tmp_path / "out")
    manifest = read_manifest(out)
    assert read_activations(out) == []  # an artifact of an older version
    write_activations(out, [bucket["onnx"] for bucket in manifest.buckets])
    sizes = read_activations(out)
    assert len(sizes) == 4
    assert sizes == [2112] * 4  # two of (2, 16, 8) in float32, and a scale per sample
    weights = (out / "onnx/weights.bin").stat().st_size
    tensors = 2 * (2 * 16 * 8 * 4) + 2 * 4 + 2 * 8
    scratch = FIXED_ACTIVATION + max(sizes)
    apart = memory_need(manifest, plan_engines(manifest, "per_bucket"), sizes)
    shared = memory_need(manifest, plan_engines(manifest, "profiles"), sizes)
    assert (apart.loaded, shared.loaded) == (
        3 * weights + scratch + tensors,
        weights + scratch + tensors,
    )
    assert apart.swapped == shared.loaded
    assert apart.build == round(3.3 * weights) + scratch + tensors


def test_a_damaged_file_of_estimates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / ACTIVATIONS).write_text('[{"plain": "x"}]')
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_activations(tmp_path)


@pytest.mark.parametrize(
    ("available", "swap", "words"),
    [
        (None, 0, []),
        (10_000, 0, []),
        (3_000, 0, ["the build will be killed"]),
        (3_000, 500, []),
        (2_000, 9_000, ["Load with swap=True"]),
        (1_000, 9_000, ["even with swap=True"]),
        (1_000, 0, ["the build will be killed", "even with swap=True"]),
    ],
)
def test_what_does_not_fit_is_said_with_the_way_out(
    available: int | None, swap: int, words: list[str]
) -> None:
    need = MemoryNeed(weights=1000, copies=2, activations=100, tensors=10, build=3400)
    found = verdicts(need, available, swap)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))
