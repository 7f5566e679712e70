"""The public functions, and the whole pipeline top to bottom in :func:`compile`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffcr_compile import bench
from diffcr_compile.attachments import checkpointing_off, prepared
from diffcr_compile.calibrate.data import (
    Conditions,
    TeacherStates,
    example_conditions,
    label_states,
    roll_out,
)
from diffcr_compile.calibrate.loop import CalibrationResult, own_weights, run_calibration
from diffcr_compile.calibrate.pipeline_calls import Inputs
from diffcr_compile.calibrate.pipelines import (
    FEW_STEPS,
    PipelineRuns,
    is_pipeline,
    open_pipeline,
)
from diffcr_compile.calibrate.samplers import FlowEuler, Sampler
from diffcr_compile.capture import capture
from diffcr_compile.config import CompileConfig, RoutingConfig, parse_budget
from diffcr_compile.errors import UnsupportedModelError, UsageError
from diffcr_compile.export.artifact import export_artifact, export_dense
from diffcr_compile.export.parity import Parity, compare
from diffcr_compile.legality import Findings, find_blocks
from diffcr_compile.macs import measure_costs
from diffcr_compile.manifest import (
    Manifest,
    read_manifest,
    verify_artifact,
    write_json_atomic,
)
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.fuse_block_spans import FuseBlockSpans
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.planning.inspection import Plan, make_plan
from diffcr_compile.planning.targets import find_target
from diffcr_compile.program import (
    DiTGraph,
    Program,
    Stage,
    run_flat,
    selector_name,
    with_batch,
)
from diffcr_compile.routing import TokenSelector
from diffcr_compile.runtime import Runner, load
from diffcr_compile.runtime.dense import DenseRunner
from diffcr_compile.schedule import (
    CostTable,
    KeepRatios,
    TimestepBuckets,
    TokenSchedule,
    check_budget,
)
from diffcr_compile.vector_math import settle_vector_math
from diffcr_compile.workspace import Workspace, fingerprint

settle_vector_math()  # at import, because the user's model is often built after it

ExampleInputs = Mapping[str, Any] | Sequence[Any] | Tensor
PipelineInputs = Inputs | Sequence[Inputs] | None
Data = TeacherStates | PipelineRuns | Iterable[Mapping[str, Tensor]] | None
Event = Callable[[str, int, int, Mapping[str, Any]], None]
Evaluate = Callable[[Callable[..., Any], Callable[..., Any], Path], dict[str, Any]]

__all__ = [
    "Artifact",
    "Plan",
    "calibrate",
    "compile",
    "export",
    "freeze",
    "inspect",
    "load",
    "route",
]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model on disk."""

    folder: Path
    manifest: Manifest
    report: Mapping[str, Any] | None = None

    def load(self, **options: Any) -> Runner:
        """A runner for it, see ``diffcr_compile.runtime``."""
        return load(self.folder, **options)


def inspect(
    model: nn.Module | Any,
    example_inputs: ExampleInputs | None = None,
    config: RoutingConfig | None = None,
    *,
    target: str = "ort-cpu",
    macs_per_byte: float | None = None,
    pipeline_inputs: PipelineInputs = None,
    component: str | None = None,
) -> Plan:
    """A dry run: what can be routed, what it brings, what it takes; changes nothing.

    It takes seconds and little more memory than the weights; the model may also be on the meta device.
    What is wrong with the model is in the result. ``print`` shows it as a table.

    Args:
        model: any DiT, or a pipeline of diffusers, which is run for a few steps.
        example_inputs: keyword inputs as a dict, or positional ones as a tuple; of a pipeline none.
        config: settings of the routing.
        target: name of the device whose limits count, see ``planning/targets.py``.
        macs_per_byte: MACs that the device does in the time in which it moves a byte, if known.
        pipeline_inputs: of a pipeline: the keyword arguments of its call.
        component: of a pipeline: the name of the denoiser, where there are several.

    Raises:
        UsageError: there is no such target, or the pipeline does not run.
    """
    settings, device = CompileConfig(routing=config or RoutingConfig()), find_target(target)
    model, example_inputs, _ = _opened(model, example_inputs, pipeline_inputs, component)
    args, kwargs = _call(example_inputs)
    problem = None
    try:
        model = prepared(model, settings.routing.fuse_adapters)
    except UnsupportedModelError as error:
        problem = str(error)
    with checkpointing_off(model):
        return make_plan(model, args, kwargs, settings, device, macs_per_byte, problem)


