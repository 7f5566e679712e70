"""Which budget to ask for, without training: errors at several budgets, predicted and measured.

Routers are set in closed form, every block is run at a few numbers of kept tokens, a schedule is solved for
each budget, and the model is run at it, on states that neither of these saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffcr_compile.attachments import prepared
from diffcr_compile.budgets import budget_costs
from diffcr_compile.calibrate.data import Conditions, TeacherStates, batched_inputs
from diffcr_compile.calibrate.error_table import measure_errors, relative_errors
from diffcr_compile.calibrate.latents import LatentStates
from diffcr_compile.calibrate.run import WARM_START_STATES
from diffcr_compile.calibrate.samplers import Sampler
from diffcr_compile.calibrate.warm_start import warm_start
from diffcr_compile.config import CompileConfig
from diffcr_compile.errors import UsageError
from diffcr_compile.opened import ExampleInputs, PipelineInputs, open_model
from diffcr_compile.program import Program, run_flat, with_batch
from diffcr_compile.schedule import CostTable, Floats, Metric, TimestepBuckets, TokenSchedule
from diffcr_compile.solver import solve_least
from diffcr_compile.stages import (
    Data,
    Event,
    captured,
    even_buckets,
    routed_program,
    teacher_states,
)

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclasses.dataclass(frozen=True)
class Option:
    """One budget.

    Attributes:
        schedule: solved for it; says asked and reached.
        predicted_error: sum over blocks of their own errors, see `measured_error`.
        measured_error: mean squared difference of the output from the dense model's, as a share of the
            output's mean square, averaged over the sampling steps. Nothing was trained yet.
    """

    schedule: TokenSchedule
    predicted_error: float
    measured_error: float

    @property
    def cost(self) -> float:
        """Share of the dense model's cost."""
        assert self.schedule.reached is not None
        return self.schedule.reached

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": self.schedule.asked,
            "reached": self.cost,
            "predicted_error": self.predicted_error,
            "measured_error": self.measured_error,
            "predicted_speedup": 1 / self.cost,
            "kept_tokens": {block: list(k) for block, k in self.schedule.kept_tokens.items()},
        }


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """The options that were tried, dearest first.

    Attributes:
        options: of every reachable budget.
        unreachable: the budgets below `smallest`.
        smallest: the smallest reachable budget.
        metric: what the budgets are shares of.
        states: how many states each error was measured on.
    """

    options: tuple[Option, ...]
    unreachable: tuple[float, ...]
    smallest: float
    metric: Metric
    states: int

    @property
    def knee(self) -> Option:
        """Where the share saved is furthest ahead of the share of the largest error (Kneedle's rule)."""
        saved = np.array([1 - option.cost for option in self.options])
        error = np.array([option.measured_error for option in self.options])
        ahead = saved / max(saved.max(), 1e-12) - error / max(error.max(), 1e-30)
        return self.options[int(ahead.argmax())]

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "options": [option.to_json() for option in self.options],
            "knee": self.knee.schedule.asked,
            "unreachable": list(self.unreachable),
            "smallest_budget": self.smallest,
            "states": self.states,
        }


@dataclasses.dataclass(frozen=True)
class Work:
    """What a suggestion would run.

    Attributes:
        blocks: routed blocks.
        trajectories: rollouts of the dense sampler, of `steps` steps each; of a pipeline its runs.
        steps: sampling steps.
        batches: forward passes of at most `batch` states for the table and the options.
        batch: states per timestep bucket and forward pass.
    """

    blocks: int
    trajectories: int
    steps: int
    batches: int
    batch: int


def suggest(
    model: Any,
    example_inputs: ExampleInputs | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    data: Data = None,
    config: CompileConfig | None = None,
    sampler: Sampler | None = None,
    conditions: Conditions | None = None,
    pipeline_inputs: PipelineInputs = None,
    component: str | None = None,
    progress: Event | None = None,
) -> Suggestion:
    """Errors and costs at several budgets, without training; the model stays as it is.

    Args:
        model: any DiT, or a pipeline of diffusers.
        example_inputs: as for ``dcr.route``.
        budgets: shares of the dense model's cost in (0, 1].
        data: as for ``dcr.calibrate``.
        config: settings; ``budget`` says what costs are.
        sampler: for rollouts.
        conditions: for rollouts.
        pipeline_inputs: of a pipeline: the keyword arguments of its call.
        component: of a pipeline: the name of the denoiser, where there are several.
        progress: called with (stage, done, all, figures).

    Raises:
        UsageError: no budget is reachable; names the smallest.
    """
    config = config or CompileConfig()
    _check_answers(data, config)
    program, runs = routed_for(model, example_inputs, config, pipeline_inputs, component)
    costs = budget_costs(program, config)
    given = runs if data is None else data
    states = teacher_states(program, given, config, sampler, conditions, None, progress)
    buckets = states.buckets or even_buckets(config.routing)
    return compare_budgets(program, states, config, costs, buckets, budgets, progress)


def _check_answers(data: Data, config: CompileConfig) -> None:
    """Errors are measured against the dense model's own answers, so that at all tokens kept they are none."""
    if config.rollouts.substeps > 1:
        raise UsageError(
            f"rollouts.substeps = {config.rollouts.substeps} is for a calibration, which learns to take larger steps; suggest "
            "measures errors against the dense model, without training. Set it to 1 here (--set rollouts.substeps=1).",
            code="DCR-U076",
        )
    if isinstance(data, LatentStates) and data.true_share > 0:
        raise UsageError(
            f"LatentStates.true_share = {data.true_share:g} is for a calibration, which learns from the data too; suggest "
            "measures errors against the dense model. Set it to 0 here.",
            code="DCR-U063",
        )


