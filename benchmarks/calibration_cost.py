"""What a training step costs: the dense model, the `boundary` estimator, and the paper's two bins.

    python -m benchmarks.calibration_cost            # some ten minutes on one CPU core
    python -m benchmarks.calibration_cost --smoke

One process, the three taking turns, at keep ratios that meet the budget: forward, backward, clipping, optimizer
and moving averages. A turn is one step in every timestep bucket; ratios are taken turn by turn. The keep ratios
are drawn around the budget, each between two levels, as they are while they are learned. Writes
``benchmarks/results/calibration_cost.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import mse_loss

import diffcr_compile as dcr
from diffcr_compile.bench import interleaved
from diffcr_compile.budgets import cost_table
from diffcr_compile.calibrate.ratios import RatioLearner
from diffcr_compile.calibrate.trained import TrainedParameters, learning_mode, own_weights
from diffcr_compile.config import CalibrationConfig, RoutingConfig
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.program import run_flat
from diffcr_compile.reference import demo
from diffcr_compile.schedule import TimestepBuckets
from diffcr_compile.summary import environment

RESULTS = Path(__file__).parent / "results/calibration_cost.json"


class Stepper:
    """A routed model that is trained at ratios around a budget.

    Args:
        budget: share of the dense MACs; 1 for the dense model.
        batch: samples per step.
        two_bin: the paper's estimator instead of `boundary`.
    """

    def __init__(self, budget: float, batch: int, *, two_bin: bool) -> None:
        config = RoutingConfig()
        routed = dcr.route(demo.load_reference_dit(), demo.example_inputs(), config)
        self.program = routed.program
        own_weights(self.program.module)
        self.running = run_passes(self.program, [BlendTwoBins()]) if two_bin else self.program
        self.trained = TrainedParameters(self.program, CalibrationConfig())
        self.buckets = TimestepBuckets.even(config.buckets)
        costs = cost_table(self.program, config)
        self.learner = RatioLearner(self.program, costs, self.buckets, two_bin=two_bin)
        self.is_dense = budget == 1
        if not self.is_dense:
            shape = self.learner.values.shape
            self.learner.values = np.random.default_rng(0).uniform(0.4, 0.9, shape)
            self.learner.project(budget)
        self.inputs = {
            "hidden_states": torch.randn(batch, 1, 32, 32),
            "timestep": torch.linspace(1000, 1, batch),
            "class_labels": torch.arange(batch) % demo.NUM_CLASSES,
        }
        self.answer = torch.randn(batch, 1, 32, 32)
        self.step = 0

    def turn(self) -> None:
        """One step in every timestep bucket."""
        for bucket in range(len(self.buckets)):
            if self.is_dense:  # in evaluation mode a full block has no router
                self.running.module.eval()
            else:
                learning_mode(self.running.module)
                self.learner.attach(bucket)
            loss = mse_loss(run_flat(self.running, self.inputs)[0], self.answer)
            loss.backward()  # type: ignore[no-untyped-call]
            if not self.is_dense:
                self.learner.step(bucket, lr=0.0)
            self.trained.update(self.step)
            self.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.turns = 2, 1
    torch.set_num_threads(args.threads)
    report = measure(args.budget, args.batch, args.turns)
    if not args.smoke:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratios"], indent=1))


def measure(budget: float, batch: int, turns: int) -> dict[str, Any]:
    """Seconds and ratios of the three."""
    steppers = {
        "dense": Stepper(1.0, batch, two_bin=False),
        "boundary": Stepper(budget, batch, two_bin=False),
        "two_bin": Stepper(budget, batch, two_bin=True),
    }
    runs: dict[str, Callable[[], None]] = {n: s.turn for n, s in steppers.items()}
    seconds = interleaved(runs, turns)

    def ratio(one: str, other: str) -> dict[str, float]:
        pairs = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}

    return {
        "ratios": {
            "boundary / two_bin": ratio("boundary", "two_bin"),
            "boundary / dense": ratio("boundary", "dense"),
            "two_bin / dense": ratio("two_bin", "dense"),
        },
        "budget": budget,
        "macs_at_the_ratios": steppers["boundary"].learner.cost(),
        "batch": batch,
        "steps_per_turn": len(steppers["dense"].buckets),
        "seconds_per_turn": seconds,
        "environment": {**environment(), "cpu_threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
