"""What a calibration leaves of the error at equal MACs: ours, the paper's estimator, controls that are trained, merging.

    python -m benchmarks.held_out_error            # some three minutes a run on one CPU core; goes on from its own record
    python -m benchmarks.held_out_error --smoke

Same start, states, steps, optimizer and budget. A seed is that of routers, batches and order. What counts is the error of
the frozen graphs on rollouts that no calibration saw, as a share of the dense model's output. It tells variants
apart that a distance between sets of pictures does not: the same states are compared, one by one.
Writes ``benchmarks/results/held_out_error.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffcr_compile as dcr
from benchmarks.quality import merging
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.program import DiTGraph, run_flat
from diffcr_compile.reference import demo
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/held_out_error.json"
FROM_ERRORS = {"ratios": "errors", "resolves": 1}
BY_GRADIENT, BY_ERRORS = "ours, ratios by gradient", "ours, ratios from measured errors"
WITH_SKIPPING = "ours, measured errors, blocks may be skipped"
OURS = (BY_ERRORS, WITH_SKIPPING, BY_GRADIENT)
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    BY_ERRORS: {"calibration": FROM_ERRORS},
    WITH_SKIPPING: {"routing": {"skip_blocks": True}, "calibration": FROM_ERRORS},
    BY_GRADIENT: {"calibration": {"ratios": "gradient"}},
    "two bins": {"calibration": {"ratios": "gradient", "estimator": "two_bin"}},
    "uniform (Mixture-of-Depths)": {"calibration": {"ratios": "uniform"}},
    "random router": {
        "routing": {"router": "random"},
        "calibration": {"ratios": "gradient"},
    },
    # all tokens or none, per timestep bucket, over measured errors
    "blocks dropped": {
        "routing": {"multiple_of": 256, "skip_blocks": True},
        "calibration": FROM_ERRORS,
    },
}
MERGED = "tokens merged (2-D ToMe), no training"
BUDGETS = (0.6, 0.42)
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


def settings(variant: str, seed: int, scale: Scale) -> CompileConfig:
    return settings_of(VARIANTS[variant], seed, scale)


def settings_of(
    chosen: Mapping[str, Mapping[str, Any]], seed: int, scale: Scale
) -> CompileConfig:
    """The common settings with those that a variant chooses."""
    calibration = {
        "seed": seed,
        "steps": scale.steps,
        "batch": scale.batch,
        "optimizer": "muon",
        "lr_weights": 1.2e-3,
        "precision": "bf16",
        **chosen.get("calibration", {}),
    }
    return make_config({"routing": chosen.get("routing", {}), "calibration": calibration})


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
    found = torch.empty_like(unseen.target)
    for bucket, rows in enumerate(unseen.by_bucket(schedule.buckets)):
        inputs = {name: tensor[rows] for name, tensor in unseen.inputs.items()}
        found[rows] = run_flat(graphs[bucket].program, inputs)[0]
    return share_of_square(found, unseen.target)


def share_of_square(found: Tensor, target: Tensor) -> float:
    """Squared error over the squared size of the target."""
    off, size = ((found - target).double().square().sum(), target.double().square().sum())
    return float(off / size)


def calibrated(
    variant: str,
    budget: float,
    seed: int,
    scale: Scale,
    seen: TeacherStates,
    unseen: TeacherStates,
) -> dict[str, Any]:
    return {
        "variant": variant,
        **measured(settings(variant, seed, scale), budget, seen, unseen),
    }


def measured(
    config: CompileConfig, budget: float, seen: TeacherStates, unseen: TeacherStates
) -> dict[str, Any]:
    """One calibration, and what it leaves of the error."""
    seed = config.calibration.seed
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs(), config.routing, seed)
    start = time.process_time()
    result = dcr.calibrate(routed, seen, budget=budget, config=config)
    spent = time.process_time() - start
    frozen = dcr.freeze(routed, schedule=result.schedule)
    # adjacent buckets with one schedule become one graph
    assert len(frozen) == len(result.schedule.merged().buckets)
    return {
        "seed": seed,
        "error": error(frozen, unseen),
        "macs_share": result.schedule.reached,
        "cpu_seconds": round(spent, 1),
    }


@torch.no_grad()
def merged(budget: float, seed: int, unseen: TeacherStates) -> dict[str, Any]:
    """Token merging, which nothing is trained for."""
    start = time.process_time()
    program = dcr.route(demo.load_reference_dit(), demo.example_inputs()).program
    left, share = merging.kept_for(program, budget)
    model = merging.merging_dit(demo.load_reference_dit(), left, seed)
    found = torch.empty_like(unseen.target)
    for row in range(len(found)):
        inputs = {name: tensor[row : row + 1] for name, tensor in unseen.inputs.items()}
        found[row] = model(**inputs).sample[0]
    return {
        "variant": MERGED,
        "seed": seed,
        "error": share_of_square(found, unseen.target),
        "macs_share": share,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each variant: mean and range, and against each of ours the mean of the seeds' ratios and whether all seeds agree."""
    found: dict[str, Any] = {}
    errors = {(run["variant"], run["seed"]): run["error"] for run in runs}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = {seed: error for (name, seed), error in errors.items() if name == variant}
        against = {}
        for ours in OURS:
            ratios = [mine[s] / errors[ours, s] for s in mine if (ours, s) in errors]
            if ratios and variant != ours:
                against[ours] = {
                    "ratio": statistics.fmean(ratios),
                    "worse_with_every_seed": min(ratios) > 1,
                }
        found[variant] = {
            "mean": statistics.fmean(mine.values()),
            "min": min(mine.values()),
            "max": max(mine.values()),
            "against": against,
        }
    return found