def route(
    model: nn.Module | Any,
    example_inputs: ExampleInputs | None = None,
    config: RoutingConfig | None = None,
    seed: int = 0,
    *,
    pipeline_inputs: PipelineInputs = None,
    component: str | None = None,
) -> DiTGraph:
    """The model as a graph with a router around every block that may have one.

    The result is called like the model and returns the same output, bit for bit, until a
    calibration or a schedule says otherwise. Weights are shared with `model`.

    Args:
        model: any DiT, or a pipeline of diffusers, which is run for a few steps. The model is put
            into evaluation mode for the capture and left as it was.
        example_inputs: keyword inputs as a dict, or positional ones as a tuple; of a pipeline none.
        config: gate, kind of router and so on.
        seed: of the routers' initial weights.
        pipeline_inputs: of a pipeline: the keyword arguments of its call.
        component: of a pipeline: the name of the denoiser, where there are several.

    Raises:
        UnsupportedModelError: no block can be routed, with the reason for each candidate; or hooks,
            adapters or offloading are attached to the model.
        CaptureError: torch.export cannot trace the model.
    """
    config = config or RoutingConfig()
    model, example_inputs, _ = _opened(model, example_inputs, pipeline_inputs, component)
    model = prepared(model, config.fuse_adapters)
    return _route(_captured(model, example_inputs, config), config, seed).module


def calibrate(
    routed: DiTGraph,
    data: Data = None,
    *,
    budget: float | str,
    config: CompileConfig | None = None,
    sampler: Sampler | None = None,
    conditions: Conditions | None = None,
    folder: Path | None = None,
    key: str = "",
    progress: Event | None = None,
) -> CalibrationResult:
    """Learn keep ratios and routers (and weights) under a budget, in place.

    Args:
        routed: from :func:`route`. With ``train: all`` it gets its own copy of the weights first.
        data: inputs by name in batches (the dense model answers them), ready teacher states, an
            opened pipeline to run, or None for teacher rollouts.
        budget: share of the dense MACs, ``"60%"`` or 0.6.
        config: settings; defaults are in ``config.py``.
        sampler: for rollouts; flow-matching Euler steps by default.
        conditions: for rollouts: ``conditions(generator, count)`` draws every input but sample and
            timestep; by default those of the example.
        folder: where resumable state is kept; None for none.
        key: fingerprint of what the state belongs to.
        progress: called with (stage, done, all, figures).

    Raises:
        BudgetError: the budget cannot be reached; names the smallest that can.
    """
    config = config or CompileConfig()
    program = _of(routed, Stage.ROUTED)
    share = parse_budget(budget)
    costs = _costs(program, config.routing)
    check_budget(costs, share)
    states = _states(program, data, config, sampler, conditions, folder, progress)

    def step(record: Mapping[str, Any], steps: int) -> None:
        if progress:
            progress("calibrate", int(record["step"]), steps, record)

    return run_calibration(
        program,
        states,
        config.calibration,
        costs,
        states.buckets or _buckets(config.routing),
        share,
        folder=folder,
        key=key,
        report=step,
    )


def freeze(
    routed: DiTGraph,
    result: CalibrationResult | None = None,
    *,
    keep_ratio: float | None = None,
    schedule: TokenSchedule | None = None,
) -> tuple[DiTGraph, ...]:
    """One static graph per timestep bucket; adjacent buckets with equal schedules become one.

    Args:
        routed: from :func:`route`.
        result: what :func:`calibrate` learned; or give one of the other two.
        keep_ratio: the same keep ratio in [0, 1] for every block.
        schedule: kept tokens per block and bucket.
    """
    program = _of(routed, Stage.ROUTED)
    given = [value for value in (result, keep_ratio, schedule) if value is not None]
    if len(given) != 1:
        raise UsageError("freeze needs exactly one of result, keep_ratio and schedule")
    if result is not None:
        schedule = result.schedule
    if keep_ratio is not None:
        schedule = uniform_schedule(program, keep_ratio)
    assert schedule is not None
    schedule = schedule.merged()
    return tuple(
        run_passes(program, [FreezeKeptTokens(schedule, bucket), RemoveFullBlocks()]).module
        for bucket in range(len(schedule.buckets))
    )


