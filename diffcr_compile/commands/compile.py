"""``diffcr compile``: the whole job."""

from __future__ import annotations

import time
from pathlib import Path

from diffcr_compile.commands.app import App
from diffcr_compile.commands.demo import demo
from diffcr_compile.commands.options import (
    Budget,
    Config,
    Inputs,
    ModelName,
    Out,
    PipelineFile,
    Settings,
    settings,
)
from diffcr_compile.commands.outcome import print_report
from diffcr_compile.commands.progress import progress

EXAMPLES = (
    "python:my_model:make -o out --budget 60%",
    "diffusers:pixart/ --pipeline-inputs call.yaml -o out",
    "diffusers:pixart/transformer --inputs inputs.safetensors -c diffcr.yaml",
)


def register(app: App) -> None:
    """Add the verb."""
    app.verb("compile", EXAMPLES)(compile_)


def compile_(
    model: ModelName,
    out: Out = Path("out"),
    budget: Budget = "60%",
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
) -> None:
    """Compile a model: capture, route, calibrate, freeze, export, validate, benchmark, report."""
    import diffcr_compile as dcr
    from diffcr_compile.sources import load_case

    if model == "demo":
        demo(out, budget, config, set_)
        return
    chosen = settings(config, set_)
    case = load_case(model, inputs, pipeline_inputs, chosen.rollouts.steps)
    started = time.monotonic()
    with progress() as event:
        artifact = dcr.compile(
            case.model,
            out,
            example_inputs=case.inputs,
            budget=budget,
            config=chosen,
            conditions=case.conditions,
            name=case.name,
            progress=event,
        )
    print_report(artifact.report, out, time.monotonic() - started)
