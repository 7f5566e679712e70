"""The published recipe (You et al. 2025), written plainly.

Sigmoid gate on the kept tokens' residual, one ratio per block and timestep region as a clamped parameter
that starts at 1, both bracketing bins run and blended, and the loss of diffusion training on real images plus
lambda times the squared distance of the mean keep ratio from its target. No distillation.

What is generous here: learning rates are those of our calibration (with the published 1e-4 the ratios
would stay at 1 in so few steps), each batch comes from one region, and the learned ratios are made
integers by our solver, so that the schedule meets the budget in MACs.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import diffcr_compile as dcr
from benchmarks.quality.case import Case
from benchmarks.quality.tuned import Trainer, autocast, flow_batch
from diffcr_compile.budgets import cost_table
from diffcr_compile.calibrate.trained import own_weights
from diffcr_compile.config import RoutingConfig
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.program import Program, run_flat, selector_name
from diffcr_compile.routing import TokenSelector
from diffcr_compile.schedule import KeepRatios, TimestepBuckets
from diffcr_compile.solver import solve_schedule

LAMBDA = 0.3
SMALLEST, LARGEST = 0.1, 1.0
BINS = tuple(round(0.1 * i, 1) for i in range(1, 11))
RATE_RATIO = 0.02


def build(case: Case) -> Any:
    from benchmarks.quality.variants import Built, of_graphs, share_of

    recipe = Recipe(case)
    for step in range(case.scale.calibration_steps):
        recipe.train_step(step)
    graphs, schedule = recipe.frozen()
    costs = recipe.costs
    facts = {
        "schedule": {block: list(kept) for block, kept in schedule.kept_tokens.items()},
        "ratios_outside_their_range": int(
            ((recipe.ratios < SMALLEST) | (recipe.ratios > LARGEST)).sum()
        ),
        "final_flow_loss": sum(recipe.losses[-20:]) / len(recipe.losses[-20:]),
    }
    return Built(of_graphs(graphs), lambda n: share_of(schedule, costs, n), facts=facts)


class Recipe:
    """A training run of the published method.

    Args:
        case: the mean keep ratio aims at what costs its budget.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.budget = case.job.budget
        config = RoutingConfig(gate="paper")
        self.routed = case.routed(config)
        own_weights(self.routed)
        self.program: Program = self.routed.program
        self.blended = run_passes(self.program, [BlendTwoBins()])
        self.costs = cost_table(self.program, config)
        self.buckets = TimestepBuckets.even(config.buckets)
        self.selectors = [
            self.program.module.get_submodule(selector_name(spec.name))
            for spec in self.program.blocks
        ]
        ones = torch.ones(len(self.selectors), len(self.buckets), device=case.scale.device)
        self.ratios = nn.Parameter(ones)
        self.target = self._mean_ratio(self.budget)
        self.trainer = Trainer(
            dict(self.program.module.named_parameters()),
            [spec.name for spec in self.program.blocks],
            case.scale,
            [{"params": [self.ratios], "lr": RATE_RATIO, "base_lr": RATE_RATIO}],
        )
        self.losses: list[float] = []

    def train_step(self, step: int) -> None:
        bucket = step % len(self.buckets)
        low, high = (edge / 1000 for edge in self.buckets.ranges()[bucket])
        x, timestep, label, answer = flow_batch(self.case, step, (low, high))
        clamped = self.ratios.clamp(SMALLEST, LARGEST)
        for selector, ratio in zip(self.selectors, clamped[:, bucket], strict=True):
            assert isinstance(selector, TokenSelector)
            self._between_bins(selector, ratio)
        self.program.module.train()
        inputs = {"hidden_states": x, "timestep": timestep, "class_labels": label}
        with autocast(self.case.scale.device):
            velocity = run_flat(self.blended, inputs)[0]
        flow = mse_loss(velocity.float(), answer)
        loss = flow + LAMBDA * (clamped.mean() - self.target).square()
        loss.backward()
        self.trainer.update(step)
        self.losses.append(flow.item())

    def frozen(self) -> tuple[Any, Any]:
        """The graphs at the schedule nearest to the learned ratios that the budget allows, and it."""
        self.trainer.take_averages()
        names = tuple(spec.name for spec in self.program.blocks)
        values = self.ratios.detach().clamp(SMALLEST, LARGEST).double().cpu().numpy()
        schedule = solve_schedule(
            KeepRatios(names, values), self.costs, self.buckets, self.budget
        )
        for selector in self.selectors:
            selector.keep(selector.num_tokens)
        self.program.module.eval()
        return dcr.freeze(self.routed, schedule=schedule), schedule

    @staticmethod
    def _between_bins(selector: TokenSelector, ratio: Tensor) -> None:
        """Both bins around the ratio, and the weight of the larger one."""
        upper = min(max(bisect.bisect_left(BINS, ratio.item() - 1e-6), 1), len(BINS) - 1)
        low, high = BINS[upper - 1], BINS[upper]
        tokens = selector.num_tokens
        weight = (ratio - low) / (high - low)
        selector.keep_between(round(low * tokens), round(high * tokens), weight, two_bin=True)

    def _mean_ratio(self, budget: float) -> float:
        """The keep ratio that costs the budget where all blocks have the same."""
        low, high = SMALLEST, LARGEST
        for _ in range(40):
            middle = (low + high) / 2
            macs = self.costs.outer + sum(
                self.costs.interpolate(spec.name, middle)[0] for spec in self.program.blocks
            )
            low, high = (low, middle) if macs > budget * self.costs.dense else (middle, high)
        return low
