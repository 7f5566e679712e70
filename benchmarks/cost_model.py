"""Latency of schedules as predicted from the block table, against what is measured.

    python -m benchmarks.cost_model
    python -m benchmarks.cost_model --smoke --out x.json

The table is what ``diffcr bench MODEL --table`` writes. Schedules are random, uniform, and early blocks full; each is run
in turns with the dense model. Writes ``benchmarks/results/cost_model.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.models import dit_inputs, routed_dit
from benchmarks.speed.record import record_path, write_record
from diffcr_compile.block_graphs import frozen_at
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import UsageError
from diffcr_compile.export.onnx_model import export_graph
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.latency_bench import measure_latency
from diffcr_compile.latency_table import LatencyTable, latency_costs
from diffcr_compile.macs import levels_of_blocks
from diffcr_compile.program import Program
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.timing import in_turns
from diffcr_compile.schedule import CostTable

Column = dict[str, int]
ATTEMPTS = 5


def columns(levels: Mapping[str, tuple[int, ...]], count: int) -> dict[str, Column]:
    """Schedules by name, one timestep bucket each."""
    generator = np.random.default_rng(0)
    found = {
        f"random {number}": {b: int(generator.choice(every)) for b, every in levels.items()}
        for number in range(count)
    }
    found["uniform"] = {b: every[len(every) // 2] for b, every in levels.items()}
    half = len(levels) // 2
    found["late blocks least"] = {
        b: every[-1] if number < half else every[0]
        for number, (b, every) in enumerate(levels.items())
    }
    return found


def measure(
    width: int, blocks: int, tokens: int, rounds: int, count: int, steps: int = 8
) -> dict[str, Any]:
    """Predictions and measurements of a model, each block at `steps` numbers of kept tokens at most."""
    _, routed = routed_dit(width, blocks, tokens, 1)
    config = RoutingConfig(multiple_of=tokens // steps, min_keep_ratio=max(0.25, 1 / steps))
    levels = levels_of_blocks(routed, config.multiple_of, config.min_keep_ratio)
    table, costs, refused = measured_costs(routed, config, levels, rounds)
    wanted = columns(levels, count)
    measured = shares(routed, wanted, tokens, rounds)
    rows = []
    for name, column in wanted.items():
        predicted = (
            costs.outer + sum(costs.at(b, k) for b, k in column.items())
        ) / costs.dense
        rows.append(
            {
                "schedule": name,
                "kept_tokens": list(column.values()),
                "predicted_share": predicted,
                "measured_share": measured[name],
                "off": predicted / measured[name] - 1,
            }
        )
    return {
        "width": width,
        "blocks": blocks,
        "tokens": tokens,
        "tables_refused": refused,
        "stable": table.stable,
        "worst_error": table.worst_error,
        "rows": rows,
        "worst_off": max(abs(row["off"]) for row in rows),
    }


def measured_costs(
    routed: Program, config: RoutingConfig, levels: Mapping[str, tuple[int, ...]], rounds: int
) -> tuple[LatencyTable, CostTable, int]:
    """A table that serves, its costs, and how many were measured before that the package refuses."""
    for attempt in range(ATTEMPTS):
        found = measure_latency(routed, config, "DiT", threads=1, most_rounds=rounds)
        table = LatencyTable.model_validate(found)
        try:
            return table, latency_costs(table, levels, table.model.fingerprint), attempt
        except UsageError as error:
            print(error, flush=True)
    raise SystemExit("the machine is too busy for a latency table")


def shares(
    routed: Program, wanted: Mapping[str, Column], tokens: int, rounds: int
) -> dict[str, float]:
    """Time of each schedule as a share of the dense model's."""
    inputs = {n: v.numpy() for n, v in dit_inputs(tokens, 1).items()}
    every = {"dense": {b.name: b.num_tokens for b in routed.blocks}, **wanted}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with WeightsWriter(folder / "weights.bin") as writer:
            for number, column in enumerate(every.values()):
                graph, _ = export_graph(frozen_at(routed, column), writer)
                writer.externalize(graph)
                (folder / f"{number}.onnx").write_bytes(graph.SerializeToString())
        sessions = [make_session(folder / f"{n}.onnx", threads=1) for n in range(len(every))]
        runs = {
            label: (lambda s=s: s.run(None, inputs))  # type: ignore[misc]
            for label, s in zip(every, sessions, strict=True)
        }
        timings = in_turns(runs, "dense", 0.005, rounds)
    return {label: timing.share for label, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.out = record_path("cost_model", args.out, args.smoke)
    cases = [(64, 2, 64)] if args.smoke else [(384, 6, 1024), (192, 6, 256)]
    rounds, count, steps = (7, 1, 2) if args.smoke else (args.rounds, 4, 8)
    found = []
    for case in cases:
        found.append(measure(*case, rounds, count, steps))
        write_record(args.out, {"threads": 1, "cases": found})
    for row in found:
        print(
            f"width {row['width']}, {row['tokens']} tokens: worst prediction off by {row['worst_off']:.1%}"
        )


if __name__ == "__main__":
    main()
