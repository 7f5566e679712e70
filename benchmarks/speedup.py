"""Realised against MACs-implied speed-up: dense and compressed in turns, in one process.

    python -m benchmarks.speedup                     # every size that is not in the JSON yet; an hour on one core
    python -m benchmarks.speedup --smoke --out x.json
    python -m benchmarks.speedup --sizes 384x1024x1  # width x tokens x batch, again

An untrained DiT with a uniform keep ratio in every block, single-threaded, on ONNX Runtime CPU, torch eager and, at two sizes,
torch.compile, in seconds of the processor. Dense is the user's own module, or its plain ``torch.onnx.export``. At a keep ratio of 0.25 the dense model runs
on a quarter of the tokens too: what the machine itself makes of so few rows, with no routing at all. Writes
``benchmarks/results/speedup.json``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.models import dit_inputs, new_dit, routed_dit
from benchmarks.speed.plain import plain_onnx
from benchmarks.speed.record import read_record, record_path, write_record
from diffcr_compile.block_graphs import frozen_at
from diffcr_compile.export.onnx_model import export_graph
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program, rebuild_call
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.timing import in_turns

KEEP_RATIOS = (0.75, 0.5, 0.25)
WIDTHS, TOKENS, BATCHES = (192, 384, 1152), (256, 1024, 4096), (1, 2)
COMPILED = {(384, 256, 1), (384, 1024, 1)}
BOUND, BOUND_RATIO = "fewer tokens", 0.25  # half of the grid's side
Size = tuple[int, int, int]
Run = Callable[[], object]


def blocks_of(tokens: int) -> int:
    return 6 if tokens < 4096 else 2


def measure_size(
    size: Size, rounds: int, stability: float, ratios: tuple[float, ...] = KEEP_RATIOS
) -> list[dict[str, Any]]:
    """A row for every backend and keep ratio."""
    width, tokens, batch = size
    model, routed = routed_dit(width, blocks_of(tokens), tokens, batch)
    frozen = {
        ratio: frozen_at(routed, {b.name: round(ratio * tokens) for b in routed.blocks})
        for ratio in ratios
    }
    costs = measure_costs(routed, tokens // 4, 0.25)
    shares = {
        ratio: (
            costs.outer + sum(costs.at(b.name, round(ratio * tokens)) for b in routed.blocks)
        )
        / costs.dense
        for ratio in ratios
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = onnx_runs(model, frozen, tokens, batch, Path(folder))
        rows += compared("onnxruntime", size, runs, shares, rounds, stability)
        del runs
    runs = torch_runs(model, frozen, tokens, batch)
    rows += compared("torch", size, runs, shares, rounds, stability)
    if size in COMPILED:
        runs = torch_runs(model, frozen, tokens, batch, compiled=True)
        rows += compared("torch.compile", size, runs, shares, rounds, stability)
    return rows


def onnx_runs(
    model: torch.nn.Module,
    frozen: Mapping[float, Program],
    tokens: int,
    batch: int,
    folder: Path,
) -> dict[str, Run]:
    inputs = {name: value.numpy() for name, value in dit_inputs(tokens, batch).items()}
    plain_onnx(model, dit_inputs(tokens, batch), folder / "dense.onnx")
    with WeightsWriter(folder / "weights.bin") as writer:
        for ratio, program in frozen.items():
            graph, _ = export_graph(program, writer)
            writer.externalize(graph)
            (folder / f"{ratio}.onnx").write_bytes(graph.SerializeToString())
    names = {"dense": "dense.onnx", **{str(r): f"{r}.onnx" for r in frozen}}
    sessions = {n: make_session(folder / file, threads=1) for n, file in names.items()}
    runs: dict[str, Run] = {n: (lambda s=s: s.run(None, inputs)) for n, s in sessions.items()}  # type: ignore[misc]
    if BOUND_RATIO in frozen:
        small, few = smaller(model, tokens, batch)
        plain_onnx(small, few, folder / "few.onnx")
        arrays = {name: value.numpy() for name, value in few.items()}
        session = make_session(folder / "few.onnx", threads=1)
        runs[BOUND] = lambda: session.run(None, arrays)
    return runs


def smaller(
    model: torch.nn.Module, tokens: int, batch: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The dense model for images with a quarter of the tokens, and its inputs."""
    width = model.inner_dim
    few = round(BOUND_RATIO * tokens)
    assert isinstance(width, int)
    return new_dit(width, blocks_of(tokens), few), dit_inputs(few, batch)


