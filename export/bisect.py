"""The first block whose output leaves the tolerance, in ONNX Runtime or in an engine.

ONNX Runtime gives what leaves every block in one run. An engine does not: a value that is asked for is a value that
is not fused away, and the mistake may vanish with the fusion. So engines are built of the first half of the
blocks, then of half of the half that is wrong: log2(blocks) builds, each fused as the whole is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto

from diffcr_compile.durable import passing_file, write_json_atomic
from diffcr_compile.errors import EnvironmentMissingError, one_line
from diffcr_compile.export.block_values import (
    BLOCK_VALUES,
    BlockValue,
    leaving,
    marks,
    read_block_values,
    to_json,
)
from diffcr_compile.export.golden import read_golden
from diffcr_compile.export.in_pieces import has_many_weights, run_in_pieces
from diffcr_compile.export.widened import for_cpu
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.complex_inputs import as_graph_input

Array = npt.NDArray[Any]
Run = Any  # (model, names of outputs, inputs) -> arrays
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Suspect:
    """The first value that is off.

    Attributes:
        bucket: the timestep bucket.
        block: that it leaves.
        node: that makes it.
        value: its name in the graph.
        rel_l2: how far it is off, to about a quarter; inf for NaN and infinite values.
        runs: executions that were needed.
    """

    bucket: int
    block: str
    node: str
    value: str
    rel_l2: float
    runs: int


def write_block_values(
    artifact: Path,
    graphs: Sequence[str],
    golden: Sequence[str],
    known: Mapping[str, Sequence[BlockValue]] | None = None,
    runnable: Callable[[str], Path] | None = None,
) -> None:
    """Write marks of what leaves the blocks of each graph at its golden inputs, in ONNX Runtime.

    Args:
        artifact: the artifact's folder, whose graphs were found right.
        graphs: path of the static graph of each bucket.
        golden: path of the golden file of each bucket.
        known: graph -> what :func:`block_values` found in an earlier run.
        runnable: graph -> the file that is run in its place; None for itself.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for graph, path in zip(graphs, golden, strict=True):
        if graph in found:
            continue
        if known and graph in known:
            found[graph] = to_json(known[graph])
            continue
        places = places_of_values(artifact, graph, load_graph(artifact / graph))
        inputs = read_golden(artifact / path)[0]
        file = runnable(graph) if runnable else artifact / graph
        arrays = run_with_outputs(file, load_graph(file), [p[1] for p in places], inputs)
        found[graph] = to_json(block_values(places, arrays))
    write_json_atomic(artifact / BLOCK_VALUES, found)


def places_of_values(
    artifact: Path, graph: str, model: ModelProto
) -> list[tuple[str, str, str]]:
    """(block, value, node) of each number that leaves a block of a graph."""
    maps = json.loads((artifact / "model/node_map.json").read_text(encoding="utf-8"))
    schedule = json.loads((artifact / "model/schedule.json").read_text(encoding="utf-8"))
    kinds = _kinds(model)
    places = leaving(model, maps[graph], list(schedule["kept_tokens"]))
    return [place for place in places if kinds.get(place[1]) in _FLOATS]


def block_values(
    places: Sequence[tuple[str, str, str]], arrays: Sequence[Array]
) -> list[BlockValue]:
    """Marks of values at their places.

    A value with infinite numbers in it, such as a mask that is added to attention scores, has no norm
    and is left out: what a block makes of it is there.
    """
    pairs = [
        (place, array)
        for place, array in zip(places, arrays, strict=True)
        if np.isfinite(array).all()
    ]
    return [
        BlockValue(*place, array.shape, array.dtype.name, *found)
        for (place, array), found in zip(
            pairs, marks([array for _, array in pairs]), strict=True
        )
    ]