def export(
    frozen: Sequence[DiTGraph],
    out: str | Path,
    *,
    name: str = "model",
    parity_tolerance: float = 1e-4,
) -> Artifact:
    """Write the artifact: ONNX graphs over one weights file, golden outputs, manifest.

    Raises:
        AccuracyError: ONNX Runtime differs from a FROZEN graph by more than the tolerance.
    """
    programs = [_of(graph, Stage.FROZEN) for graph in frozen]
    manifest = _export(programs, Path(out), name, parity_tolerance)
    return Artifact(Path(out), manifest)


def compile(
    model: nn.Module | Any,
    out: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    pipeline_inputs: PipelineInputs = None,
    component: str | None = None,
    budget: float | str = "60%",
    data: Iterable[Mapping[str, Tensor]] | None = None,
    config: CompileConfig | None = None,
    sampler: Sampler | None = None,
    conditions: Conditions | None = None,
    evaluate: Evaluate | None = None,
    name: str | None = None,
    progress: Event | None = None,
) -> Artifact:
    """Capture, route, calibrate, freeze, export, validate, benchmark, report.

    Every stage that is finished is recorded; the same call goes on where it was interrupted.

    Args:
        model: any DiT, in evaluation mode, or a pipeline of diffusers: its own runs are then the
            example and the training data.
        out: the artifact's folder, new or from an earlier call.
        example_inputs: keyword inputs as a dict, or positional ones as a tuple. Their batch size is
            that of the exported graphs. Of a pipeline none.
        pipeline_inputs: of a pipeline: the keyword arguments of its call, or several such dicts,
            which take turns.
        component: of a pipeline: the name of the denoiser, where there are several.
        budget: share of the dense MACs.
        data: see :func:`calibrate`.
        config: settings.
        sampler: for rollouts and for the benchmark's sampling loop.
        conditions: for rollouts.
        evaluate: measures quality: ``evaluate(dense, compressed, folder)`` with two callables that
            run the model; what it returns becomes ``report.json``'s ``quality``.
        name: how the model is called in the report.
        progress: called with (stage, done, all, figures).

    Raises:
        UnsupportedModelError, BudgetError, UsageError, ArtifactError, AccuracyError: see each stage.
    """
    config = config or CompileConfig()
    share = parse_budget(budget)
    model, example_inputs, runs = _opened(
        model, example_inputs, pipeline_inputs, component, config.rollouts.steps
    )
    model = prepared(model, config.routing.fuse_adapters)
    name = name or type(model).__name__
    sampler = sampler or FlowEuler(config.rollouts.steps, config.routing.timestep_high)
    with Workspace(Path(out)) as space:
        made_of = [_shapes(example_inputs), runs.identity] if runs else _shapes(example_inputs)
        identity = fingerprint(_weights_hash(model), name, made_of)
        with space.stage("capture", identity):
            dense = with_batch(
                _captured(model, example_inputs, config.routing), config.export.batch
            )
        with space.stage("route", identity):
            routed = _route(dense, config.routing, config.calibration.seed)
            ladder = [_all_kept_parity(dense, routed)]
            costs = _costs(routed, config.routing)
            check_budget(costs, share)
        key = fingerprint(
            identity, share, config.model_dump(exclude={"export"}), data is not None
        )
        result = _calibrated(
            space,
            key,
            routed,
            runs if data is None else data,
            share,
            config,
            sampler,
            conditions,
            progress,
        )
        with space.stage("freeze", key):
            frozen = [graph.program for graph in freeze(routed.module, result)]
            ladder += [_frozen_parity(routed, program) for program in frozen]
        manifest = _exported(space, key, frozen, name, config, progress)
        _dense_exported(space, fingerprint(identity, config.export.batch), dense)
        ladder += [Parity(**row) for row in manifest.parity["buckets"]]
        compiled = Compiled(
            name, dense, routed, tuple(frozen), costs, result, manifest, tuple(ladder)
        )
        with space.stage("benchmark", key):
            timesteps = list(runs.timesteps) if runs else sampler.timesteps
            speed = bench.best_sampling_loops(space.folder, timesteps)
        quality = _evaluated(space, key, evaluate)
        report = _reported(space, compiled, config, speed, quality)
    return Artifact(Path(out), manifest, report)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Everything that the report speaks about."""

    name: str
    dense: Program
    routed: Program
    frozen: tuple[Program, ...]
    costs: CostTable
    result: CalibrationResult
    manifest: Manifest
    ladder: tuple[Parity, ...]


def uniform_schedule(program: Program, keep_ratio: float) -> TokenSchedule:
    """One timestep bucket, every block at the same keep ratio, rounded to whole tokens."""
    if not 0 <= keep_ratio <= 1:
        raise UsageError(f"keep_ratio must be in [0, 1], got {keep_ratio}")
    return TokenSchedule(
        {spec.name: (round(keep_ratio * spec.num_tokens),) for spec in program.blocks},
        {spec.name: spec.num_tokens for spec in program.blocks},
        TimestepBuckets.even(1),
    )


def _opened(
    model: nn.Module | Any,
    example_inputs: ExampleInputs | None,
    pipeline_inputs: PipelineInputs,
    component: str | None,
    steps: int = FEW_STEPS,
) -> tuple[nn.Module, ExampleInputs, PipelineRuns | None]:
    """The model and its example inputs; of a pipeline its denoiser, and what it was called with."""
    if isinstance(model, PipelineRuns):
        return model.model, model.example, model
    if is_pipeline(model):
        if example_inputs is not None:
            raise UsageError(
                "a pipeline's example inputs are recorded; pass pipeline_inputs= instead of them"
            )
        runs = open_pipeline(model, pipeline_inputs, component, steps)
        return runs.model, runs.example, runs
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"expected a torch.nn.Module or a pipeline of diffusers, got {type(model).__name__}"
        )
    if example_inputs is None or pipeline_inputs is not None or component is not None:
        raise UsageError(
            f"{type(model).__name__} is a model: it needs example_inputs=; pipeline_inputs= and "
            "component= are for pipelines"
        )
    return model, example_inputs, None


def _captured(
    model: nn.Module, example_inputs: ExampleInputs, config: RoutingConfig
) -> Program:
    with checkpointing_off(model):
        return _found_and_captured(model, example_inputs, config)


def _found_and_captured(
    model: nn.Module, example_inputs: ExampleInputs, config: RoutingConfig
) -> Program:
    args, kwargs = _call(example_inputs)
    findings = find_blocks(model, args, kwargs, granularity=config.granularity)
    if not findings.blocks:
        reasons = "\n".join(f"  {r.block}: {r.reason}" for r in findings.refused)
        raise UnsupportedModelError(
            f"no block of {type(model).__name__} can be routed.\n"
            + (reasons or "  It has no ModuleList, ModuleDict or Sequential of blocks.")
        )
    return _capture(model, args, kwargs, findings)


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], findings: Findings
) -> Program:
    was_training = model.training
    model.eval()
    try:
        return capture(model, args, kwargs, findings.blocks, findings.refused, findings.sample)
    finally:
        model.train(was_training)


def _route(captured: Program, config: RoutingConfig, seed: int) -> Program:
    passes = [
        FuseBlockSpans(config.share_index),
        InsertTokenRouters(config.gate, config.router, seed),
    ]
    return run_passes(captured, passes)


def _call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


def _of(graph: object, stage: Stage) -> Program:
    if not isinstance(graph, DiTGraph) or graph.program.stage != stage:
        found = (
            graph.program.stage.name if isinstance(graph, DiTGraph) else type(graph).__name__
        )
        made_by = {Stage.ROUTED: "route", Stage.FROZEN: "freeze"}[stage]
        raise UsageError(f"expected a {stage.name} graph from dcr.{made_by}(), got {found}")
    return graph.program


def _costs(program: Program, config: RoutingConfig) -> CostTable:
    return measure_costs(
        program,
        config.multiple_of,
        config.min_keep_ratio,
        config.max_keep_ratio,
        skip_blocks=config.skip_blocks,
    )


def _buckets(config: RoutingConfig) -> TimestepBuckets:
    return TimestepBuckets.even(config.buckets, config.timestep_low, config.timestep_high)


def _states(
    program: Program,
    data: Data,
    config: CompileConfig,
    sampler: Sampler | None,
    conditions: Conditions | None,
    folder: Path | None,
    progress: Event | None,
) -> TeacherStates:
    if isinstance(data, TeacherStates):
        return data
    if data is not None and not isinstance(data, PipelineRuns):
        return label_states(program, data)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def shard_done(stage: str, done: int, count: int) -> None:
        if progress:
            progress(stage, done, count, {})

    if data is not None:
        return data.teacher_states(
            program,
            config.rollouts,
            config.routing,
            config.calibration.seed,
            folder,
            shard_done,
        )
    return roll_out(
        program,
        sampler or FlowEuler(config.rollouts.steps, config.routing.timestep_high),
        config.rollouts,
        conditions or example_conditions(program),
        config.calibration.seed,
        folder,
        shard_done,
    )


def _calibrated(
    space: Workspace,
    key: str,
    routed: Program,
    data: Data,
    budget: float,
    config: CompileConfig,
    sampler: Sampler,
    conditions: Conditions | None,
    progress: Event | None,
) -> CalibrationResult:
    """Rollouts and calibration, or their result from an earlier run."""
    weights, summary = (
        space.folder / "model/routed.safetensors",
        space.folder / "model/calibration.json",
    )
    if space.finished("calibrate", key) and weights.exists() and summary.exists():
        _load_trained(routed, weights, config)
        return _result_from_json(json.loads(summary.read_text()), routed, config)
    folder = space.subfolder("calibration")
    rollout_key = fingerprint(
        space.records["capture"]["key"], config.rollouts.model_dump(), config.calibration.seed
    )
    if not space.finished("rollouts", rollout_key):
        _forget_rollouts(folder, rollout_key)
    with space.stage("rollouts", rollout_key):
        states = _states(routed, data, config, sampler, conditions, folder, progress)
    with space.stage("calibrate", key):
        result = calibrate(
            routed.module,
            states,
            budget=budget,
            config=config,
            folder=folder,
            key=key,
            progress=progress,
        )
        space.subfolder("model")
        _save_trained(routed, weights, config)
        write_json_atomic(summary, _result_to_json(result))
    return result


def _forget_rollouts(folder: Path, key: str) -> None:
    """Shards of other settings must not be taken for ours."""
    marker = folder / "rollouts.key"
    if marker.exists() and marker.read_text() == key:
        return
    for shard in folder.glob("rollouts_*.safetensors"):
        shard.unlink()
    marker.write_text(key)


def _exported(
    space: Workspace,
    key: str,
    frozen: Sequence[Program],
    name: str,
    config: CompileConfig,
    progress: Event | None,
) -> Manifest:
    key = fingerprint(key, config.export.model_dump())
    if space.finished("export", key) and (space.folder / "manifest.json").exists():
        manifest = read_manifest(space.folder)
        verify_artifact(space.folder, manifest)
        return manifest
    with space.stage("export", key):
        return _export(frozen, space.folder, name, config.export.parity_tolerance, progress)


def _export(
    programs: Sequence[Program],
    out: Path,
    name: str,
    tolerance: float,
    progress: Event | None = None,
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
        budget={"metric": "macs", "asked": schedule.asked, "reached": schedule.reached},
        parity_tolerance=tolerance,
        progress=(lambda done, count: progress("export", done, count, {}))
        if progress
        else None,
    )


def _dense_exported(space: Workspace, key: str, dense: Program) -> Path:
    """The dense model's ONNX, the baseline of size and speed."""
    path = space.folder / "baseline/dense.onnx"
    if not (space.finished("baseline", key) and path.exists()):
        space.subfolder("baseline")
        with space.stage("baseline", key):
            export_dense(dense, path)
    return path


