"""Quality at equal MACs on the reference DiT: learned routing against its controls.

    python -m benchmarks.quality_reference                 # an hour on two CPU cores
    python -m benchmarks.quality_reference --smoke         # seconds, checks that it runs
    python -m benchmarks.quality_reference --part 0/2      # and 1/2 beside it: one process a core

Variants, all calibrated alike (same states, steps, learning rates, all weights trained):

* ``learned``: routers and keep ratios learned by gradient (the demo);
* ``errors``: keep ratios from measured errors, measured once more on the trained model;
* ``errors_skipping``: the same, and blocks may be skipped in a timestep bucket;
* ``uniform``: routers learned, one keep ratio for all blocks and buckets (Mixture-of-Depths);
* ``random_router``: keep ratios learned, tokens chosen at random at every call.

Every variant is sampled from the same noise and labels. Writes
``benchmarks/results/quality_reference.json``; finished (variant, seed) pairs are kept in the
``--work`` folder, so an interrupted run goes on; what is missing is listed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffcr_compile as dcr
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.program import DiTGraph
from diffcr_compile.reference import demo
from diffcr_compile.reference.quality import METRIC, load_real_statistics, psnr_db, score
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/quality_reference.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "errors": {"calibration": {"ratios": "errors"}},
    "errors_skipping": {
        "routing": {"skip_blocks": True},
        "calibration": {"ratios": "errors"},
    },
    "uniform": {"calibration": {"ratios": "uniform"}},
    "random_router": {"routing": {"router": "random"}},
}


def settings(variant: str, seed: int, smoke: bool) -> CompileConfig:
    """The demo's settings with the variant's changes."""
    changes = VARIANTS[variant]
    data: dict[str, Any] = {
        name: {**demo.SETTINGS.get(name, {}), **changes.get(name, {})}
        for name in {*demo.SETTINGS, *changes}
    }
    data.setdefault("calibration", {})["seed"] = seed
    if smoke:
        data["calibration"].update({"steps": 4, "batch": 4})
        data["rollouts"] = {"trajectories": 4, "steps": 8}
    return make_config(data)


@torch.no_grad()
def sample(graphs: tuple[DiTGraph, ...], num_samples: int, steps: int) -> torch.Tensor:
    """Images of a frozen model, bucket chosen by timestep value."""
    schedule = graphs[0].program.schedule
    assert schedule is not None

    def denoise(
        hidden_states: np.ndarray, timestep: np.ndarray, class_labels: np.ndarray
    ) -> np.ndarray:
        graph = graphs[schedule.buckets.index_of(float(timestep[0]))]
        out = graph(
            hidden_states=torch.from_numpy(hidden_states),
            timestep=torch.from_numpy(timestep),
            class_labels=torch.from_numpy(class_labels),
        )
        return out.sample.numpy()

    torch.manual_seed(0)  # the random router's draws
    images, _ = demo.sample_images(denoise, num_samples, steps, batch=min(num_samples, 50))
    return torch.from_numpy(images)


def teacher_states(config: CompileConfig, work: Path) -> TeacherStates:
    """One set of rollouts for all variants and seeds."""
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs())
    folder = work / f"rollouts_{config.rollouts.trajectories}_{config.rollouts.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    sampler = dcr.FlowEuler(config.rollouts.steps)
    return roll_out(routed.program, sampler, config.rollouts, demo.draw_labels, 0, folder)


def run_variant(
    variant: str,
    seed: int,
    states: TeacherStates,
    args: argparse.Namespace,
    dense: torch.Tensor,
) -> dict[str, Any]:
    config = settings(variant, seed, args.smoke)
    started = time.monotonic()
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs(), config.routing, seed)
    result = dcr.calibrate(routed, states, budget=args.budget, config=config)
    calibrated = time.monotonic()
    graphs = dcr.freeze(routed, result)
    images = sample(graphs, args.samples, args.steps)
    labels = torch.arange(args.samples) % demo.NUM_CLASSES
    tail = result.history[-20:]
    return {
        "variant": variant,
        "seed": seed,
        "reached": result.schedule.reached,
        **score(images, labels),
        "psnr_to_dense_db": psnr_db(dense, images),
        "date": time.strftime("%Y-%m-%d"),
        "final_distillation_loss": statistics.fmean(r["loss"] for r in tail),
        "schedule": {b: list(k) for b, k in result.schedule.kept_tokens.items()},
        "calibration_seconds": round(calibrated - started, 1),
        "sampling_seconds": round(time.monotonic() - calibrated, 1),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (smallest, largest) over seeds of every figure of every variant."""
    table: dict[str, Any] = {}
    for variant in VARIANTS:
        mine = [run for run in runs if run["variant"] == variant]
        if not mine:
            continue
        figures = (
            "kid_x1000",
            "frechet",
            "class_accuracy",
            "psnr_to_dense_db",
            "reached",
            "final_distillation_loss",
        )
        table[variant] = {"seeds": len(mine)} | {
            name: {
                "mean": statistics.fmean(run[name] for run in mine),
                "min": min(run[name] for run in mine),
                "max": max(run[name] for run in mine),
            }
            for name in figures
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="60%")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10, help="Euler steps of the evaluation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/quality_reference"))
    parser.add_argument(
        "--part", default="0/1", help="i/n: every n-th job only, for n processes"
    )
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.samples, args.steps, args.seeds, args.work = 20, 4, 1, args.work / "smoke"
    args.work.mkdir(parents=True, exist_ok=True)

    states = teacher_states(settings("learned", 0, args.smoke), args.work)
    labels = torch.arange(args.samples) % demo.NUM_CLASSES
    routed = dcr.route(demo.load_reference_dit(), demo.example_inputs())
    dense_images = sample(dcr.freeze(routed, keep_ratio=1.0), args.samples, args.steps)
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    part, parts = map(int, args.part.split("/"))
    for variant, seed in jobs[part::parts]:
        path = args.work / f"{variant}_{seed}.json"
        if not path.exists():
            run = run_variant(variant, seed, states, args, dense_images)
            path.write_text(json.dumps(run))
            print({k: v for k, v in run.items() if k != "schedule"}, flush=True)
    paths = [args.work / f"{variant}_{seed}.json" for variant, seed in jobs]
    missing = [path.stem for path in paths if not path.exists()]
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    floor = load_real_statistics().floor(args.samples)
    report = {
        "metric": METRIC,
        "budget": args.budget,
        "conditions": {
            "num_samples": args.samples,
            "sampler": f"Euler, {args.steps} steps, no guidance, seed {demo.SAMPLE_SEED}",
            "labels": "classes in turn",
            "real_against_real_floor": floor,
            "seeds": args.seeds,
            "settings": settings("learned", 0, args.smoke).model_dump(),
        },
        "dense": score(dense_images, labels),
        "summary": summarise(runs),
        "missing": missing,
        "runs": runs,
        "environment": {**environment(), "cpu_threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
    }
    target = args.work / "quality_reference.json" if args.smoke else RESULTS
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(json.dumps({"dense": report["dense"], **report["summary"]}, indent=1, default=str))


if __name__ == "__main__":
    main()
