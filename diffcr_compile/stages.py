"""The stages of a compilation, each a function of programs; what is kept on disk is in ``resumable.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.attachments import checkpointing_off
from diffcr_compile.block_choice import choose_blocks
from diffcr_compile.budgets import budget_costs
from diffcr_compile.calibrate.data import (
    Conditions,
    TeacherStates,
    example_conditions,
    label_states,
    roll_out,
)
from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.calibrate.latents import LatentStates
from diffcr_compile.calibrate.loop import CalibrationResult, run_calibration
from diffcr_compile.calibrate.memory import out_of_memory_in_words
from diffcr_compile.calibrate.pipelines import PipelineRuns
from diffcr_compile.calibrate.rollout_size import rollout_size
from diffcr_compile.calibrate.samplers import FlowEuler, Sampler, model_input
from diffcr_compile.capture import capture
from diffcr_compile.config import CompileConfig, RolloutConfig, RoutingConfig
from diffcr_compile.durable import disk_errors_in_words
from diffcr_compile.errors import DiffCRError, UnsupportedModelError, UsageError, one_line
from diffcr_compile.export.artifact import export_artifact
from diffcr_compile.export.parity import Parity, compare
from diffcr_compile.export.precision import HalfSettings, Precision
from diffcr_compile.export.recipe_files import write_recipe_files
from diffcr_compile.legality import Findings, find_blocks
from diffcr_compile.manifest import Manifest
from diffcr_compile.opened import ExampleInputs, call_of
from diffcr_compile.origin import Origin
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.fuse_block_spans import FuseBlockSpans
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.planning.targets import Target
from diffcr_compile.program import DiTGraph, Program, Stage, evaluating, run_flat
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from diffcr_compile.signature import bind_call

Data = TeacherStates | LatentStates | PipelineRuns | Iterable[Mapping[str, Tensor]] | None
Event = Callable[[str, int, int, Mapping[str, Any]], None]


def captured(
    model: nn.Module,
    example_inputs: ExampleInputs,
    config: RoutingConfig,
    user_model: nn.Module,
) -> Program:
    """Capture `model`, which is `user_model` or a copy of it with its adapters fused."""
    origin = Origin.of(user_model, model, config)
    with checkpointing_off(model):
        program = _found_and_captured(model, example_inputs, config)
    return dataclasses.replace(program, origin=origin).attached()


def _found_and_captured(
    model: nn.Module, example_inputs: ExampleInputs, config: RoutingConfig
) -> Program:
    args, kwargs = call_of(example_inputs)
    bind_call(model, args, kwargs)  # refuses in words what does not fit
    try:
        findings = find_blocks(model, args, kwargs, granularity=config.granularity)
    except (DiffCRError, torch.OutOfMemoryError):
        raise
    except Exception:
        _check_that_it_runs(model, args, kwargs)
        raise
    findings = choose_blocks(findings, config)
    if not findings.blocks:
        reasons = "\n".join(f"  {r.block}: {r.reason}" for r in findings.refused)
        raise UnsupportedModelError(
            f"no block of {type(model).__name__} can be routed.\n"
            + (reasons or "  It has no ModuleList, ModuleDict or Sequential of blocks."),
            code="DCR-M001",
        )
    return _capture(model, args, kwargs, findings)


def _check_that_it_runs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tell a model that does not run on its example inputs from one that the compiler trips over."""
    try:
        with torch.no_grad(), evaluating(model):
            model(*args, **kwargs)
    except Exception as error:  # whatever a user's model raises
        raise UsageError(
            f"{type(model).__name__} does not run on the example inputs ({one_line(error)}). Call it with them yourself "
            "first: model(**example_inputs).",
            code="DCR-U082",
        ) from error


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], findings: Findings
) -> Program:
    was_training = model.training
    model.eval()
    try:
        return capture(model, args, kwargs, findings.blocks, findings.refused, findings.sample)
    finally:
        model.train(was_training)


def routed_program(captured: Program, config: RoutingConfig, seed: int) -> Program:
    passes = [
        FuseBlockSpans(config.share_index),
        InsertTokenRouters(config.gate, config.router, seed, config.shortcut_rank),
    ]
    return run_passes(captured, passes)


def program_of(graph: object, stage: Stage) -> Program:
    if not isinstance(graph, DiTGraph) or graph.program.stage != stage:
        found = (
            graph.program.stage.name if isinstance(graph, DiTGraph) else type(graph).__name__
        )
        made_by = {Stage.ROUTED: "route", Stage.FROZEN: "freeze"}[stage]
        raise UsageError(
            f"expected a {stage.name} graph from dcr.{made_by}(), got {found}", code="DCR-U025"
        )
    return graph.program


def frozen_programs(graphs: object) -> list[Program]:
    """The programs of what :func:`diffcr_compile.freeze` made, at least one."""
    if not isinstance(graphs, Sequence) or not graphs:
        found = "nothing" if isinstance(graphs, Sequence) else type(graphs).__name__
        raise UsageError(
            f"expected all the FROZEN graphs that dcr.freeze() returned, in a tuple or list, got {found}",
            code="DCR-U025",
        )
    return [program_of(graph, Stage.FROZEN) for graph in graphs]