def _evaluated(space: Workspace, key: str, evaluate: Evaluate | None) -> dict[str, Any] | None:
    if evaluate is None:
        return None
    path = space.subfolder("report") / "quality.json"
    if not (space.finished("quality", key) and path.exists()):
        with space.stage("quality", key):
            runner = load(space.folder)
            dense = DenseRunner(space.folder / "baseline/dense.onnx")
            write_json_atomic(path, evaluate(dense, runner, space.folder / "report"))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _reported(
    space: Workspace,
    compiled: Compiled,
    config: CompileConfig,
    speed: dict[str, Any],
    quality: dict[str, Any] | None,
) -> dict[str, Any]:
    from diffcr_compile.report import write_html, write_keep_map
    from diffcr_compile.summary import build_report

    folder = space.subfolder("report")
    with space.stage("report", "always"):
        report = build_report(compiled, config, speed, quality, space.folder)
        write_keep_map(report, folder / "keep_map.png")
    report["seconds"], report["peak_rss_bytes"] = space.seconds(), space.peak_rss_bytes()
    write_json_atomic(folder / "report.json", report)
    write_html(report, folder)
    return report


@torch.no_grad()
def _all_kept_parity(dense: Program, routed: Program) -> Parity:
    """ROUTED with all tokens kept against the dense graph: must be equal bit for bit."""
    return compare(
        "dense -> ROUTED, all tokens kept",
        run_flat(routed, routed.example),
        run_flat(dense, dense.example),
        0.0,
    )


