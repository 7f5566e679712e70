"""One block alone: dense, routed at several keep ratios, and its routing with nothing in between."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed.in_place import share_in_place
from benchmarks.speed.models import routed_dit
from diffcr_compile.block_graphs import block_groups
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.macs import levels_of_blocks
from diffcr_compile.passes.graph_edit import argument, block_node
from diffcr_compile.program import Program
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.timing import in_turns

KEEP_RATIOS = (0.98, 0.95, 0.9, 0.75, 0.5, 0.25)
ALONE = 0.5  # keep ratio of the routing alone


def routing_only(block: Program) -> Program:
    """A FROZEN block alone whose work is left out: router, top-k, gather and scatter."""
    graph = block.copy_graph()
    (spec,) = block.blocks
    node = block_node(graph, spec.name)
    node.replace_all_uses_with(argument(node, spec.stream.path))
    graph.erase_node(node)
    return block.with_graph(graph)


def block_overhead(
    width: int, tokens: int, rounds: int, ratios: tuple[float, ...] = KEEP_RATIOS
) -> dict[str, Any]:
    """Shares of the dense block's time on ONNX Runtime CPU, one thread, batch 1."""
    _, routed = routed_dit(width, 2, tokens, 1)
    group = block_groups(routed, levels_of_blocks(routed, tokens // 4, 0.25))[0]
    programs = {
        "dense": group.at(tokens),
        "routing": routing_only(group.at(round(ALONE * tokens))),
    }
    programs |= {str(ratio): group.at(round(ratio * tokens)) for ratio in ratios}
    inputs = {n: t.numpy() for n, t in group.program.example.items()}
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, program in programs.items():
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(onnx_from_program(program).SerializeToString())
            session = make_session(path, threads=1)
            runs[name] = lambda s=session: s.run(None, inputs)
        timings = in_turns(runs, "dense", 0.002, rounds)
        files = (Path(folder) / f"{ALONE}.onnx", Path(folder) / "dense.onnx")
        inside = share_in_place(*files, inputs)
    shares = {str(ratio): timings[str(ratio)].share for ratio in ratios}
    return {
        "width": width,
        "tokens": tokens,
        "routing_in_place": inside,
        "routing_alone": timings["routing"].share,
        "error": timings["routing"].error,
        "share_by_keep_ratio": shares,
        "break_even_keep_ratio": break_even(shares),
        "dense_milliseconds": 1000 * min(timings["dense"].seconds),
    }


def break_even(shares: dict[str, float]) -> float:
    """The largest keep ratio at which a routed block takes no longer than the dense one, interpolated."""
    points = [(float(ratio), share) for ratio, share in shares.items()]
    above = None
    for ratio, share in sorted(points, reverse=True):
        if share <= 1:
            if above is None:
                return ratio
            high, more = above
            return ratio + (high - ratio) * (1 - share) / (more - share)
        above = ratio, share
    return 0.0
