"""``diffcr inspect``: the dry run."""

from __future__ import annotations

from typing import Annotated

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import (
    AsJson,
    Config,
    Inputs,
    ModelName,
    PipelineFile,
    Settings,
    settings,
)
from diffcr_compile.commands.terminal import print_json, say, terminal

EXAMPLES = (
    "demo",
    "python:my_model:make --target orin-jp6",
    "diffusers:pixart/ --pipeline-inputs call.yaml --json",
)


def register(app: App) -> None:
    """Add the verb."""
    app.verb("inspect", EXAMPLES)(inspect)


def inspect(
    model: ModelName,
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    target: Annotated[
        str, typer.Option(help="device: ort-cpu, orin-jp6, thor-jp7 or rtx")
    ] = "ort-cpu",
    macs_per_byte: Annotated[
        float | None,
        typer.Option(help="MACs the device does in the time in which it moves a byte"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Dry run: what can be routed and why, what it brings and takes, what to run next. Writes nothing."""
    import diffcr_compile as dcr
    from diffcr_compile.planning.plan_text import plan_text
    from diffcr_compile.sources import load_case

    routing = settings(config, set_).routing
    case = load_case(model, inputs, pipeline_inputs, bars=terminal.verbosity >= 0)
    plan = dcr.inspect(
        case.model, case.inputs, routing, target=target, macs_per_byte=macs_per_byte
    )
    given = str(inputs) if inputs else None
    source = f"{model} --pipeline-inputs {pipeline_inputs}" if pipeline_inputs else model
    if as_json:
        print_json(plan.to_json(source, given))
        return
    say(plan_text(plan, case.name, source, given))