def bisect_onnx(
    artifact: Path, manifest: Manifest, bucket: int, tolerance: float
) -> Suspect | None:
    """The first value in ONNX Runtime that is off by more than `tolerance`; None if none is."""
    graph = manifest.buckets[bucket]["onnx"]
    values = read_block_values(artifact)[graph]
    inputs, first = _inputs(artifact, manifest, graph)
    with for_cpu(artifact / graph, manifest) as file:
        arrays = run_with_outputs(file, load_graph(file), [v.value for v in values], inputs)
    for value, array in zip(values, arrays, strict=True):
        off = value.difference(array)
        if off > tolerance:
            return Suspect(first, value.block, value.node, value.value, off, 1)
    return None


def bisect_engine(
    artifact: Path,
    manifest: Manifest,
    bucket: int,
    tolerance: float,
    runtime: str = "tensorrt",
) -> Suspect | None:
    """The first block of an engine that is off by more than `tolerance`; None if none is.

    Raises:
        EnvironmentMissingError: there is no GPU, or no TensorRT.
    """
    from diffcr_compile.export.part_engine import run_part

    graph = manifest.buckets[bucket]["onnx"]
    values = read_block_values(artifact)[graph]
    blocks = list(dict.fromkeys(value.block for value in values))
    inputs, first = _inputs(artifact, manifest, graph)
    seen: dict[int, Suspect | None] = {}

    def worst(number: int) -> Suspect | None:
        """What is off among the values that leave one block."""
        if number not in seen:
            mine = [value for value in values if value.block == blocks[number]]
            arrays = run_part(artifact, manifest, graph, mine, inputs, runtime)
            offs = [
                (value.difference(a), value) for value, a in zip(mine, arrays, strict=True)
            ]
            off, value = max(offs, key=lambda pair: pair[0])
            seen[number] = (
                Suspect(first, value.block, value.node, value.value, off, 0)
                if off > tolerance
                else None
            )
        return seen[number]

    low, high = 0, len(blocks) - 1  # the first wrong one lies in [low, high]
    if worst(high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if worst(middle) else (middle + 1, high)
    found = worst(low)
    assert found is not None
    return dataclasses.replace(found, runs=len(seen))


def load_graph(path: Path) -> ModelProto:
    """A graph without its weights."""
    model: ModelProto = onnx.load(str(path), load_external_data=False)
    return model


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """The part of a graph that makes these values, which become its outputs."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    known = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    part = ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    needed, kept = set(names), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    nodes = list(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.output[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    graph.output.extend(known[name] for name in names)
    return part


def run_with_outputs(
    path: Path, model: ModelProto, names: Sequence[str], inputs: Mapping[str, Array]
) -> list[Array]:
    """Values of a graph in ONNX Runtime on the CPU.

    Args:
        path: of the graph, beside which its weights lie.
        model: the graph.
        names: of the values.
        inputs: of the graph.
    """
    if not names:
        return []
    if has_many_weights(model):
        given = {name: as_graph_input(array) for name, array in inputs.items()}
        return run_in_pieces(path, model, names, [given])[0]
    from diffcr_compile.export.parity import run_onnx

    part = with_outputs(model, names)
    used = {value.name for value in part.graph.input}
    # beside the weights, where ONNX Runtime looks for them
    with passing_file(path.parent, f"{path.stem}.", part.SerializeToString()) as file:
        return run_onnx(file, {k: v for k, v in inputs.items() if k in used})


def _inputs(artifact: Path, manifest: Manifest, graph: str) -> tuple[dict[str, Array], int]:
    """Golden inputs of the first bucket that runs a graph, which the marks were taken at, and its index."""
    first = next(b for b in manifest.buckets if b["onnx"] == graph)
    return read_golden(artifact / first["golden"])[0], int(first["index"])


def _kinds(model: ModelProto) -> dict[str, int]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # the library raises its own kinds
        raise EnvironmentMissingError(
            f"onnx cannot infer the shapes of a graph that it checked: {one_line(error)}. Install the pinned "
            "onnx."
        ) from error
    values = (*inferred.graph.value_info, *inferred.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}
