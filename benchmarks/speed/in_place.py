"""What the routing of a block takes inside of its graph, from ONNX Runtime's profiler."""

from __future__ import annotations

import collections
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

ENDS = ("Gather", "ScatterND")


def routing_nodes(model: onnx.ModelProto) -> set[str]:
    """Router, TopK, what is made of its positions, and the gathers and the scatter that take them."""
    makers = {output: node for node in model.graph.node for output in node.output}
    found, positions = set(), set()
    for node in model.graph.node:
        if node.op_type == "TopK":
            score = makers.get(node.input[0])
            while score is not None:  # back to the product of the router
                found.add(score.name)
                score = (
                    None if score.op_type in ("MatMul", "Gemm") else makers.get(score.input[0])
                )
            positions.add(node.output[1])
            found.add(node.name)
        elif positions & set(node.input):
            found.add(node.name)
            if node.op_type not in ENDS:
                positions |= set(node.output)
    return found


def share_in_place(
    routed: Path, dense: Path, inputs: Mapping[str, Any], runs: int = 15
) -> dict[str, Any]:
    """Time of a block's routing as a share of the dense block's time; the two take turns."""
    nodes = routing_nodes(onnx.load(str(routed), load_external_data=False))
    times = profiles_in_turns([(routed, inputs), (dense, inputs)], runs)
    mine = {name: spent for name, spent in times[0].items() if name.split("/")[0] in nodes}
    return {
        "share": sum(mine.values()) / sum(times[1].values()),
        "milliseconds": dict(sorted(mine.items(), key=lambda item: -item[1])),
    }


def profiles_in_turns(
    graphs: Sequence[tuple[Path, Mapping[str, Any]]], runs: int
) -> list[dict[str, float]]:
    """Milliseconds of each node of each graph on its inputs, the median over runs that take turns."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = [_profiled(path, Path(folder) / path.stem) for path, _ in graphs]
        for _ in range(runs):
            for session, (_, inputs) in zip(sessions, graphs, strict=True):
                session.run(None, dict(inputs))
        return [_medians(Path(session.end_profiling())) for session in sessions]


def _profiled(path: Path, prefix: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _medians(profile: Path) -> dict[str, float]:
    """Milliseconds of each node, the median over runs."""
    seen: dict[str, list[float]] = collections.defaultdict(list)
    for event in json.loads(profile.read_text()):
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            seen[name.removesuffix("_kernel_time")].append(event["dur"] / 1000)
    return {name: statistics.median(found) for name, found in seen.items()}
