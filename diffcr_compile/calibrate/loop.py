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

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.calibrate.ratio_search import RatioSearch
from diffcr_compile.calibrate.ratios import RatioLearner
from diffcr_compile.calibrate.state import load_state, save_state
from diffcr_compile.calibrate.trained import (
    TrainedParameters,
    own_weights,
    router_parameters,
)
from diffcr_compile.calibrate.warm_start import warm_start_routers
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.errors import DiffCRError, PreconditionError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.program import Program, Stage, run_flat
from diffcr_compile.schedule import (
    CostTable,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
)

WARM_START_STATES = 128
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
        # first of all: it replaces the modules that others hold on to
        own_weights(program.module)
    learner = RatioLearner(
        program,
        costs,
        buckets,
        two_bin=config.estimator == "two_bin",
        per=config.ratios_per,
    )
    run = _Run(program, states, by_bucket, config, RatioSearch(learner, config, budget))
    saved = load_state(folder, key) if folder else None
    if saved:
        run.restore(*saved)
    else:
        run.start()
    started = time.monotonic()
    for step in range(run.done, config.steps):
        record = run.train_step(step)
        record["seconds"] = time.monotonic() - started
        run.history.append(record)
        run.done = step + 1
        if folder and (run.done % config.save_every == 0 or run.done == config.steps):
            run.save(folder, key)
        if report:
            report(record, config.steps)
    return run.finish(folder)


class _Run:
    """One calibration under way."""

    def __init__(
        self,
        program: Program,
        states: TeacherStates,
        by_bucket: list[Tensor],
        config: CalibrationConfig,
        search: RatioSearch,
    ) -> None:
        self.program, self.states, self.by_bucket = program, states, by_bucket
        self.config, self.search = config, search
        # While ratios are learned, two_bin needs its second branch; at a fixed schedule nobody does.
        self.learning = (
            run_passes(program, [BlendTwoBins()]) if config.estimator == "two_bin" else program
        )
        self.trained = TrainedParameters(program, config)
        self.batched = batched_inputs(program)
        self.history: list[dict[str, float]] = []
        self.explained: dict[str, float] = {}
        self.done = 0

    def start(self) -> None:
        """Routers in closed form; a schedule from measured errors where ratios are not learned."""
        chosen = self._some_states(max(1, WARM_START_STATES // len(self.by_bucket)))
        self.search.learner.keep_all()
        self.explained = warm_start_routers(
            self.program, self.states, torch.cat(chosen), self.config.batch
        )
        self.trained.forget_averages()
        if self.search.from_errors:
            self._solve_by_errors()

    def _solve_by_errors(self) -> None:
        few = self._some_states(self.config.batch)
        self.search.solve_by_errors(self.program, self.states, few)

    def train_step(self, step: int) -> dict[str, float]:
        """One update of everything that is trained; returns the step's record."""
        if self.search.ends_learning(step):
            self.search.solve()
        if self.search.solves_again(step):
            self._solve_by_errors()
        bucket = step % len(self.by_bucket)
        between = self.search.set_up(step, bucket)
        loss = self._loss(step, bucket, self.learning if between else self.program)
        loss.backward()  # type: ignore[no-untyped-call]
        self.trained.update(step)
        self.search.update(bucket)
        return {
            "step": step + 1,
            "bucket": bucket,
            "loss": loss.item(),
            "budget": self.search.target(step),
            "reached": self.search.reached,
            "mean_keep_ratio": float(self.search.learner.values.mean()),
        }

    def finish(self, folder: Path | None) -> CalibrationResult:
        """Put the averaged weights in, keep all tokens again, and say what was learned."""
        if self.search.schedule is None:
            self.search.solve()
        assert self.search.schedule is not None
        assert self.search.learned is not None
        self.trained.take_averages()
        self.search.learner.keep_all()
        self.program.module.eval()
        if folder:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            (folder / "history.jsonl").write_text(lines)
        return CalibrationResult(
            self.search.learned,
            self.search.schedule,
            self.search.learner.costs,
            tuple(self.history),
            self.explained,
        )

    def save(self, folder: Path, key: str) -> None:
        """Leave a state from which the same calibration goes on."""
        ratios, found = self.search.state()
        # The warm start is part of the result even where routers are not trained.
        routers = {
            f"router.{n}": p.detach() for n, p in router_parameters(self.program).items()
        }
        facts = {
            "key": key,
            "done": self.done,
            "history": self.history,
            "explained": self.explained,
            **found,
        }
        tensors = {**self.trained.state(), **routers, **ratios}
        # Tied parameters share memory, which safetensors refuses to write.
        save_state(folder, {n: t.clone() for n, t in tensors.items()}, facts)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The reverse of :meth:`save`."""
        for name, parameter in router_parameters(self.program).items():
            parameter.copy_(tensors[f"router.{name}"])
        self.trained.restore(tensors)
        self.search.restore(tensors, facts)
        self.done = facts["done"]
        self.history, self.explained = facts["history"], facts["explained"]

    def _loss(self, step: int, bucket: int, program: Program) -> Tensor:
        """How far the program is from the dense model on a batch that (seed, step) draws.

        Raises:
            DiffCRError: it is NaN or infinite.
        """
        seed = self.config.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        rows = self.by_bucket[bucket]
        chosen = rows[torch.randint(len(rows), (self.config.batch,), generator=generator)]
        inputs, answer = self.states.take(chosen, self.batched)
        program.module.train()
        torch.manual_seed(seed)  # random routers and dropout
        with torch.autocast(
            answer.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            output = run_flat(program, inputs)[0]
        loss = mse_loss(output.float(), answer.float())
        if not math.isfinite(loss.item()):
            raise DiffCRError(
                f"calibration step {step + 1}: the loss is {loss.item()}. The last saved state is kept; "
                "lower calibration.lr_weights or lr_router and run again."
            )
        return loss

    def _some_states(self, each: int) -> list[Tensor]:
        """Indices of `each` states of every timestep bucket, always the same."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return [
            rows[torch.randint(len(rows), (each,), generator=generator)]
            for rows in self.by_bucket
        ]
