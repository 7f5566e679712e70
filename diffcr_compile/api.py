"""The public functions, and the whole pipeline top to bottom in :func:`compile`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from diffcr_compile import bench
from diffcr_compile.arguments import check_choice, check_sampling, settings_from
from diffcr_compile.asked import Until, asked_for
from diffcr_compile.attachments import checkpointing_off, prepared
from diffcr_compile.budgets import budget_costs, cost_table
from diffcr_compile.calibrate.data import Conditions
from diffcr_compile.calibrate.distributed import joined_ranks
from diffcr_compile.calibrate.loop import CalibrationResult
from diffcr_compile.calibrate.samplers import Sampler
from diffcr_compile.calibration_keys import (
    calibration_settings,
    keys_in_a_folder,
    states_identity,
)
from diffcr_compile.carry_over import carry_over
from diffcr_compile.config import (
    CompileConfig,
    ExportPrecision,
    RoutingConfig,
    parse_budget,
)
from diffcr_compile.config_text import effective_yaml
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.evaluation import Evaluate, evaluated
from diffcr_compile.export.parity import Parity
from diffcr_compile.folder_lock import locked
from diffcr_compile.guidance import graph_batch, guidance_of
from diffcr_compile.made import Artifact, stopped
from diffcr_compile.manifest import MANIFEST_FILE, read_manifest, sha256_file
from diffcr_compile.opened import (
    ExampleInputs,
    PipelineInputs,
    call_batch,
    call_of,
    open_model,
    shapes,
    weights_hash,
)
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.passes.remove_full_blocks import RemoveFullBlocks
from diffcr_compile.planning.inspection import Plan, make_plan
from diffcr_compile.planning.targets import find_target, find_targets, largest_topk
from diffcr_compile.program import DiTGraph, Stage, with_batch
from diffcr_compile.resumable import (
    Compiled,
    calibrated,
    dense_exported,
    exported,
    keep_schedule,
    reported,
    take_part,
    workspace_of,
)
from diffcr_compile.runtime import load
from diffcr_compile.schedule import TokenSchedule, check_budget
from diffcr_compile.stages import (
    Data,
    Event,
    all_kept_parity,
    captured,
    export_programs,
    frozen_parity,
    frozen_programs,
    half_settings,
    learn,
    program_of,
    routed_program,
    sampler_for,
    schedule_of,
    teacher_states,
)
from diffcr_compile.vector_math import settle_vector_math
from diffcr_compile.workspace import EFFECTIVE_FILE, fingerprint

settle_vector_math()  # at import, because the user's model is often built after it

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


def inspect(
    model: nn.Module | Any,
    example_inputs: ExampleInputs | None = None,
    config: RoutingConfig | Mapping[str, Any] | None = None,
    *,
    target: str = "onnxruntime-cpu",
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
        config: settings of the routing, as an object or a dict.
        target: name of the device whose limits count, see ``docs/targets.md``.
        macs_per_byte: MACs that the device does in the time in which it moves a byte, if known.
        pipeline_inputs: of a pipeline: the keyword arguments of its call.
        component: of a pipeline: the name of the denoiser, where there are several.

    Raises:
        UsageError: there is no such target, or the pipeline does not run.
    """
    settings = CompileConfig(routing=settings_from(config, RoutingConfig))
    device = find_target(target)
    model, example_inputs, _ = open_model(model, example_inputs, pipeline_inputs, component)
    args, kwargs = call_of(example_inputs)
    problem = None
    try:
        model = prepared(model, settings.routing.fuse_adapters)
    except UnsupportedModelError as error:
        problem = error.message
    with checkpointing_off(model):
        return make_plan(model, args, kwargs, settings, device, macs_per_byte, problem)