def torch_runs(
    model: torch.nn.Module,
    frozen: Mapping[float, Program],
    tokens: int,
    batch: int,
    compiled: bool = False,
) -> dict[str, Run]:
    inputs = dit_inputs(tokens, batch)
    modules: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {"dense": (model, inputs)}
    for ratio, program in frozen.items():
        module = program.module.eval()
        modules[str(ratio)] = (module, rebuild_call(program.signature, program.example))

    if BOUND_RATIO in frozen and not compiled:
        modules[BOUND] = smaller(model, tokens, batch)

    def run(module: Any, call: dict[str, Any]) -> None:
        with torch.inference_mode():
            module(**call)

    ready = {
        name: (torch.compile(module, fullgraph=True) if compiled else module, call)
        for name, (module, call) in modules.items()
    }
    return {n: (lambda m=m, c=c: run(m, c)) for n, (m, c) in ready.items()}  # type: ignore[misc]


def compared(
    backend: str,
    size: Size,
    runs: Mapping[str, Run],
    shares: Mapping[float, float],
    rounds: int,
    stability: float,
) -> list[dict[str, Any]]:
    # one thread on a machine that others use too: seconds of the processor, not of the wall
    timings = in_turns(runs, "dense", stability, rounds, clock=time.process_time)
    rows = []
    for ratio, share in shares.items():
        found = timings[str(ratio)]
        rows.append(
            {
                "backend": backend,
                **dict(zip(("width", "tokens", "batch"), size, strict=True)),
                "blocks": blocks_of(size[1]),
                "keep_ratio": ratio,
                "macs_share": share,
                "macs_implied": 1 / share,
                "realised": 1 / found.share,
                "error": found.error / found.share,
                "realised_over_implied": share / found.share,
                "fewer_tokens": 1 / timings[BOUND].share
                if BOUND in timings and ratio == BOUND_RATIO
                else None,
                "clock": "processor",
                "rounds": len(found.seconds),
                "dense_milliseconds": 1000 * sorted(timings["dense"].seconds)[0],
            }
        )
    return rows


def sizes(text: str | None, smoke: bool, done: set[Size]) -> list[Size]:
    if smoke:
        return [(64, 64, 1)]
    if text:
        return [tuple(map(int, part.split("x"))) for part in text.split(",")]  # type: ignore[misc]
    every = sorted(
        itertools.product(WIDTHS, TOKENS, BATCHES), key=lambda s: s[0] * s[1] * s[2]
    )
    return [size for size in every if size not in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", help="such as 384x1024x1,192x256x2")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--stability", type=float, default=0.01)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out = record_path("speedup", args.out, args.smoke)
    torch.set_num_threads(1)
    rows = read_record(args.out)["rows"] if args.out.exists() and not args.smoke else []
    done = {(row["width"], row["tokens"], row["batch"]) for row in rows}
    for size in sizes(args.sizes, args.smoke, done):
        if args.smoke:
            found = measure_size(size, 7, 0.5, KEEP_RATIOS[:1])
        else:
            found = measure_size(size, args.rounds, args.stability)
        same = dict(zip(("width", "tokens", "batch"), size, strict=True))
        rows = [row for row in rows if any(row[k] != v for k, v in same.items())] + found
        write_record(args.out, {"threads": 1, "rows": rows})
        for row in found:
            print(
                f"{row['backend']:13} {size} keep {row['keep_ratio']}: {row['realised']:.2f} x, MACs imply "
                f"{row['macs_implied']:.2f} x, {row['realised_over_implied']:.3f} ± {row['error']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