def even_buckets(config: RoutingConfig) -> TimestepBuckets:
    return TimestepBuckets.even(config.buckets, *config.timestep_range)


def sampler_for(given: Sampler | None, config: CompileConfig) -> Sampler:
    """The sampler that was given, or Euler steps of flow matching over the model's range of timesteps."""
    return given or FlowEuler(config.rollouts.steps, config.routing.timestep_range[1])


def teacher_states(
    program: Program,
    data: Data,
    config: CompileConfig,
    sampler: Sampler | None,
    conditions: Conditions | None,
    folder: Path | None,
    progress: Event | None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    key: str | None = None,
) -> TeacherStates:
    """Training data from any source; what a folder holds is taken up if it was made under the same key.

    Raises:
        UsageError: the data do not fit the model.
        ResourceError: what has to be made first is too large, or memory runs out.
    """
    if isinstance(data, TeacherStates):
        return data
    if data is not None and config.rollouts.substeps > 1:
        source = "a pipeline's runs" if isinstance(data, PipelineRuns) else "data of your own"
        raise UsageError(
            f"rollouts.substeps = {config.rollouts.substeps} is about the steps of teacher rollouts, and {source} "
            "are learned from instead. Set it to 1, or learn from rollouts: give a sampler and no data.",
            code="DCR-U076",
        )

    def shard_done(stage: str, done: int, count: int) -> None:
        if progress:
            progress(stage, done, count, {})

    if isinstance(data, LatentStates):
        buckets, seed = even_buckets(config.routing), config.calibration.seed
        with out_of_memory_in_words("the batch of LatentStates"):
            return data.teacher_states(program, buckets, seed, shard_done)
    if data is not None and not isinstance(data, PipelineRuns):
        with out_of_memory_in_words("the batch size of your data"):
            return label_states(program, data)
    if folder is not None:
        with disk_errors_in_words(folder):
            folder.mkdir(parents=True, exist_ok=True)
    sampler = sampler_for(sampler, config)
    _tell_size(program, data, config.rollouts, sampler, folder, progress)
    rollouts, seed = config.rollouts, config.calibration.seed
    buckets = _buckets_by_steps(data, config.routing, sampler)
    with out_of_memory_in_words("rollouts.batch"):
        if data is not None:
            states = data.teacher_states(
                program, rollouts, config.routing, seed, folder, shard_done, ranks, key
            )
        else:
            draw = conditions or example_conditions(program)
            states = roll_out(
                program, sampler, rollouts, draw, seed, folder, shard_done, ranks, key
            )
    return dataclasses.replace(states, buckets=buckets)


def _buckets_by_steps(
    runs: PipelineRuns | None, config: RoutingConfig, sampler: Sampler
) -> TimestepBuckets:
    """Timestep buckets whose weights are their shares of the sampling steps, which a budget is a mean over."""
    even = even_buckets(config)
    if runs is None:
        return even.weighted_by(sampler.timesteps)
    return runs.buckets(config) or even.weighted_by(runs.timesteps)


def _tell_size(
    program: Program,
    runs: PipelineRuns | None,
    config: RolloutConfig,
    sampler: Sampler,
    folder: Path | None,
    progress: Event | None,
) -> None:
    """How large the states will be, before the first is made; refused if they are too large."""
    if runs is not None:
        size, setting = runs.size(config), "rollouts.pipeline_runs"
        shards = config.pipeline_runs
    else:
        size = rollout_size(program, config, len(sampler.timesteps))
        setting, shards = "rollouts.trajectories", -(-config.trajectories // config.batch)
    size.check(config.max_gib, setting, folder)
    if progress:
        figures = {"disk_bytes": size.disk_bytes, "memory_bytes": size.memory_bytes}
        progress("rollouts", 0, shards, figures)


def export_programs(
    programs: Sequence[Program],
    out: Path,
    name: str,
    tolerance: float,
    progress: Event | None = None,
    targets: Sequence[Target] = (),
    learned: str | None = None,
    guidance: Mapping[str, Any] | None = None,
    profiles: bool = True,
    half: HalfSettings | None = None,
) -> Manifest:
    first = programs[0]
    schedule = first.schedule
    assert schedule is not None
    return export_artifact(
        programs,
        out,
        model_info={
            "name": name,
            "revision": None,
            "parameters": sum(p.numel() for p in first.module.parameters()),
        },
        timestep_input=first.timestep_input,
        sample_input=first.sample_input,
        budget={
            "metric": schedule.metric,
            "asked": schedule.asked,
            "reached": schedule.reached,
        },
        parity_tolerance=tolerance,
        targets=targets,
        describe=lambda folder: write_recipe_files(folder, programs, learned, guidance),
        profiles=profiles,
        half=half,
        progress=(lambda done, count: progress("export", done, count, {}))
        if progress
        else None,
    )


@torch.no_grad()
def sampling_states(
    frozen: Sequence[Program], timesteps: Sequence[float], sampler: Sampler | None, seed: int
) -> list[dict[str, Tensor]]:
    """Inputs of a whole sampling run of FROZEN programs, from noise to the end.

    Args:
        frozen: one program per timestep bucket.
        timesteps: in sampling order.
        sampler: makes the next sample; None where it is not ours (a pipeline's), then every step has
            the example's sample.
        seed: of the noise.
    """
    first = frozen[0]
    schedule, name, sample = first.schedule, first.timestep_input, first.sample_input
    if name is None or sample is None or schedule is None:
        return []
    example = dict(first.example)
    state = example[sample]
    if sampler is not None:
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed))
        state = sampler.start(noise.to(state))
    found = []
    for step, timestep in enumerate(timesteps):
        time = example[name]
        given = state if sampler is None else model_input(sampler, step, state)
        inputs = {**example, sample: given, name: torch.full_like(time, timestep)}
        found.append(inputs)
        if sampler is not None:
            # as the model gets it, which is how the runtime looks it up
            program = frozen[schedule.buckets.index_of(float(inputs[name].flatten()[0]))]
            state = sampler.step(run_flat(program, inputs)[0], step, state)
    return found