def route(
    model: nn.Module | Any,
    example_inputs: ExampleInputs | None = None,
    config: RoutingConfig | Mapping[str, Any] | None = None,
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
        config: gate, kind of router and so on, as an object or a dict.
        seed: of the routers' initial weights.
        pipeline_inputs: of a pipeline: the keyword arguments of its call.
        component: of a pipeline: the name of the denoiser, where there are several.

    Raises:
        UnsupportedModelError: no block can be routed, with the reason for each candidate; or hooks,
            adapters or offloading are attached to the model.
        CaptureError: torch.export cannot trace the model.
    """
    config = settings_from(config, RoutingConfig)
    model, example_inputs, _ = open_model(model, example_inputs, pipeline_inputs, component)
    ready = prepared(model, config.fuse_adapters)
    return routed_program(captured(ready, example_inputs, config, model), config, seed).module


def calibrate(
    routed: DiTGraph,
    data: Data = None,
    *,
    budget: float | str,
    config: CompileConfig | Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    conditions: Conditions | None = None,
    folder: Path | None = None,
    key: str = "",
    progress: Event | None = None,
) -> CalibrationResult:
    """Learn keep ratios and routers (and weights) under a budget, in place.

    Args:
        routed: from :func:`route`. With ``train: all`` it gets its own copy of the weights first.
        data: inputs by name in batches (the dense model answers them), ready teacher states, clean
            latents (:class:`LatentStates`), an opened pipeline to run, or None for teacher rollouts.
        budget: share of the dense model's cost, ``"60%"`` or 0.6; ``config.budget`` says which cost.
        config: settings, as an object or nested dicts; defaults are in ``config.py``.
        sampler: for rollouts; flow-matching Euler steps by default.
        conditions: for rollouts: ``conditions(generator, count)`` draws every input but sample and
            timestep; by default those of the example.
        folder: where resumable state is kept; None for none.
        key: what the state belongs to, beside what is compared anyway: the model's weights and shapes, budget, settings,
            sampler, the conditions drawn, and the content of data that are a list, a tuple or teacher states. Of other
            data (a generator, a data set, latents) only the class is compared: name it here.
        progress: called with (stage, done, all, figures).

    Raises:
        BudgetError: the budget cannot be reached; names the smallest that can.
    """
    config = settings_from(config, CompileConfig)
    check_sampling(sampler, conditions)
    program = program_of(routed, Stage.ROUTED)
    share = parse_budget(budget)
    check_budget(budget_costs(program, config), share)
    sampler = sampler_for(sampler, config)
    rollouts_key = None
    if folder is not None:
        made_from = states_identity(program, data, config, sampler, conditions)
        rollouts_key, key = keys_in_a_folder(program, made_from, config, share, key)
    with joined_ranks(config.calibration.rank_timeout) as ranks:
        states = teacher_states(
            program, data, config, sampler, conditions, folder, progress, ranks, rollouts_key
        )
        return learn(program, states, config, share, folder, key, progress, ranks)


def freeze(
    routed: DiTGraph,
    result: CalibrationResult | None = None,
    *,
    keep_ratio: float | None = None,
    schedule: TokenSchedule | None = None,
    target: str | Sequence[str] | None = None,
) -> tuple[DiTGraph, ...]:
    """One static graph per timestep bucket; adjacent buckets with equal schedules become one.

    Args:
        routed: from :func:`route`.
        result: what :func:`calibrate` learned; or give one of the other two.
        keep_ratio: the same keep ratio in [0, 1] for every block.
        schedule: kept tokens per block and bucket.
        target: where the graphs will run; a K beyond the TopK of one of them is said in pieces.

    Raises:
        UsageError: none or several of result, keep_ratio and schedule were given, or one of another type.
    """
    limit = largest_topk(find_targets(target))
    program = program_of(routed, Stage.ROUTED)
    schedule = schedule_of(program, result, keep_ratio, schedule).merged()
    return tuple(
        run_passes(
            program, [FreezeKeptTokens(schedule, bucket, limit), RemoveFullBlocks()]
        ).module
        for bucket in range(len(schedule.buckets))
    )


def export(
    frozen: Sequence[DiTGraph],
    out: str | Path,
    *,
    name: str = "model",
    parity_tolerance: float = 1e-4,
    target: str | Sequence[str] | None = None,
    profiles: bool = True,
    precision: ExportPrecision = "fp32",
    states: Iterable[Mapping[str, Tensor]] = (),
) -> Artifact:
    """Write the artifact: ONNX graphs over one weights file, golden outputs, manifest.

    Args:
        frozen: from :func:`freeze`, one per timestep bucket.
        out: the artifact's folder.
        name: of the model, for the manifest.
        parity_tolerance: largest allowed absolute difference of ONNX Runtime from FROZEN.
        target: where the graphs will run; freeze them for the same targets.
        profiles: also write one graph for several buckets, for an engine with the weights once.
        precision: type of matrix products and attention; all else stays fp32. int8 is fp16 with the linear
            layers of tokens in int8. bf16 graphs do not run on ONNX Runtime's CPU.
        states: inputs by name on which it is tried, best all of a sampling run: blocks whose values come
            near the end of fp16 there stay fp32, and the ranges of int8 are those met there.

    Raises:
        AccuracyError: ONNX Runtime differs from a FROZEN graph by more than the tolerance.
        TargetError: a target does not take a graph; names each rule.
    """
    targets = find_targets(target)
    programs = frozen_programs(frozen)
    check_choice("precision", precision, get_args(ExportPrecision))
    half = None if precision == "fp32" else half_settings(programs, precision, states)
    with locked(Path(out)):
        manifest = export_programs(
            programs,
            Path(out),
            name,
            parity_tolerance,
            None,
            targets,
            profiles=profiles,
            half=half,
        )
    return Artifact(Path(out), manifest)


def compile(
    model: nn.Module | Any,
    out: str | Path,
    *,
    example_inputs: ExampleInputs | None = None,
    pipeline_inputs: PipelineInputs = None,
    component: str | None = None,
    budget: float | str | None = None,
    learned_from: str | Path | None = None,
    data: Iterable[Mapping[str, Tensor]] | None = None,
    config: CompileConfig | Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    conditions: Conditions | None = None,
    evaluate: Evaluate | None = None,
    name: str | None = None,
    progress: Event | None = None,
    until: Until | None = None,
) -> Artifact:
    """Capture, route, calibrate, freeze, export, validate, benchmark, report.

    Every stage that is finished is recorded; the same call goes on where it was interrupted. Under
    torchrun the processes share rollouts and calibration, and rank 0 does the rest.

    Args:
        model: any DiT, in evaluation mode, or a pipeline of diffusers: its own runs are then the
            example and the training data.
        out: the artifact's folder, new or from an earlier call.
        example_inputs: keyword inputs as a dict, or positional ones as a tuple. Their batch size is
            that of the exported graphs. Of a pipeline none.
        pipeline_inputs: of a pipeline: the keyword arguments of its call, or several such dicts,
            which take turns.
        component: of a pipeline: the name of the denoiser, where there are several.
        budget: see :func:`calibrate`; 60 % by default, or that of `learned_from`.
        learned_from: an artifact of the same model at another resolution or batch size. Its routers, ratios
            and weights are taken instead of a calibration, and only the schedule is solved anew.
        data: see :func:`calibrate`. Where it changes between two calls the second one trains anew, if it is a list, a tuple
            or teacher states; the content of anything else is not compared, so name a new folder for it.
        config: settings, as an object or nested dicts.
        sampler: for rollouts and for the benchmark's sampling loop; with `learned_from` its steps are those over which the budget
            is met.
        conditions: for rollouts.
        evaluate: measures quality: ``evaluate(dense, compressed, folder)`` with two callables that run the model. It returns
            a mapping with ``metric`` (its name), ``dense`` and ``compressed`` (numbers), ``num_samples`` (int) and what else
            JSON can hold, which becomes ``report.json``'s ``quality``. Called again for every artifact that is made anew.
        name: how the model is called in the report.
        progress: called with (stage, done, all, figures).
        until: the last stage to run; the same call without it, or with a later one, goes on. The artifact
            has no manifest before ``export``, and no report before the end.

    Raises:
        UnsupportedModelError, BudgetError, UsageError, ArtifactError, AccuracyError: see each stage.
    """
    check_sampling(sampler, conditions)
    asked = asked_for(settings_from(config, CompileConfig), budget, learned_from, until)
    config, share, learned = asked.config, asked.share, asked.learned
    model, example_inputs, runs = open_model(
        model, example_inputs, pipeline_inputs, component, config.rollouts.steps
    )
    user_model, model = model, prepared(model, config.routing.fuse_adapters)
    name = name or type(model).__name__
    # how the user samples, as far as that was said
    steps_seen = runs.timesteps if runs else sampler.timesteps if sampler else None
    sampler = sampler_for(sampler, config)
    guidance = guidance_of(runs, config.export, call_batch(example_inputs))
    batch = graph_batch(guidance, config.export)
    patience = config.calibration.rank_timeout
    with joined_ranks(patience) as ranks, workspace_of(Path(out), ranks) as space:
        space.write_text(EFFECTIVE_FILE, effective_yaml(config))
        made_of = [shapes(example_inputs), runs.identity] if runs else shapes(example_inputs)
        identity = fingerprint(weights_hash(model), name, made_of)
        with space.stage("capture", identity):
            dense = with_batch(
                captured(model, example_inputs, config.routing, user_model), batch
            )
        with space.stage("route", identity):
            routed = routed_program(dense, config.routing, config.calibration.seed)
            ladder = [all_kept_parity(dense, routed)]
            costs = cost_table(routed, config.routing)
            priced = budget_costs(routed, config)
            check_budget(priced, share)
        settings, given = calibration_settings(config), runs if data is None else data
        made_from = states_identity(routed, given, config, sampler, conditions)
        rollouts_key = fingerprint(identity, made_from)
        key = fingerprint(identity, share, settings, asked.metered, made_from)
        if learned is not None:
            key = fingerprint(key, sha256_file(learned.folder / MANIFEST_FILE))
        if not ranks.leads:
            take_part(
                Path(out),
                rollouts_key,
                routed,
                given,
                share,
                config,
                sampler,
                conditions,
                ranks,
            )
            early = until in ("calibrate", "freeze")
            return Artifact(Path(out), None if early else read_manifest(Path(out)))
        if learned is None:
            result = calibrated(
                space, key, rollouts_key, routed, given, share, config, sampler, conditions, progress,
                ranks,
            )  # fmt: skip
        else:
            with space.stage("calibrate", key):
                ranks.total(1.0)  # nothing is left for the others to learn
                weights = space.subfolder("model") / "routed.safetensors"
                result = carry_over(
                    learned, user_model, routed, priced, share, steps_seen, weights
                )
        if until == "calibrate":
            return stopped(space, ranks)
        with space.stage("freeze", key):
            graphs = freeze(routed.module, result, target=config.export.target)
            frozen = [graph.program for graph in graphs]
            ladder += [frozen_parity(routed, program) for program in frozen]
        if until == "freeze":
            keep_schedule(space, frozen[0])
            return stopped(space, ranks)
        timesteps = list(runs.timesteps) if runs else sampler.timesteps
        own = None if runs else sampler
        manifest = exported(
            space, key, frozen, name, config, progress, timesteps, own, guidance
        )
        if until == "export":
            return stopped(space, ranks, manifest)
        dense_exported(space, fingerprint(identity, batch), dense)
        for part in ("precision", "buckets", "profiles"):
            ladder += [Parity(**row) for row in manifest.parity[part]]
        compiled = Compiled(
            name, dense, routed, tuple(frozen), costs, result, manifest, tuple(ladder)
        )
        with space.stage("benchmark", key):
            speed = (
                bench.best_sampling_loops(space.folder, timesteps)
                if manifest.runs_on_cpu
                else dict(bench.NOT_MEASURED)
            )
        quality = evaluated(space, evaluate) if manifest.runs_on_cpu else None
        report = reported(space, compiled, config, speed, quality, timesteps)
        ranks.wait_for_leader()
    return Artifact(Path(out), manifest, report)
