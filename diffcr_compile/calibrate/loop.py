"""The calibration fine-tune: learn ratios while the budget falls, solve, settle at the schedule.

With ``ratios: gradient`` (the default):

1. *Learn* (the first 1 - settle of the steps): the budget ramps from 1 down to what was asked;
   ratios are projected onto it after each step.
2. *Solve*: the real ratios become integers, exactly under the budget.
3. *Settle*: train on at that schedule, in the very graph that will be exported.

With ``ratios: errors`` the schedule is solved before the first step, over a table of measured errors;
the model is led there from all tokens kept, and most steps train at it.

Each step takes states of one timestep bucket only, so K is one number per block and no sample is
treated on its own; the buckets take turns. All randomness comes from (seed, step), so a run that
was killed goes on exactly as if it had not been.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.calibrate.error_table import measure_errors, relative_errors
from diffcr_compile.calibrate.ratios import RatioLearner
from diffcr_compile.calibrate.state import (
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from diffcr_compile.calibrate.warm_start import warm_start_routers
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.errors import DiffCRError, PreconditionError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.program import DiTGraph, Program, Stage, run_flat
from diffcr_compile.schedule import (
    CostTable,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
    solve_least,
    solve_schedule,
)

WARM_START_STATES = 128
WARMUP_STEPS = 20
Report = Callable[[dict[str, Any], int], None]


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """What a calibration learned. The weights themselves are in the routed program.

    Attributes:
        keep_ratios: (blocks, buckets), as learned, before they became integers.
        schedule: the integers that the model was settled at; says asked and reached.
        costs: what each block costs at each number of kept tokens.
        history: one record per step: loss, budget, reached, mean keep ratio, seconds.
        explained: per block, how much of the residual's size the warm start explains.
    """

    keep_ratios: KeepRatios
    schedule: TokenSchedule
    costs: CostTable
    history: tuple[dict[str, float], ...]
    explained: dict[str, float]


def run_calibration(
    program: Program,
    states: TeacherStates,
    config: CalibrationConfig,
    costs: CostTable,
    buckets: TimestepBuckets,
    budget: float,
    *,
    folder: Path | None = None,
    key: str = "",
    report: Report | None = None,
) -> CalibrationResult:
    """Learn keep ratios, routers and, if asked, all weights of a ROUTED program, in place.

    The weights are copied first if they are to be trained: the user's model stays as it is.

    Args:
        program: ROUTED.
        states: inputs and the dense model's outputs.
        config: steps, rates and what is trained.
        costs: from ``macs.measure_costs``.
        buckets: timestep buckets.
        budget: share of the dense MACs in (0, 1].
        folder: where the resumable state and history.jsonl are kept; None for none.
        key: fingerprint of everything that the result depends on.
        report: called after each step with the step's record and the number of steps.

    Raises:
        BudgetError: the budget cannot be reached; raised before the first step.
        DiffCRError: the loss became NaN or infinite; the last good state is kept.
    """
    if program.stage != Stage.ROUTED:
        raise PreconditionError(
            f"calibration needs a ROUTED program, got {program.stage.name}"
        )
    check_budget(costs, budget)
    by_bucket = states.by_bucket(buckets)
    if config.train == "all":
        own_weights(
            program.module
        )  # first of all: it replaces the modules that others hold on to
    run = _Run(
        program,
        states,
        config,
        RatioLearner(program, costs, buckets, two_bin=config.estimator == "two_bin"),
    )
    learn_steps = config.steps - round(config.settle * config.steps)
    saved = load_state(folder, key) if folder else None
    if saved:
        run.restore(*saved)
    else:
        run.warm_start(by_bucket)
        if config.ratios == "errors":
            run.solve_by_errors(budget, by_bucket)
    started = time.monotonic()
    for step in range(run.done, config.steps):
        if step >= learn_steps and run.schedule is None:
            run.solve(budget)
        bucket = step % len(buckets)
        progress = min(1.0, (step + 1) / max(1.0, config.ramp * learn_steps))
        target = 1 - (1 - budget) * progress
        loss = run.train_step(step, bucket, target, progress, by_bucket[bucket])
        record = {
            "step": step + 1,
            "bucket": bucket,
            "loss": loss,
            "budget": max(target, budget),
            "reached": run.reached,
            "mean_keep_ratio": float(run.learner.values.mean()),
            "seconds": time.monotonic() - started,
        }
        run.history.append(record)
        run.done = step + 1
        if folder and (run.done % config.save_every == 0 or run.done == config.steps):
            run.save(folder, key)
        if report:
            report(record, config.steps)
    if run.schedule is None:
        run.learner.project(budget)
        run.solve(budget)
    return run.finish(folder)


class _Run:
    """One calibration under way."""

    def __init__(
        self,
        program: Program,
        states: TeacherStates,
        config: CalibrationConfig,
        learner: RatioLearner,
    ) -> None:
        self.program, self.states, self.config, self.learner = program, states, config, learner
        # While ratios are learned, two_bin needs its second branch; at a fixed schedule nobody does.
        self.learning = (
            run_passes(program, [BlendTwoBins()]) if config.estimator == "two_bin" else program
        )
        self.trained = _trained_parameters(program, config)
        self.optimizer = _optimizer(self.trained, config)
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.batched = batched_inputs(program)
        self.schedule: TokenSchedule | None = None
        self.learned: KeepRatios | None = None
        self.history: list[dict[str, float]] = []
        self.explained: dict[str, float] = {}
        self.done = 0
        self.reached = 1.0  # share of the dense MACs that the last step ran at

    def warm_start(self, by_bucket: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        each = max(1, WARM_START_STATES // len(by_bucket))
        chosen = torch.cat(
            [
                rows[torch.randint(len(rows), (each,), generator=generator)]
                for rows in by_bucket
            ]
        )
        self.learner.keep_all()
        self.explained = warm_start_routers(
            self.program, self.states, chosen, self.config.batch
        )
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}

    def train_step(
        self, step: int, bucket: int, target: float, progress: float, rows: Tensor
    ) -> float:
        """One update of everything that is trained; returns the loss.

        Args:
            step: from 0.
            bucket: timestep bucket of this step's states.
            target: budget of this step.
            progress: how far the budget has come down, 1 when it is what was asked.
            rows: states of that bucket.
        """
        config, learner = self.config, self.learner
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = rows[torch.randint(len(rows), (config.batch,), generator=generator)]
        inputs, answer = self.states.take(chosen, self.batched)
        if self.schedule is None:
            learner.project(target)
            learner.attach(bucket)
            self.reached = learner.cost()
            program = self.learning
        elif progress < 1:  # solved before the first step: lead the model there
            learner.approach(self.schedule.ratios().values, target)
            learner.attach(bucket)
            self.reached = learner.cost()
            program = self.learning
        else:
            self._settle(self.schedule)
            learner.keep(self.schedule, bucket)
            program = self.program
        program.module.train()
        torch.manual_seed(config.seed * 1_000_003 + step)  # random routers and dropout
        loss = mse_loss(run_flat(program, inputs)[0].float(), answer.float())
        if not math.isfinite(loss.item()):
            raise DiffCRError(
                f"calibration step {step + 1}: the loss is {loss.item()}. The last saved state is kept; "
                "lower calibration.lr_weights or lr_router and run again."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        factor = _rate_factor(step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if self.trained:
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is None and config.ratios == "gradient":
            learner.step(bucket, config.lr_ratio)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                self.ema[name].lerp_(parameter, 1 - min(config.ema, (step + 1) / (step + 10)))
        return loss.item()

    def solve(self, budget: float) -> None:
        self.learner.project(budget)
        self.learned = self.learner.ratios()
        self._settle(
            solve_schedule(self.learned, self.learner.costs, self.learner.buckets, budget)
        )

    def solve_by_errors(self, budget: float, by_bucket: list[Tensor]) -> None:
        """Measure what fewer tokens cost in accuracy, and take the best schedule for the budget."""
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = [
            rows[torch.randint(len(rows), (self.config.batch,), generator=generator)]
            for rows in by_bucket
        ]
        costs = self.learner.costs
        errors = measure_errors(self.program, self.states, chosen, costs)
        relative = relative_errors(errors, costs)
        self._settle(solve_least(relative, costs, self.learner.buckets, budget))
        self.learned = self.learner.ratios()

    def _settle(self, schedule: TokenSchedule) -> None:
        self.schedule = schedule
        self.learner.values = schedule.ratios().values
        self.reached = self.learner.cost()

    def finish(self, folder: Path | None) -> CalibrationResult:
        """Put the averaged weights in, keep all tokens again, and say what was learned."""
        assert self.schedule is not None
        assert self.learned is not None
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.ema[name])
        self.learner.keep_all()
        self.program.module.eval()
        if folder:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            (folder / "history.jsonl").write_text(lines)
        return CalibrationResult(
            self.learned,
            self.schedule,
            self.learner.costs,
            tuple(self.history),
            self.explained,
        )

    def save(self, folder: Path, key: str) -> None:
        tensors = {
            **{f"weights.{n}": p.detach() for n, p in self.trained.items()},
            **{f"ema.{n}": p for n, p in self.ema.items()},
            **optimizer_tensors(self.optimizer),
            # The warm start is part of the result even where routers are not trained.
            **{f"router.{n}": p.detach() for n, p in _router_parameters(self.program).items()},
            "ratios": torch.from_numpy(self.learner.values),
            "momentum": torch.from_numpy(self.learner.momentum),
        }
        if self.learned is not None:
            tensors["learned"] = torch.from_numpy(self.learned.values)
        facts = {
            "key": key,
            "done": self.done,
            "history": self.history,
            "explained": self.explained,
            "schedule": self.schedule.to_json() if self.schedule else None,
        }
        # Tied parameters share memory, which safetensors refuses to write.
        save_state(folder, {n: t.clone() for n, t in tensors.items()}, facts)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for name, parameter in _router_parameters(self.program).items():
            parameter.copy_(tensors[f"router.{name}"])
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[f"weights.{name}"])
            self.ema[name] = tensors[f"ema.{name}"]
        restore_optimizer(self.optimizer, tensors)
        self.learner.values = tensors["ratios"].numpy()
        self.learner.momentum = tensors["momentum"].numpy()
        self.done, self.history, self.explained = (
            facts["done"],
            facts["history"],
            facts["explained"],
        )
        if facts["schedule"]:
            self.schedule = TokenSchedule.from_json(facts["schedule"])
            self.learned = KeepRatios(self.learner.names, tensors["learned"].numpy())
            self.reached = self.learner.cost()


def own_weights(module: DiTGraph) -> None:
    """Give a graph its own copy of every weight; weights that were shared inside it stay shared."""
    memo: dict[int, Any] = {}
    for name, child in list(module.named_children()):
        setattr(module, name, copy.deepcopy(child, memo))
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, copy.deepcopy(parameter, memo))


def _router_parameters(program: Program) -> dict[str, nn.Parameter]:
    return {
        f"{block}.{name}": parameter
        for block, router in program.module.routers.items()
        for name, parameter in router.named_parameters()
    }


def _trained_parameters(
    program: Program, config: CalibrationConfig
) -> dict[str, nn.Parameter]:
    if config.train == "ratio":
        return {}
    routers = {id(p) for p in _router_parameters(program).values()}
    return {
        name: parameter
        for name, parameter in program.module.named_parameters()
        if id(parameter) in routers or config.train == "all"
    }


def _optimizer(
    trained: dict[str, nn.Parameter], config: CalibrationConfig
) -> torch.optim.Optimizer:
    routers = [p for n, p in trained.items() if "_select.router." in n]
    chosen = {id(p) for p in routers}
    weights = [p for p in trained.values() if id(p) not in chosen]
    groups = [
        {"params": routers, "lr": config.lr_router, "base_lr": config.lr_router},
        {"params": weights, "lr": config.lr_weights, "base_lr": config.lr_weights},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]] or [{"params": [torch.zeros(1)], "base_lr": 0.0}],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )


def _rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