@torch.no_grad()
def _frozen_parity(routed: Program, frozen: Program) -> Parity:
    """FROZEN against ROUTED with its selectors at the schedule's column."""
    assert frozen.schedule is not None
    assert frozen.bucket is not None
    selectors: list[tuple[TokenSelector, int]] = []
    for spec in routed.blocks:
        selector = routed.module.get_submodule(selector_name(spec.name))
        assert isinstance(selector, TokenSelector)
        selectors.append((selector, frozen.schedule.kept_tokens[spec.name][frozen.bucket]))
    for selector, kept in selectors:
        selector.keep(kept)
    expected = run_flat(routed, routed.example)
    for selector, _ in selectors:
        selector.keep(selector.num_tokens)
    found = run_flat(frozen, frozen.example)
    return compare("ROUTED -> FROZEN", found, expected, 1e-5, bucket=frozen.bucket)


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _shapes(example_inputs: ExampleInputs) -> Any:
    args, kwargs = _call(example_inputs)

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), list(value.shape)]
        if isinstance(value, Mapping):
            return {key: shape(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [shape(item) for item in value]
        return repr(value)

    return [shape(args), shape(kwargs)]


def _trained_tensors(routed: Program, config: CompileConfig) -> dict[str, Tensor]:
    every = config.calibration.train == "all"
    return {
        name: p
        for name, p in routed.module.named_parameters()
        if every or "_select.router." in name
    }


def _save_trained(routed: Program, path: Path, config: CompileConfig) -> None:
    tensors = {n: t.detach().clone() for n, t in _trained_tensors(routed, config).items()}
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
    temporary.replace(path)


@torch.no_grad()
def _load_trained(routed: Program, path: Path, config: CompileConfig) -> None:
    if config.calibration.train == "all":
        own_weights(routed.module)
    saved = load_file(path)
    for name, parameter in _trained_tensors(routed, config).items():
        parameter.copy_(saved[name])


def _result_to_json(result: CalibrationResult) -> dict[str, Any]:
    return {
        "keep_ratios": result.keep_ratios.values.tolist(),
        "schedule": result.schedule.to_json(),
        "history": list(result.history),
        "explained": result.explained,
    }


def _result_from_json(
    data: Mapping[str, Any], routed: Program, config: CompileConfig
) -> CalibrationResult:
    schedule = TokenSchedule.from_json(data["schedule"])
    return CalibrationResult(
        KeepRatios(tuple(schedule.kept_tokens), np.array(data["keep_ratios"])),
        schedule,
        _costs(routed, config.routing),
        tuple(data["history"]),
        dict(data["explained"]),
    )
