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
    LearnedFrom,
    OptionalModel,
    Out,
    PipelineFile,
    Settings,
    Steps,
    with_steps,
)
from diffcr_compile.commands.outcome import print_report

EXAMPLES = (
    "python:my_model:make -o out --budget 60%",
    "diffusers:pixart/ --pipeline-inputs call.yaml -o out --set export.cfg=batched",
    "diffusers:pixart/transformer --inputs inputs.safetensors -c diffcr.yaml",
    "diffusers:pixart/ --pipeline-inputs call_768.yaml -o out_768 --learned-from out_512",
    "python:my_model:make -o out --steps 0 --set routing.shortcut_rank=16",
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
    steps: Steps = None,
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    learned_from: LearnedFrom = None,
    dry_run: DryRun = False,
) -> None:
    """Compile a model: capture, route, calibrate, freeze, export, validate, benchmark, report."""
    set_ = with_steps(set_, steps)
    job = make_job(model, out, config, set_, budget, inputs, pipeline_inputs, learned_from)
    if job.source == "demo" and job.config.run.learned_from is None:
        run_demo(
            out,
            job.config.run.budget,
            config,
            set_,
            dry_run=dry_run,
            inputs=inputs,
            pipeline_inputs=pipeline_inputs,
        )
        return
    if dry_run:
        job.announce(STAGES)
        return
    artifact, seconds = job.compile()
    print_report(artifact.report, out, seconds)
