"""Does the cheap estimator of the ratios' gradient learn as well as the paper's: `boundary` against `two_bin`.

    python -m benchmarks.estimators            # some ten minutes on one CPU core
    python -m benchmarks.estimators --smoke

Same start, states, steps and budget; only the estimator differs. A seed is that of routers, batches and order.
What counts is the error of the frozen graphs on rollouts that no calibration saw, as a share of the dense model's
output. Writes ``benchmarks/results/estimators.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import diffcr_compile as dcr
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.program import DiTGraph, run_flat
from diffcr_compile.reference import demo
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/estimators.json"
ESTIMATORS = ("boundary", "two_bin")
BUDGET = 0.6
SAMPLER_STEPS = 8
HELD_OUT_SEED = 999
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Scale:
    steps: int = 160
    batch: int = 16
    trajectories: int = 64
    held_out: int = 16


SMOKE = Scale(steps=4, batch=4, trajectories=4, held_out=2)


def settings(estimator: str, seed: int, scale: Scale) -> CompileConfig:
    return make_config(
        {
            "calibration": {
                "estimator": estimator,
                "seed": seed,
                "steps": scale.steps,
                "batch": scale.batch,
                "optimizer": "muon",
                "lr_weights": 1.2e-3,
                "precision": "bf16",
            }
        }
    )


def states(count: int, seed: int) -> TeacherStates:
    """Every state of `count` sampling runs of the dense model."""
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs())
    rollouts = make_config(
        {"rollouts": {"trajectories": count, "batch": min(count, 16)}}
    ).rollouts
    sampler = dcr.FlowEuler(SAMPLER_STEPS)
    return roll_out(routed.program, sampler, rollouts, demo.draw_labels, seed)


@torch.no_grad()
def error(graphs: tuple[DiTGraph, ...], unseen: TeacherStates) -> float:
    """Squared error of the frozen graphs over the squared size of the dense model's answers."""
    schedule = graphs[0].program.schedule
    assert schedule is not None
    off = size = 0.0
    for bucket, rows in enumerate(unseen.by_bucket(schedule.buckets)):
        inputs = {name: tensor[rows] for name, tensor in unseen.inputs.items()}
        found = run_flat(graphs[bucket].program, inputs)[0]
        off += (found - unseen.target[rows]).square().sum().item()
        size += unseen.target[rows].square().sum().item()
    return off / size


def calibrated(
    estimator: str, seed: int, scale: Scale, seen: TeacherStates, unseen: TeacherStates
) -> dict[str, Any]:
    config = settings(estimator, seed, scale)
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs(), config.routing, seed)
    start = time.process_time()
    result = dcr.calibrate(routed, seen, budget=BUDGET, config=config)
    spent = time.process_time() - start
    frozen = dcr.freeze(routed, schedule=result.schedule)
    # adjacent buckets with one schedule become one graph
    assert len(frozen) == len(result.schedule.merged().buckets)
    return {
        "estimator": estimator,
        "seed": seed,
        "error": error(frozen, unseen),
        "macs_share": result.schedule.reached,
        "cpu_seconds": round(spent, 1),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range of each, and whether the ranges overlap."""
    found: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        errors = [run["error"] for run in runs if run["estimator"] == estimator]
        found[estimator] = {
            "mean": statistics.fmean(errors),
            "min": min(errors),
            "max": max(errors),
        }
    a, b = (found[estimator] for estimator in ESTIMATORS)
    found["boundary_over_two_bin"] = a["mean"] / b["mean"]
    found["ranges_overlap"] = a["min"] <= b["max"] and b["min"] <= a["max"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scale, seeds = (SMOKE, SEEDS[:1]) if args.smoke else (Scale(), SEEDS)
    seen, unseen = states(scale.trajectories, 0), states(scale.held_out, HELD_OUT_SEED)
    runs = []
    for seed in seeds:
        for estimator in ESTIMATORS:
            runs.append(calibrated(estimator, seed, scale, seen, unseen))
            print(runs[-1], flush=True)
    report = {
        "budget": BUDGET,
        "scale": dataclasses.asdict(scale),
        "summary": summary(runs),
        "runs": runs,
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(report["summary"], indent=1))
    if not args.smoke:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
