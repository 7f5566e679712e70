"""What a routed DiT takes more than the dense one on as few tokens, node by node.

    python -m benchmarks.routing_gap             # a minute
    python -m benchmarks.routing_gap --smoke

ONNX Runtime's profiler on one thread, at a keep ratio of 0.25 in every block, beside the dense model on a quarter of the tokens,
which routes nothing. Times of the profiler are larger than those of a run without it. Writes
``benchmarks/results/routing_gap.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from benchmarks.speed.in_place import profiles_in_turns, routing_nodes
from benchmarks.speed.models import dit_inputs, routed_dit
from benchmarks.speed.plain import plain_onnx
from benchmarks.speed.record import record_path, write_record
from benchmarks.speedup import BOUND_RATIO, Size, blocks_of, smaller
from diffcr_compile.block_graphs import frozen_at
from diffcr_compile.export.onnx_model import onnx_from_program

SIZES: tuple[Size, ...] = ((192, 256, 1), (192, 1024, 1), (192, 1024, 2), (384, 1024, 1))


def measure(size: Size, runs: int) -> dict[str, Any]:
    """Microseconds of a block's routing by operator, and of everything in both models."""
    width, tokens, batch = size
    model, routed = routed_dit(width, blocks_of(tokens), tokens, batch)
    few, few_inputs = smaller(model, tokens, batch)
    kept = {spec.name: round(BOUND_RATIO * tokens) for spec in routed.blocks}
    graph = onnx_from_program(frozen_at(routed, kept))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("routed.onnx", "few.onnx")]
        onnx.save(graph, paths[0])
        plain_onnx(few, few_inputs, paths[1])
        inputs = [_arrays(dit_inputs(tokens, batch)), _arrays(few_inputs)]
        mine, theirs = profiles_in_turns(list(zip(paths, inputs, strict=True)), runs)
    routing = by_operator(mine, routing_nodes(graph))
    return {
        **dict(zip(("width", "tokens", "batch"), size, strict=True)),
        "blocks": len(kept),
        "routing_per_block": {op: spent / len(kept) for op, spent in routing.items()},
        "routed": 1000 * sum(mine.values()),
        "fewer_tokens": 1000 * sum(theirs.values()),
        "outside_of_routing": 1000 * (sum(mine.values()) - sum(theirs.values()))
        - sum(routing.values()),
    }


def by_operator(milliseconds: Mapping[str, float], names: set[str]) -> dict[str, float]:
    """Microseconds of the nodes with these names; a node is called after its operator and a number."""
    found: Counter[str] = Counter()
    for node, spent in milliseconds.items():
        name = node.split("/")[0]
        if name in names:
            found[name.split("_")[0]] += 1000 * spent  # type: ignore[assignment]
    return dict(found)


def _arrays(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out = record_path("routing_gap", args.out, args.smoke)
    torch.set_num_threads(1)
    rows = [measure((64, 64, 1), 3)] if args.smoke else [measure(s, args.runs) for s in SIZES]
    write_record(args.out, {"keep_ratio": BOUND_RATIO, "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
