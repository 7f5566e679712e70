"""What routing itself costs on ONNX Runtime CPU, and what is left of it when blocks share an index.

    python -m benchmarks.routing_overhead            # ten minutes on two quiet CPU cores
    python -m benchmarks.routing_overhead --smoke    # seconds, checks that it runs

The reference DiT is frozen at about 60 % of its MACs with spans of 1, 2 and 4 blocks
(``routing.share_index``), exported, and run in turns with the dense model in one process. For each span
length and number of threads the JSON holds the share of the dense time, the share of the dense MACs,
and their quotient (realised / implied speed-up); a profile of each graph says what its routing ops take.
``blocks`` is about one block of other sizes alone: its routing, in place and alone, as a share of the dense
block, and the keep ratio from which on routing pays.

Writes ``benchmarks/results/routing_overhead.json``.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import diffcr_compile as dcr
from benchmarks.speed.record import record_path, write_record
from benchmarks.speed.routing_parts import block_overhead
from diffcr_compile.bench import interleaved
from diffcr_compile.config import RoutingConfig
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program, with_batch
from diffcr_compile.reference import demo
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule, cost_of

# Kept tokens per routing unit: schedules like those that calibration finds, early blocks full.
COLUMNS = {
    1: (256, 256, 112, 144, 128, 144, 128, 160),
    2: (256, 112, 128, 160),
    4: (192, 144),
}
BLOCK_SIZES = [(192, 1024), (384, 256), (384, 1024), (1152, 256), (1152, 1024)]
ROUTING_OPS = ("TopK", "Gather", "ScatterND")


def frozen_programs() -> tuple[Program, dict[int, Program], dict[int, float]]:
    """The dense program, one frozen program per span length, and its share of the dense MACs."""
    programs, shares = {}, {}
    for length, column in COLUMNS.items():
        routed = dcr.route(
            demo.load_reference_dit(),
            demo.example_inputs(),
            RoutingConfig(share_index=length),
        )
        units = [spec.name for spec in routed.program.blocks]
        schedule = TokenSchedule(
            {unit: (kept,) for unit, kept in zip(units, column, strict=True)},
            dict.fromkeys(units, 256),
            TimestepBuckets.even(1),
        )
        costs = measure_costs(routed.program, 16, 0.125)
        shares[length] = cost_of(costs, schedule) / costs.dense
        programs[length] = dcr.freeze(routed, schedule=schedule)[0].program
    dense = dcr.freeze(routed, keep_ratio=1.0)[0].program
    return dense, programs, shares


def profiled_session(path: Path, threads: int, profile: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def arrays(batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "hidden_states": generator.standard_normal((batch, 1, 32, 32)).astype(np.float32),
        "timestep": np.full(batch, 500, np.float32),
        "class_labels": np.arange(batch, dtype=np.int64) % demo.NUM_CLASSES,
    }


def op_seconds(path: Path, threads: int, inputs: dict[str, np.ndarray], runs: int) -> Any:
    """Milliseconds per run of each kind of op, from ONNX Runtime's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = profiled_session(path, threads, Path(folder) / "profile")
        for _ in range(runs):
            profiled.run(None, inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    total: dict[str, float] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            total[event["args"]["op_name"]] += event["dur"] / 1000 / runs
    return {name: round(total[name], 3) for name in sorted(total, key=total.__getitem__)[::-1]}


def measure(
    paths: dict[str, Path],
    shares: dict[int, float],
    threads: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    inputs = arrays(args.batch)
    sessions = {name: make_session(path, threads=threads) for name, path in paths.items()}

    def run(name: str) -> None:
        for _ in range(args.runs):
            sessions[name].run(None, inputs)

    seconds = interleaved({n: lambda n=n: run(n) for n in sessions}, args.repeats)  # type: ignore[misc]
    rows = {}
    for length, share in shares.items():
        pairs = [
            c / d for c, d in zip(seconds[f"span_{length}"], seconds["dense"], strict=True)
        ]
        ops = op_seconds(paths[f"span_{length}"], threads, inputs, args.runs)
        rows[f"span_{length}"] = {
            "share_of_dense_time": statistics.median(pairs),
            "share_of_dense_time_min_max": [min(pairs), max(pairs)],
            "share_of_dense_macs": share,
            "realised_over_implied": share / statistics.median(pairs),
            "routing_ops_share_of_graph": sum(ops.get(op, 0) for op in ROUTING_OPS)
            / sum(ops.values()),
            "op_milliseconds": ops,
        }
    return {"threads": threads, "spans": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3, help="forwards per turn")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out = record_path("routing_overhead", args.out, args.smoke)
    if args.smoke:
        args.batch, args.repeats, args.runs = 1, 1, 1
    dense, programs, shares = frozen_programs()
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        every = {"dense": dense, **{f"span_{n}": p for n, p in programs.items()}}
        for name, program in every.items():
            paths[name] = Path(folder) / f"{name}.onnx"
            onnx.save(onnx_from_program(with_batch(program, args.batch)), paths[name])
        threads = [measure(paths, shares, count, args) for count in (1, 2)]
    sizes = [(64, 64)] if args.smoke else BLOCK_SIZES
    report: dict[str, Any] = {
        "model": demo.NAME,
        "batch": args.batch,
        "kept_tokens": {f"span_{n}": column for n, column in COLUMNS.items()},
        "measured": threads,
        "blocks": [
            block_overhead(*size, *((7, (0.95, 0.5)) if args.smoke else (40,)))
            for size in sizes
        ],
    }
    write_record(args.out, report)
    for part in threads:
        for name, row in part["spans"].items():
            print(
                f"{part['threads']} threads, {name}: {row['share_of_dense_time']:.3f} of the dense time, "
                f"{row['share_of_dense_macs']:.3f} of its MACs, realised / implied "
                f"{row['realised_over_implied']:.3f}, routing ops {row['routing_ops_share_of_graph']:.1%}"
            )
    for row in report["blocks"]:
        print(
            f"width {row['width']}, {row['tokens']} tokens: routing {row['routing_in_place']['share']:.2%} of the "
            f"dense block, pays from keep ratio {row['break_even_keep_ratio']:.3f} downwards"
        )


if __name__ == "__main__":
    main()
