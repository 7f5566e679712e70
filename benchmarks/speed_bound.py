"""What the sampling loop gains at 60 % of the MACs, and what it gains where whole blocks are left out.

    python -m benchmarks.speed_bound out            # out/ from `diffcr demo`; three minutes on two CPU cores

Leaving blocks out costs no router, no gather and no scatter, and all work in a block goes with the MACs, so it bounds
from above what any routing of tokens can gain at these MACs on this machine. Dense and compressed loops take
turns in one process. Writes ``benchmarks/results/speed_bound.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import diffcr_compile as dcr
from diffcr_compile import bench
from diffcr_compile.budgets import cost_table
from diffcr_compile.config import make_config
from diffcr_compile.export.artifact import export_dense
from diffcr_compile.manifest import read_manifest
from diffcr_compile.program import with_batch
from diffcr_compile.reference import demo
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule, cost_of
from diffcr_compile.stages import captured, routed_program
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/speed_bound.json"
BLOCKS_LEFT = (
    5,
    5,
    5,
    4,
)  # of 8 in each of four timestep buckets: just under 60 % of the MACs
WAYS = ((2, 1), (1, 2))  # threads of a loop, loops side by side


def left_out(out: Path, batch: int) -> float:
    """An artifact without some blocks, and its share of the dense MACs."""
    config = make_config({"routing": {"skip_blocks": True}})
    model = demo.load_reference_dit()
    dense = with_batch(captured(model, demo.example_inputs(), config.routing), batch)
    routed = routed_program(dense, config.routing, 0)
    tokens = {spec.name: spec.num_tokens for spec in routed.blocks}
    kept = {
        name: tuple(tokens[name] if number < left else 0 for left in BLOCKS_LEFT)
        for number, name in enumerate(tokens)
    }
    schedule = TokenSchedule(kept, tokens, TimestepBuckets.even(len(BLOCKS_LEFT)))
    costs = cost_table(routed, config.routing)
    dcr.export(dcr.freeze(routed.module, schedule=schedule), out)
    (out / "baseline").mkdir()
    export_dense(dense, out / "baseline/dense.onnx")
    return cost_of(costs, schedule) / costs.dense


def measured(folder: Path, share: float, steps: int, repeats: int) -> dict[str, Any]:
    timesteps = [1000 - 1000 / steps * i for i in range(steps)]
    loops = [bench.sampling_loops(folder, timesteps, repeats, t, n) for t, n in WAYS]
    return {
        "macs_share": share,
        "macs_implied": 1 / share,
        "loops": loops,
        "realised_over_implied": [loop["onnxruntime_cpu_loop"] * share for loop in loops],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="folder that `diffcr demo` made")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.artifact)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "left_out"
        share = left_out(out, bench.batch_of(manifest))
        result = {
            "routed": measured(
                arguments.artifact,
                manifest.budget["reached"],
                arguments.steps,
                arguments.repeats,
            ),
            "blocks_left_out": measured(out, share, arguments.steps, arguments.repeats),
            "environment": environment(),
            "date": time.strftime("%Y-%m-%d"),
        }
    arguments.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    for name in ("routed", "blocks_left_out"):
        row = result[name]
        print(name, f"MACs imply {row['macs_implied']:.3f}", *(
            f"threads {loop['conditions']['threads']} x loops {loop['conditions']['loops']}: "
            f"{loop['onnxruntime_cpu_loop']:.3f}" for loop in row["loops"]
        ))  # fmt: skip


if __name__ == "__main__":
    main()
