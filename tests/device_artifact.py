"""A small artifact with engines in mind: four timestep buckets, three sets of kept tokens, both modes.

Bucket b keeps KEPT[b] of 16 tokens of the one block ``a``: output = x + mean(kept tokens @ W) + table[label],
times (1 + t / 1000). The graphs are written by hand, so that nothing of the compiler is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from diffcr_compile.durable import atomic_write_bytes, write_json_atomic
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.manifest import Manifest, hash_files, write_manifest

KEPT = (4, 8, 6, 8)
EDGES = (0.0, 250.0, 500.0, 750.0, 1000.0)
BATCH, TOKENS, WIDTH = 2, 16, 8
LENGTH = "kept_a"
INPUTS = [
    {"name": "x", "dtype": "float32", "shape": [BATCH, TOKENS, WIDTH]},
    {"name": "t", "dtype": "float32", "shape": [BATCH]},
    {"name": "label", "dtype": "int64", "shape": [BATCH]},
]
_KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "w": generator.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "table": generator.standard_normal((10, WIDTH)).astype(np.float32),
    }


def graph(kept: int | None) -> onnx.ModelProto:
    """The graph that keeps `kept` tokens, or as many as its input ``kept_a`` is long."""
    constants = [
        numpy_helper.from_array(np.array(v, np.int64), n)
        for n, v in (("zero", [0]), ("one", [1]), ("last", [1, 2]))
    ]
    constants += [numpy_helper.from_array(v, n) for n, v in weights().items()]
    constants += [
        numpy_helper.from_array(np.float32(v), n) for n, v in (("u", 1), ("h", 1e-3))
    ]
    nodes = [helper.make_node("Shape", [LENGTH], ["k"])] if kept is None else []
    if kept is not None:
        constants.append(numpy_helper.from_array(np.array([kept]), "k"))
    nodes += [
        helper.make_node("Slice", ["x", "zero", "k", "one"], ["head"]),
        helper.make_node("MatMul", ["head", "w"], ["product"], name="matmul_a"),
        helper.make_node("ReduceMean", ["product", "one"], ["mean"], keepdims=1),
        helper.make_node("Add", ["x", "mean"], ["routed"]),
        helper.make_node("Gather", ["table", "label"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "one"], ["rows"]),
        helper.make_node("Add", ["routed", "rows"], ["sum"]),
        helper.make_node("Mul", ["t", "h"], ["time"]),
        helper.make_node("Add", ["time", "u"], ["scale"]),
        helper.make_node("Unsqueeze", ["scale", "last"], ["scales"]),
        helper.make_node("Mul", ["sum", "scales"], ["output"]),
    ]
    inputs = [
        helper.make_tensor_value_info(i["name"], _KINDS[i["dtype"]], i["shape"])
        for i in INPUTS
    ]
    if kept is None:
        inputs.append(helper.make_tensor_value_info(LENGTH, TensorProto.FLOAT, ["K"]))
    shape = [BATCH, TOKENS, WIDTH]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)]
    made = helper.make_graph(nodes, "main_graph", inputs, outputs, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def call(timestep: float, seed: int = 1) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "x": generator.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32),
        "t": np.full(BATCH, timestep, np.float32),
        "label": np.array([3, 7]),
    }


def expected(inputs: dict[str, Any], bucket: int) -> np.ndarray:
    """What the graph of a bucket computes, in numpy."""
    w, table = weights().values()
    mean = (inputs["x"][:, : KEPT[bucket]] @ w).mean(axis=1, keepdims=True)
    total = inputs["x"] + mean + table[inputs["label"]][:, None]
    result: np.ndarray = total * (1 + inputs["t"] / 1000)[:, None, None]
    return result.astype(np.float32)


def write(folder: Path) -> Path:
    """Write the artifact into a folder that is empty or does not exist."""
    graphs: list[str] = []
    with WeightsWriter(folder / "onnx/weights.bin") as writer:
        for bucket, kept in enumerate(KEPT):
            path = f"onnx/bucket_{KEPT.index(kept):02d}.onnx"
            graphs.append(path)
            if KEPT.index(kept) == bucket:
                _write_graph(writer, folder / path, graph(kept))
        _write_graph(writer, folder / "onnx/profiles_00.onnx", graph(None))
    for bucket in range(len(KEPT)):
        inputs = call((EDGES[bucket] + EDGES[bucket + 1]) / 2)
        tensors = {f"input.{k}": v for k, v in inputs.items()}
        tensors["output.output"] = expected(inputs, bucket)
        atomic_write_bytes(folder / f"golden/bucket_{bucket:02d}.safetensors", save(tensors))
    atomic_write_bytes(folder / "model/schedule.json", b"{}\n")
    nodes = {"matmul_a": "a.to_q"}
    graph_names = [*dict.fromkeys(graphs), "onnx/profiles_00.onnx"]
    write_json_atomic(folder / "model/node_map.json", dict.fromkeys(graph_names, nodes))
    write_manifest(folder, _manifest(folder, graphs))
    return folder


def _write_graph(writer: WeightsWriter, path: Path, model: onnx.ModelProto) -> None:
    writer.externalize(model)
    atomic_write_bytes(path, model.SerializeToString())


def _manifest(folder: Path, graphs: list[str]) -> Manifest:
    return Manifest(
        created="2026-01-01T00:00:00+00:00",
        model={"name": "small", "revision": None, "parameters": 144},
        versions={},
        inputs=INPUTS,
        outputs=[{"name": "output", "dtype": "float32", "shape": [BATCH, TOKENS, WIDTH]}],
        timestep_input="t",
        sample_input="x",
        buckets=[
            {
                "index": b,
                "low": EDGES[b],
                "high": EDGES[b + 1],
                "weight": 0.25,
                "onnx": graphs[b],
                "golden": f"golden/bucket_{b:02d}.safetensors",
            }
            for b in range(len(KEPT))
        ],
        weights="onnx/weights.bin",
        schedule={"a": list(KEPT)},
        num_tokens={"a": TOKENS},
        budget={"metric": "macs", "asked": 0.5, "reached": 0.5},
        parity={"tolerance": 1e-4, "measure": "max_abs"},
        files=hash_files(folder),
        stages={"export": "done"},
        profile_graphs=[
            {
                "onnx": "onnx/profiles_00.onnx",
                "buckets": list(range(len(KEPT))),
                "kept_inputs": {LENGTH: "a"},
                "remark": "",
            }
        ],
    )
