"""``diffcr compile``: the whole job."""

from __future__ import annotations

from pathlib import Path

from diffcr_compile.commands.app import App
from diffcr_compile.commands.demo import run_demo
from diffcr_compile.commands.job import make_job
from diffcr_compile.commands.options import (
    Budget,
    Config,
    DryRun,
    Inputs,
    OptionalModel,
    Out,
    PipelineFile,
    Settings,
)
from diffcr_compile.commands.outcome import print_report

EXAMPLES = (
    "python:my_model:make -o out --budget 60%",
    "diffusers:pixart/ --pipeline-inputs call.yaml -o out --set export.cfg=batched",
    "diffusers:pixart/transformer --inputs inputs.safetensors -c diffcr.yaml",
    "-c diffcr.yaml -o out",
)
STAGES = "capture, route, rollouts, calibrate, freeze, export, baseline, benchmark, report"


def register(app: App) -> None:
    """Add the verb."""
    app.verb("compile", EXAMPLES)(compile_)


def compile_(
    model: OptionalModel = None,
    out: Out = Path("out"),
    budget: Budget = None,
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    dry_run: DryRun = False,
) -> None:
    """Compile a model: capture, route, calibrate, freeze, export, validate, benchmark, report."""
    job = make_job(model, out, config, set_, budget, inputs, pipeline_inputs)
    if job.source == "demo":
        run_demo(out, job.config.run.budget, config, set_, dry_run=dry_run)
        return
    if dry_run:
        job.announce(STAGES)
        return
    artifact, seconds = job.compile()
    print_report(artifact.report, out, seconds)