def routed_for(
    model: Any,
    example_inputs: ExampleInputs | None,
    config: CompileConfig,
    pipeline_inputs: PipelineInputs = None,
    component: str | None = None,
) -> tuple[Program, Any]:
    """The ROUTED program, and the pipeline's runs where there are some."""
    model, example_inputs, runs = open_model(
        model, example_inputs, pipeline_inputs, component, config.rollouts.steps
    )
    ready = prepared(model, config.routing.fuse_adapters)
    dense = with_batch(
        captured(ready, example_inputs, config.routing, model), config.export.batch
    )
    return routed_program(dense, config.routing, config.calibration.seed), runs


def work_of(program: Program, config: CompileConfig, budgets: int, pipeline: bool) -> Work:
    """What :func:`suggest` would run, from the settings alone."""
    rollouts, buckets = config.rollouts, config.routing.buckets
    probes = 5  # see error_table.PROBES, and all tokens
    return Work(
        len(program.blocks),
        rollouts.pipeline_runs if pipeline else rollouts.trajectories,
        rollouts.steps,
        buckets * (1 + len(program.blocks) * probes + budgets),
        config.calibration.batch,
    )


def compare_budgets(
    program: Program,
    states: TeacherStates,
    config: CompileConfig,
    costs: CostTable,
    buckets: TimestepBuckets,
    budgets: Sequence[float],
    progress: Event | None = None,
) -> Suggestion:
    """Solve a schedule for each budget over measured errors, and measure it on other states."""
    smallest = costs.smallest_budget()
    reachable = sorted({b for b in budgets if b >= smallest}, reverse=True)
    if not reachable or not all(0 < b <= 1 for b in budgets):
        raise UsageError(
            f"budgets must be shares in [{smallest:.1%}, 100%] of the dense {costs.unit}, got "
            f"{[f'{b:.0%}' for b in budgets]}; {smallest:.1%} is the smallest reachable",
            code="DCR-U063",
        )
    batch, seed = config.calibration.batch, config.calibration.seed
    states = states.where(program)
    seen, unseen = split_states(states.by_bucket(buckets), batch, seed)
    warm = torch.cat([rows[: max(1, WARM_START_STATES // len(seen))] for rows in seen])
    warm_start(program, states, warm, batch)
    errors = measure_errors(program, states, seen, costs)
    weighed = relative_errors(errors, costs)
    options = []
    for number, budget in enumerate(reachable):
        schedule = solve_least(weighed, costs, buckets, budget)
        predicted = _predicted(errors, costs, schedule, _squares(states, seen))
        measured = measured_error(program, states, unseen, schedule)
        options.append(Option(schedule, predicted, measured))
        if progress:
            progress("budgets", number + 1, len(reachable), {})
    below = tuple(sorted((b for b in budgets if b < smallest), reverse=True))
    count = sum(len(rows) for rows in unseen)
    return Suggestion(tuple(options), below, smallest, costs.metric, count)


def split_states(
    by_bucket: Sequence[Tensor], batch: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Per timestep bucket, indices of at most `batch` states to learn from, and of others to check with.

    Raises:
        UsageError: a bucket has fewer than two states.
    """
    generator = torch.Generator().manual_seed(seed)
    seen, unseen = [], []
    for bucket, rows in enumerate(by_bucket):
        if len(rows) < 2:
            raise UsageError(
                f"timestep bucket {bucket} has {len(rows)} state; at least 2 are needed, one of them to "
                "check with. Raise rollouts.trajectories or rollouts.steps, or give more data.",
                code="DCR-U063",
            )
        mixed = rows[torch.randperm(len(rows), generator=generator)]
        half = len(rows) // 2
        seen.append(mixed[:half][:batch])
        unseen.append(mixed[half:][:batch])
    return seen, unseen


@torch.no_grad()
def measured_error(
    program: Program, states: TeacherStates, chosen: Sequence[Tensor], schedule: TokenSchedule
) -> float:
    """See :class:`Option`; every selector keeps all tokens again afterwards."""
    batched, squares = batched_inputs(program), _squares(states, chosen)
    selectors = program.module.selectors
    was_training, total = program.module.training, 0.0
    program.module.eval()
    try:
        for bucket, rows in enumerate(chosen):
            for name, selector in selectors.items():
                selector.keep(schedule.kept_tokens[name][bucket])
            inputs, answer = states.take(rows, batched)
            error = mse_loss(run_flat(program, inputs)[0].float(), answer.float()).item()
            total += schedule.buckets.weights[bucket] * error / squares[bucket]
    finally:
        for selector in selectors.values():
            selector.keep(selector.num_tokens)
        program.module.train(was_training)
    return total


def _squares(states: TeacherStates, chosen: Sequence[Tensor]) -> list[float]:
    """Mean square of the dense output, per timestep bucket."""
    return [max(states.target[rows].float().square().mean().item(), 1e-30) for rows in chosen]


def _predicted(
    errors: dict[str, Floats], costs: CostTable, schedule: TokenSchedule, squares: list[float]
) -> float:
    """What the errors of single blocks add up to."""
    weights = schedule.buckets.weights
    return float(
        sum(
            weights[bucket]
            * errors[block][bucket, costs.levels[block].index(kept)]
            / squares[bucket]
            for block, column in schedule.kept_tokens.items()
            for bucket, kept in enumerate(column)
        )
    )
