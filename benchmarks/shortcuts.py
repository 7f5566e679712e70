"""What linear shortcuts of bypassed tokens bring, with no training, with routers alone, and with all weights trained.

    python -m benchmarks.shortcuts            # some two hours on one CPU core; goes on from its own record
    python -m benchmarks.shortcuts --smoke

As in ``benchmarks/held_out_error``: same start, states, budget and seed, once without and once with shortcuts of rank 16; the
schedule is solved with what the shortcuts cost. What counts is the squared error of the frozen graphs on rollouts that no
calibration saw, as a share of the dense output's square.

``time`` is what they cost in ONNX Runtime on one thread: the graph with every block at half of its tokens, with shortcuts and
without, run in turns in one process, as medians of the ratio pair by pair. Writes ``benchmarks/results/shortcuts.json``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

import diffcr_compile as dcr
from benchmarks.held_out_error import (
    HELD_OUT_SEED,
    extent,
    left_to_run,
    measured,
    options,
    recorded,
    settings_of,
    states,
)
from benchmarks.routing_overhead import arrays
from diffcr_compile.bench import interleaved
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import with_batch
from diffcr_compile.reference import demo
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.schedule import cost_of
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/shortcuts.json"
RANK = 16
HOW = {
    # diffcr compile --steps 0, with and without the schedule that measured errors give
    "no training": {"ratios": "errors", "resolves": 0, "steps": 0},
    "no training, uniform keep ratio": {"ratios": "uniform", "steps": 0},
    # the user's weights stay as they are
    "routers trained": {"ratios": "gradient", "train": "router"},
    "all weights trained": {"ratios": "gradient"},
}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each way: both means, and the error with shortcuts as a share of that without, seed by seed."""
    found: dict[str, Any] = {}
    errors = {(run["variant"], run["rank"], run["seed"]): run["error"] for run in runs}
    for how in dict.fromkeys(run["variant"] for run in runs):
        mine = {rank: _of(errors, how, rank) for rank in (0, RANK)}
        found[how] = {
            "without": _mean(mine[0]),
            "with": _mean(mine[RANK]),
            "ratio_by_seed": [
                mine[RANK][seed] / mine[0][seed]
                for seed in sorted(mine[0].keys() & mine[RANK])
            ],
        }
    return found


def _of(errors: dict[tuple[str, int, int], float], how: str, rank: int) -> dict[int, float]:
    return {
        seed: error for (name, r, seed), error in errors.items() if (name, r) == (how, rank)
    }


def _mean(errors: dict[int, float]) -> dict[str, float] | None:
    if not errors:
        return None
    values = errors.values()
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def time_ratio(repeats: int, batch: int = 2) -> dict[str, Any]:
    """Seconds and MACs of a graph with shortcuts over those of the same graph without."""
    runs, macs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for rank in (0, RANK):
            routed = dcr.route(
                demo.load_reference_dit(), demo.example_inputs(), {"shortcut_rank": rank}
            )
            frozen = dcr.freeze(routed, keep_ratio=0.5)[0].program
            costs = measure_costs(routed.program, 16, 0.125)
            assert frozen.schedule is not None
            macs[rank] = cost_of(costs, frozen.schedule)
            path = Path(folder) / f"{rank}.onnx"
            onnx.save(onnx_from_program(with_batch(frozen, batch)), path)
            session = make_session(path, threads=1)
            runs[str(rank)] = functools.partial(session.run, None, arrays(batch))
        seconds = interleaved(runs, repeats)
    pairs = [a / b for a, b in zip(seconds[str(RANK)], seconds["0"], strict=True)]
    return {
        "pairs": len(pairs),
        "median": statistics.median(pairs),
        "quartiles": statistics.quantiles(pairs, n=4)[::2],
        "macs": macs[RANK] / macs[0],
    }


def main() -> None:
    parser = options(__doc__, RESULTS)
    parser.add_argument("--only", default="*", help="ways that match, as in 'no training*'")
    parser.add_argument("--time", action="store_true", help="only what they cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scale, seeds, budgets = extent(args.smoke)
    found = {} if args.smoke else recorded(args.out, scale)
    timed = json.loads(args.out.read_text()).get("time") if args.out.exists() else None
    if args.time or args.smoke:
        timed = time_ratio(3 if args.smoke else 200)
        print("time", timed, flush=True)

    def write() -> None:
        report = {
            "scale": dataclasses.asdict(scale),
            "rank": RANK,
            "budgets": {b: {"summary": summary(p["runs"]), **p} for b, p in found.items()},
            "time": timed,
            "environment": environment(),
            "date": time.strftime("%Y-%m-%d"),
        }
        if not args.smoke:
            write_json_atomic(args.out, report)

    write()
    if args.time:
        return
    seen, unseen = states(scale.trajectories, 0), states(scale.held_out, HELD_OUT_SEED)
    cases = [
        {"variant": how, "rank": rank, "seed": seed}
        for seed in seeds
        for how in fnmatch.filter(HOW, args.only)
        for rank in (0, RANK)
    ]
    for budget, case, runs in left_to_run(found, budgets, cases, args):
        # fp32, because a CPU without bfloat16 instructions has no fast kernels for it
        calibration = {"precision": "fp32", **HOW[case["variant"]]}
        chosen = {"routing": {"shortcut_rank": case["rank"]}, "calibration": calibration}
        config = settings_of(chosen, case["seed"], scale)
        runs.append({**case, **measured(config, budget, seen, unseen)})
        print(budget, runs[-1], flush=True)
        write()
    print(json.dumps({b: summary(part["runs"]) for b, part in found.items()}, indent=1))


if __name__ == "__main__":
    main()
