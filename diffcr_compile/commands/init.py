"""``diffcr init``: a commented settings file for a model, or the schema of settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import DryRun, Inputs, OptionalModel, PipelineFile
from diffcr_compile.commands.terminal import say, terminal
from diffcr_compile.errors import UsageError

if TYPE_CHECKING:
    from diffcr_compile.planning.inspection import Plan
    from diffcr_compile.sources import Case

EXAMPLES = (
    "python:my_model:make > diffcr.yaml",
    "diffusers:pixart/ --pipeline-inputs call.yaml > diffcr.yaml",
    "--schema > diffcr.schema.json",
)
FEW_TOKENS = 256  # below, multiples of 16 are too coarse a grid for keep ratios


def register(app: App) -> None:
    """Add the verb."""
    app.verb("init", EXAMPLES)(init)


def init(
    model: OptionalModel = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of settings, for editors")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Print a settings file with every setting, those that were detected in the model set. Writes nothing."""
    from diffcr_compile.config_text import commented_yaml, json_schema

    if schema:
        say(json.dumps(json_schema(), indent=1))
        return
    if model is None:
        raise UsageError("diffcr init takes a MODEL, or --schema", code="DCR-U001")
    detected, notes = _detected(model, inputs, pipeline_inputs)
    say(commented_yaml(detected, notes).rstrip())


def _detected(
    model: str, inputs: Path | None, pipeline_inputs: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Settings that the model suggests, by dotted key, and lines about it."""
    import diffcr_compile as dcr
    from diffcr_compile.planning.advice import suggested_budget
    from diffcr_compile.sources import load_case

    case = load_case(model, inputs, pipeline_inputs, bars=terminal.verbosity >= 0)
    plan = dcr.inspect(case.model, case.inputs)
    found: dict[str, Any] = {"run.model": model}
    if inputs:
        found["run.inputs"] = str(inputs)
    if pipeline_inputs:
        found["run.pipeline_inputs"] = str(pipeline_inputs)
    budget = suggested_budget(plan.smallest_budget)
    found["run.budget"] = f"{budget:.0%}" if budget else "60%"
    return {**found, **_of_inputs(case, plan)}, _notes(case, plan)


def _of_inputs(case: Case, plan: Plan) -> Mapping[str, Any]:
    """Batch, guidance, buckets and the range of timesteps."""
    from diffcr_compile.calibrate.pipelines import PipelineRuns
    from diffcr_compile.capture import TIMESTEP_NAMES
    from diffcr_compile.opened import call_batch

    found: dict[str, Any] = {}
    tokens = max((block.spec.num_tokens for block in plan.details), default=0)
    if 0 < tokens < FEW_TOKENS:
        found["routing.multiple_of"] = max(1, tokens // 16)
    if isinstance(case.model, PipelineRuns):
        batch = call_batch(case.model.example)
        if case.model.images and batch > case.model.images:
            found["export.cfg"] = "batched"
        found["routing.buckets"] = min(4, len(case.model.timesteps))
        return found
    found["export.batch"] = call_batch(case.inputs)
    named = case.inputs if isinstance(case.inputs, Mapping) else {}
    timestep = next((named[n] for n in TIMESTEP_NAMES if n in named), None)
    if timestep is not None and timestep.is_floating_point() and float(timestep.max()) <= 1:
        found["routing.timestep_high"] = 1.0
    return found


def _notes(case: Case, plan: Plan) -> list[str]:
    lines = [f"{case.name}: {len(plan.details)} blocks can be routed, {len(plan.refused)} not"]
    if plan.details:
        names = [block.spec.name for block in plan.details]
        tokens = max(block.spec.num_tokens for block in plan.details)
        lines.append(f"blocks: {names[0]} to {names[-1]}; {tokens} tokens")
    if plan.error:
        lines.append(f"it cannot be compiled: {' '.join(plan.error.split())[:300]}")
    return lines