def half_settings(
    frozen: Sequence[Program],
    precision: Precision,
    states: Iterable[Mapping[str, Tensor]],
) -> HalfSettings:
    """Settings with each of the states in its timestep bucket."""
    name, schedule = frozen[0].timestep_input, frozen[0].schedule
    assert schedule is not None
    buckets: list[list[Mapping[str, Tensor]]] = [[] for _ in frozen]
    for state in states:
        value = 0.0 if name is None else float(state[name].flatten()[0])
        buckets[0 if name is None else schedule.buckets.index_of(value)].append(state)
    return HalfSettings(precision, states=buckets)


def schedule_of(
    program: Program,
    result: CalibrationResult | None,
    keep_ratio: float | None,
    schedule: TokenSchedule | None,
) -> TokenSchedule:
    """The kept tokens that :func:`diffcr_compile.freeze` was given in one of three ways."""
    three: dict[str, object] = {
        "result": result, "keep_ratio": keep_ratio, "schedule": schedule,
    }  # fmt: skip
    given = [(name, value) for name, value in three.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "freeze needs exactly one of result, keep_ratio and schedule", code="DCR-U024"
        )
    ((name, value),) = given
    match name, value:
        case "result", CalibrationResult():
            return value.schedule
        case "keep_ratio", Real():
            return uniform_schedule(program, float(value))
        case "schedule", TokenSchedule():
            return value
    raise UsageError(
        f"freeze: {name} is of type {type(value).__name__}. Pass what dcr.calibrate() returned as result, or by name "
        "keep_ratio=0.5 or schedule=TokenSchedule(...)",
        code="DCR-U024",
    )


def uniform_schedule(program: Program, keep_ratio: float) -> TokenSchedule:
    """One timestep bucket, every block at the same keep ratio, rounded to whole tokens."""
    if not 0 <= keep_ratio <= 1:
        raise UsageError(f"keep_ratio must be in [0, 1], got {keep_ratio}", code="DCR-U032")
    return TokenSchedule(
        {spec.name: (round(keep_ratio * spec.num_tokens),) for spec in program.blocks},
        {spec.name: spec.num_tokens for spec in program.blocks},
        TimestepBuckets.even(1),
    )


@torch.no_grad()
def all_kept_parity(dense: Program, routed: Program) -> Parity:
    """ROUTED with all tokens kept against the dense graph: must be equal bit for bit."""
    return compare(
        "dense -> ROUTED, all tokens kept",
        run_flat(routed, routed.example),
        run_flat(dense, dense.example),
        0.0,
    )


@torch.no_grad()
def frozen_parity(routed: Program, frozen: Program) -> Parity:
    """FROZEN against ROUTED with its selectors at the schedule's column."""
    assert frozen.schedule is not None
    assert frozen.bucket is not None
    selectors, column = routed.module.selectors, frozen.schedule.column(frozen.bucket)
    for name, selector in selectors.items():
        selector.keep(column[name])
    expected = run_flat(routed, routed.example)
    for selector in selectors.values():
        selector.keep(selector.num_tokens)
    found = run_flat(frozen, frozen.example)
    return compare("ROUTED -> FROZEN", found, expected, 1e-5, bucket=frozen.bucket)


def learn(
    program: Program,
    states: TeacherStates,
    config: CompileConfig,
    budget: float,
    folder: Path | None = None,
    key: str = "",
    progress: Event | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> CalibrationResult:
    """Calibrate a ROUTED program on ready teacher states, see :func:`diffcr_compile.calibrate`."""

    def step(record: Mapping[str, Any], steps: int) -> None:
        if progress:
            progress("calibrate", int(record["step"]), steps, record)

    def measured(done: int, count: int) -> None:
        if progress:
            progress("measure", done, count, {})

    return run_calibration(
        program,
        states,
        config.calibration,
        budget_costs(program, config),
        states.buckets or even_buckets(config.routing),
        budget,
        folder=folder,
        key=key,
        report=step,
        measuring=measured,
        ranks=ranks,
    )