def recorded(path: Path, scale: Scale) -> dict[str, Any]:
    """Budgets with their runs, of an earlier time under the same settings."""
    data = json.loads(path.read_text()) if path.exists() else {}
    same = data.get("scale") == dataclasses.asdict(scale)
    budgets = data["budgets"] if same else {}
    return {budget: {"runs": part["runs"]} for budget, part in budgets.items()}


def options(doc: str, out: Path) -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--budget", type=float, help="only this one")
    parser.add_argument("--seed", type=int, help="only this one")
    return parser


def extent(smoke: bool) -> tuple[Scale, tuple[int, ...], tuple[float, ...]]:
    """Scale, seeds and budgets."""
    return (SMOKE, SEEDS[:1], BUDGETS[:1]) if smoke else (Scale(), SEEDS, BUDGETS)


def left_to_run(
    found: dict[str, Any],
    budgets: Sequence[float],
    cases: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
) -> Iterator[tuple[float, Mapping[str, Any], list[dict[str, Any]]]]:
    """Every case that was asked for and is not in the record: its budget, itself, and the list that its run goes into."""
    for budget, case in itertools.product(budgets, cases):
        runs = found.setdefault(str(budget), {"runs": []})["runs"]
        done = any(case.items() <= run.items() for run in runs)
        if done or args.budget not in (None, budget) or args.seed not in (None, case["seed"]):
            continue
        yield budget, case, runs


def main() -> None:
    args = options(__doc__, RESULTS).parse_args()
    torch.set_num_threads(1)
    scale, seeds, budgets = extent(args.smoke)
    found = {} if args.smoke else recorded(args.out, scale)
    seen, unseen = states(scale.trajectories, 0), states(scale.held_out, HELD_OUT_SEED)
    cases = [
        {"variant": variant, "seed": seed} for seed in seeds for variant in [*VARIANTS, MERGED]
    ]
    for budget, case, runs in left_to_run(found, budgets, cases, args):
        variant, seed = case["variant"], case["seed"]
        runs.append(
            merged(budget, seed, unseen)
            if variant == MERGED
            else calibrated(variant, budget, seed, scale, seen, unseen)
        )
        print(budget, runs[-1], flush=True)
        report = {
            "scale": dataclasses.asdict(scale),
            "budgets": {b: {"summary": summary(p["runs"]), **p} for b, p in found.items()},
            "environment": environment(),
            "date": time.strftime("%Y-%m-%d"),
        }
        if not args.smoke:
            write_json_atomic(args.out, report)
    print(json.dumps({b: summary(part["runs"]) for b, part in found.items()}, indent=1))


if __name__ == "__main__":
    main()
