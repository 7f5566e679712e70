"""The calibration fine-tune: find a schedule under the budget, and train the model at it.

With ``ratios: gradient`` (the default):

1. *Learn* (the first 1 - settle of the steps): the budget ramps from 1 down to what was asked;
   ratios are projected onto it after each step.
2. *Solve*: the real ratios become integers, exactly under the budget.
3. *Settle*: train on at that schedule, in the very graph that will be exported.

With ``ratios: errors``:

1. *Measure* what each block costs in accuracy at a few levels, and *solve* for the best schedule under the budget.
2. *Lead* the model there from all tokens kept, while the budget ramps down, and train on.
3. Measure and solve *again* on the model as trained by then, before the last steps *settle* it at the schedule.

Each step takes states of one timestep bucket only, so K is one number per block and no sample is
treated on its own; the buckets take turns. All randomness comes from (seed, step), so a run that
was killed goes on exactly as if it had not been. Several ranks share the states of each step.

What a step does stands in ``run.py``, how ranks share it in ``distributed.py``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffcr_compile.calibrate.block_outputs import dense_twin
from diffcr_compile.calibrate.check_states import check_states
from diffcr_compile.calibrate.checkpointing import recomputed_blocks
from diffcr_compile.calibrate.data import TeacherStates
from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.calibrate.lora import low_rank
from diffcr_compile.calibrate.memory import out_of_memory_in_words
from diffcr_compile.calibrate.ratio_search import RatioSearch
from diffcr_compile.calibrate.ratios import RatioLearner
from diffcr_compile.calibrate.rollback import as_it_was_if_it_fails
from diffcr_compile.calibrate.run import Run, StepGraphs
from diffcr_compile.calibrate.sharding import sharded_blocks
from diffcr_compile.calibrate.state import FILE
from diffcr_compile.calibrate.trained import (
    check_precision,
    nothing_else_learns,
    own_weights,
)
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import (
    AccuracyError,
    EnvironmentMissingError,
    PreconditionError,
    UsageError,
)
from diffcr_compile.program import Program, Stage
from diffcr_compile.progress import Progress
from diffcr_compile.schedule import (
    CostTable,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
)

LOWER = (
    "calibration.batch, set calibration.checkpointing: true, calibration.precision: bf16, with several GPUs "
    "calibration.shard: true, or calibration.train: lora"
)
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
    measuring: Progress | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> CalibrationResult:
    """Learn keep ratios, routers and, if asked, all weights of a ROUTED program, in place.

    The weights are copied first if they are to be trained: the user's model stays as it is. Where it ends early,
    by an error or by Ctrl-C, the program is again what it was before.

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
        measuring: called while errors are measured, with forwards done and forwards.
        ranks: who shares the work. All get the same result; rank 0 writes to `folder`.

    Raises:
        BudgetError, UsageError: the budget cannot be reached, or states do not fit the model; before
            the first step.
        AccuracyError: a loss or a gradient became NaN or infinite; the state before it is saved.
        ResourceError: out of memory; says what to lower.
        EnvironmentMissingError: another rank is gone; the state before that is saved where no weights are sharded.
    """
    if program.stage != Stage.ROUTED:
        raise PreconditionError(
            f"calibration needs a ROUTED program, got {program.stage.name}"
        )
    if config.steps == 0:  # nothing learns, and only routers and shortcuts are fitted
        config = config.model_copy(update={"train": "router", "shard": False})
    check_budget(costs, budget)
    check_states(program, states)
    by_bucket = states.by_bucket(buckets)
    _check_ranks(program, states, config, ranks)
    dense = dense_twin(program) if config.block_outputs else None
    with (
        out_of_memory_in_words(LOWER),
        as_it_was_if_it_fails(program),
        _weights_to_train(program, config),
    ):
        learner = RatioLearner(
            program,
            costs,
            buckets,
            two_bin=config.estimator == "two_bin",
            per="model" if config.ratios == "uniform" else config.ratios_per,
        )
        search = RatioSearch(learner, config, budget)
        graphs = StepGraphs(program, dense, config)
        with sharded_blocks(program, ranks) if config.shard else contextlib.nullcontext():
            run = Run(program, graphs, states, by_bucket, config, search, ranks, measuring)
            with nothing_else_learns(program.module, run.trained.parameters.values()):
                with run.together():
                    run.begin(folder, key)
                less_memory = (
                    recomputed_blocks(program)
                    if config.checkpointing
                    else contextlib.nullcontext()
                )
                with less_memory:
                    _train(run, folder, key, report)
            return _finish(run, folder)


@contextlib.contextmanager
def _weights_to_train(program: Program, config: CalibrationConfig) -> Iterator[None]:
    """A program with weights that are its own where they are trained.

    First of all, because modules are replaced that others then hold on to.
    """
    if config.train == "lora":
        with low_rank(program, config.lora_rank, config.seed):
            check_precision(program, config)
            yield
        return
    if config.train == "all":
        check_precision(program, config)
        own_weights(program.module)
    yield


def _train(run: Run, folder: Path | None, key: str, report: Report | None) -> None:
    """All steps that are left."""
    started, config = time.monotonic(), run.config
    for step in range(run.done, config.steps):
        with _state_kept(run, folder, key), run.together():
            record = run.train_step(step)
        record["seconds"] = time.monotonic() - started
        run.history.append(record)
        run.done = step + 1
        if run.done % config.save_every == 0 or run.done == config.steps:
            run.save(folder, key)
        if report:
            report(record, config.steps)


@contextlib.contextmanager
def _state_kept(run: Run, folder: Path | None, key: str) -> Iterator[None]:
    """Save where a step that cannot be finished started from, and say where it is."""
    # a step may solve for another schedule before it fails
    schedule = copy.deepcopy(run.search.state())
    try:
        yield
    except (AccuracyError, EnvironmentMissingError) as error:
        if run.sharded and isinstance(error, EnvironmentMissingError):
            raise  # with the rank a share of the state is gone; the last one that was saved is whole
        run.search.go_back(*schedule)
        run.save(folder, key)
        if folder and run.ranks.leads:
            error.message += f" The state after step {run.done} is in {folder / FILE}."
        raise


def _check_ranks(
    program: Program, states: TeacherStates, config: CalibrationConfig, ranks: Ranks
) -> None:
    """Refuse ranks that would have nothing to do, or that start from different things."""
    if config.batch < ranks.count:
        raise UsageError(
            f"calibration.batch = {config.batch} states per step cannot be shared by {ranks.count} ranks; "
            f"start at most {config.batch}, or set a larger batch",
            code="DCR-U074",
        )
    ranks.check_same("the weights", program.module.parameters())
    ranks.check_same("the timesteps of the training states", [states.timesteps])


def _finish(run: Run, folder: Path | None) -> CalibrationResult:
    """Put the averaged weights in, keep all tokens again, and say what was learned."""
    search = run.search
    if search.schedule is None:
        search.solve()
    assert search.schedule is not None
    assert search.learned is not None
    run.trained.take_averages()
    search.learner.keep_all()
    run.program.module.eval()
    if folder and run.ranks.leads:
        lines = "".join(json.dumps(record) + "\n" for record in run.history)
        atomic_write_bytes(folder / "history.jsonl", lines.encode())
    return CalibrationResult(
        search.learned,
        search.schedule,
        search.learner.costs,
        tuple(run.history),
        run.explained,
    )
